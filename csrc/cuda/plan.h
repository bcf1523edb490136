// The host's plan of a call: which kernels serve its sizes, with how many blocks, and how each is launched.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cuda/general.h"
#include "cuda/layout.h"
#include "cuda/platform.h"
#include "cuda/tiles.h"
#include "cuda/tiles_launch.h"
#include "cuda/tiles_sweep.h"
#include "cuda/vectors.h"
#include "numbers.h"
#include "routing.h"

namespace fastcaps::cuda {
namespace {

// What the tiles hold; larger poses, and what is not float32 or half, go to cuda/general.h.
constexpr int64_t kTileDepth = 64, kTileEntries = 32;  // most entries D_in and D_out

// Bytes of an input capsule's matrices up to which four or two of them are a chunk: two chunks take at most 80 KB of a
// multiprocessor's 99 KB or more. The paper's layer has 5 KB and chunks of four, by which its warps read V and ds of
// the last sweep a quarter as often (472 -> 118 MB).
constexpr int64_t kBytesForFour = 10 << 10, kBytesForTwo = 20 << 10;

// Slices of the input capsules. By tiles one wave of blocks; of many slices, whose sums are to be added again, only
// those with four input capsules a warp, which are 16 a block (an estimate, not measured). Without tiles 24 warps on a
// multiprocessor (not measured). What all slices leave to be added takes at most 64 MB.
constexpr int64_t kFewSlices = 64, kCapsulesOfBlock = 16, kWarpsWithoutTiles = 24, kPartialBytes = 64 << 20;

// Without tiles: bytes of a warp's sums that stay in shared memory, and what a block may have of it anywhere.
constexpr int64_t kSumsInShared = 8 << 10, kSharedBytes = 48 << 10;

// Scratch memory, cut into arrays, or only counted.
struct Scratch {
  char* memory;
  bool only_counted = false;
  int64_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* const array = memory ? reinterpret_cast<T*>(memory + used) : nullptr;
    used += ceil_div(count * int64_t(sizeof(T)), 256) * 256;
#ifdef FASTCAPS_EMULATED
    if (memory) emulated::fence(memory + used);
    used += emulated::kFence;
#endif
    return array;
  }
};

void set_to_zero(void* memory, int64_t bytes, cudaStream_t stream) {
  if (bytes == 0) return;
#ifdef FASTCAPS_EMULATED
  std::memset(memory, 0, bytes);
#else
  const cudaError_t error = cudaMemsetAsync(memory, 0, bytes, stream);
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("fastcaps::cuda: cudaMemsetAsync: ") + cudaGetErrorString(error));
#endif
}

// The tile with the fewest rows that are not there; `none` where no tile holds the vectors or their type.
template <class Real>
TileKind tile_kind(const Routing<Real>& in) {
  const Sizes& z = in.size;
  const bool matrices = in.weight && in.stride_i && (in.stride_j || z.J == 1);
  if (std::max({z.B, z.I, z.J}) > INT32_MAX - 64) return TileKind::none;
  if (!std::is_same_v<Real, float> || !matrices || z.D_in > kTileDepth || z.D_out > kTileEntries) return TileKind::none;
  if (z.D_out > 16) return TileKind::capsules5;
  return ceil_div(z.J, 8) * 8 <= ceil_div(z.J, 10) * 10 ? TileKind::capsules8 : TileKind::capsules10;
}

template <class Real>
struct Plan {
  Routing<Real> in;
  bool allow_tf32;
  cudaStream_t stream;
  Sizes z = in.size;
  TileKind kind = tile_kind(in);
  bool absorbed = in.weight && in.stride_i == 0;
  int64_t D_sum = absorbed ? z.D_in : z.D_out;  // entries of what is summed over the input capsules
  int64_t N = z.B * z.J * z.D_out;
  int64_t capsules = kind == TileKind::none ? 1 : with_tile(kind, [&]<class T>() { return int64_t(T::JT); });
  int64_t rows = kind == TileKind::none ? 1 : with_tile(kind, [&]<class T>() { return int64_t(T::D); });
  // From V or ds of one iteration to the next: where tiles read them they are padded.
  int64_t stride_t = kind == TileKind::none ? N : with_tile(kind, [&]<class T>() { return T::places(z.B, z.J); });
  int64_t band_tiles = 0, slices = 1;  // without tiles there is no band

  // resident: how many blocks of a sweep by tiles a multiprocessor has at a time.
  Plan(const Routing<Real>& in_, bool allow_tf32_, int resident, void* stream_)
      : in(in_), allow_tf32(allow_tf32_), stream(static_cast<cudaStream_t>(stream_)) {
    if (kind == TileKind::none) {
      slices = most_slices(multiprocessors() * kWarpsWithoutTiles / std::max<int64_t>(z.B, 1));
    } else {
      const int64_t tiles = ceil_div(z.B, kTileSamples);
      band_tiles = std::max<int64_t>(tiles >= 3 ? 4 : tiles, 4 / chunk_capsules());
      const int64_t blocks = std::max<int64_t>(ceil_div(tiles, band_tiles) * ceil_div(z.J, capsules), 1);
      const int64_t worth_it = std::max<int64_t>(kFewSlices, z.I * band_tiles / kCapsulesOfBlock);
      slices = most_slices(std::min(multiprocessors() * resident / blocks, worth_it));
    }
  }

  int64_t most_slices(int64_t wanted) const {
    const int64_t affordable = kPartialBytes / std::max<int64_t>(sums_of_slice() * int64_t(sizeof(Real)), 1);
    return std::max<int64_t>(std::min({wanted, z.I, affordable}), 1);
  }
  bool padded() const { return stride_t > N; }
  int64_t tiles() const { return kind == TileKind::none ? 1 : ceil_div(z.J, capsules); }

  // Bytes of an input capsule's matrices in shared memory, and how many input capsules are there at a time.
  int64_t matrix_bytes() const { return ceil_div(z.D_in, kOctet) * kOctet * capsules * rows * 4; }
  int64_t chunk_capsules() const {
    return matrix_bytes() <= kBytesForFour ? 4 : matrix_bytes() <= kBytesForTwo ? 2 : 1;
  }

  bool plain() const {
    const int64_t type = in.stored == Stored::real ? 4 : 2;
    return (z.D_in == 4 || z.D_in == 8) && aligned(4 * type) && !in.prior && !in.mask && !in.leaky &&
           z.J % capsules == 0 && z.D_out == rows;
  }
  bool aligned(int64_t bytes) const {
    return z.D_in % 4 == 0 && (uintptr_t(in.poses) | uintptr_t(in.weight)) % bytes == 0;
  }

  TileArguments tile_arguments() const {
    TileArguments args{};
    args.poses = in.poses, args.weight = in.weight, args.mask = in.mask;
    if constexpr (std::is_same_v<Real, float>) args.prior = in.prior;
    args.prior_stride_b = in.prior_stride_b;
    args.B = int(z.B), args.I = int(z.I), args.J = int(z.J), args.D_in = int(z.D_in), args.D_out = int(z.D_out);
    args.slices = int(slices), args.band_tiles = int(band_tiles), args.chunk_capsules = int(chunk_capsules()),
    args.leaky = in.leaky;
    args.places = stride_t, args.uniform_coupling = 1.f / float(z.J + in.leaky);
    args.aligned = aligned(in.stored == Stored::real ? 16 : 8);
    return args;
  }
  // in as the kernels without tiles see it: poses that stand for votes.
  GeneralArguments<Real> general_arguments() const {
    GeneralArguments<Real> args{};
    args.in = in, args.slices = slices;
    if (absorbed) args.in.weight = nullptr, args.in.stride_j = 0, args.in.size.D_out = z.D_in;
    return args;
  }

  // Calls body.operator()<In>() with the type that poses and weight are stored in.
  template <class Body>
  void with_type(Body&& body) const {
    if constexpr (std::is_same_v<Real, double>) {
      body.template operator()<double>();
    } else {
      if (in.stored == Stored::bfloat16) return body.template operator()<bfloat16>();
      if (in.stored == Stored::float16) return body.template operator()<float16>();
      body.template operator()<float>();
    }
  }
  // The same for tiles: with whether products are of numbers rounded to tf32, or exact in it.
  template <class Body>
  void with_form(Body&& body) const {
    if (in.stored == Stored::bfloat16) return body.template operator()<bfloat16, false>();
    if (in.stored == Stored::float16) return body.template operator()<float16, false>();
    if (allow_tf32) return body.template operator()<float, true>();
    body.template operator()<float, false>();
  }

  int64_t stats_size() const { return 3 * z.I * z.B; }
  // What a slice of the input capsules leaves to be summed: by tiles padded like V.
  int64_t sums_of_slice() const { return absorbed ? z.B * z.J * z.D_in : stride_t; }
  int64_t partial_size() const { return slices * sums_of_slice(); }

  // Partial sums [slices, sums_of_slice()] of c u or, with ds, of db u; statistics where asked for or needed.
  void sweep(const Real* V, const Real* ds, Real* stats, Real* partial) const {
    const bool uniform = !V && !in.prior && !ds;
    if constexpr (std::is_same_v<Real, float>) {
      if (kind != TileKind::none) {
        TileArguments args = tile_arguments();
        args.V = V, args.ds = ds, args.stats = stats, args.partial = partial;
        if (uniform) return tile_sweep(Sweep::uniform, args);
        if (tiles() > 1 || !partial) tile_sweep(Sweep::stats_only, args);
        if (partial) tile_sweep(tiles() > 1 ? Sweep::with_stats : Sweep::softmax, args);
        return;
      }
    }
    GeneralArguments<Real> args = general_arguments();
    args.V = V, args.ds = ds, args.stats = uniform ? nullptr : stats, args.partial = partial;
    const int64_t bytes = z.J * D_sum * int64_t(sizeof(Real));
    args.in_shared_memory = partial && bytes <= kSumsInShared;
    const Grid grid = grid_of_warps(slices * z.B, args.in_shared_memory ? bytes : 0);
    with_type([&]<class In>() { launch(general_sweep<Real, In>, grid, stream, args, "general_sweep", z); });
  }
  // Of kernels without tiles: kGeneralWarps to a block unless that is too much shared memory.
  static Grid grid_of_warps(int64_t warps, int64_t bytes_of_a_warp) {
    const int of_block = kGeneralWarps * bytes_of_a_warp <= kSharedBytes ? kGeneralWarps : 1;
    return {ceil_div(warps, of_block), 32 * of_block, of_block * bytes_of_a_warp};
  }
  // Whether the matrices of sweeps go through a ring: all are of the form for which it is written, and two thirds of
  // the warps have samples.
  bool by_ring(bool backward) const {
    const int64_t batch_tiles = ceil_div(z.B, kTileSamples);
    return z.B > 0 && kind != TileKind::none && plain() && in.stored == Stored::real && z.D_in == kOctet &&
           tiles() == 1 && 3 * batch_tiles >= 2 * ring_bands(backward) * ring_warps(backward);
  }
  int64_t ring_bands(bool backward) const { return ceil_div(z.B, kTileSamples * ring_warps(backward)); }
  // For sweeps in launches of their own, with no more slices than before: by a ring one wave of blocks.
  Plan of_sweeps(bool backward) const {
    Plan plan = *this;
    if (by_ring(backward)) plan.slices = std::clamp<int64_t>(multiprocessors() / ring_bands(backward), 1, slices);
    return plan;
  }
  void tile_sweep(Sweep sweep, TileArguments args) const {
    const bool backward = args.ds, of_form = sweep == Sweep::uniform || sweep == Sweep::softmax;
    if (of_form && by_ring(backward)) {
      args.band_tiles = ring_warps(backward);
      const int64_t blocks = ring_bands(backward) * slices;
      with_form([&]<class In, bool TF32>() { launch_tile_ring<In, TF32>(kind, sweep, blocks, stream, args); });
      return;
    }
    const int64_t bands = ceil_div(ceil_div(z.B, kTileSamples), band_tiles);
    const int64_t shared =
        std::max(2 * args.chunk_capsules * matrix_bytes(), band_tiles < 4 ? 16 * 8 * capsules * rows : 0);
    const Grid grid{bands * slices * (sweep == Sweep::stats_only ? 1 : tiles()), kTileThreads, shared};
    with_form([&]<class In, bool TF32>() { launch_tile_sweep<In, TF32>(kind, sweep, plain(), grid, stream, args); });
  }

  // Whether all iterations ran in one launch.
  bool run_persistent(bool backward, TileArguments tile, const VectorArguments<Real>& vectors) const {
    bool launched = false;
    if constexpr (std::is_same_v<Real, float>) {
      if (kind == TileKind::none || tiles() > 1 || z.T < 2) return false;
      const int64_t blocks = ceil_div(ceil_div(z.B, kTileSamples), band_tiles) * slices;
      with_form([&]<class In, bool TF32>() {
        launched = launch_tile_persistent<In, TF32>(kind, backward, plain(), blocks, stream, {tile, vectors, {}});
      });
    }
    return launched;
  }

  // ------------------------------------------------------------------------------------------------------- vectors

  VectorArguments<Real> vector_arguments() const {
    VectorArguments<Real> args{};
    args.kind = kind, args.B = z.B, args.J = z.J, args.D_out = z.D_out, args.T = int(z.T), args.eps = in.eps;
    args.stored = in.stored, args.stride_t = stride_t;
    return args;
  }
  void per_block(void (*kernel)(VectorArguments<Real>), const VectorArguments<Real>& args, const char* name) const {
    const int64_t bytes = vector_memory(kind, z.D_out) * int64_t(sizeof(Real));
    launch(kernel, {count_sets(args), kVectorThreads, bytes}, stream, args, name, z);
  }
  void per_warp(void (*kernel)(VectorArguments<Real>), int64_t warps, const VectorArguments<Real>& args,
                const char* name) const {
    launch(kernel, {ceil_div(32 * warps, kVectorThreads), kVectorThreads, 0}, stream, args, name, z);
  }
  void sum(const Real* x, int64_t partials, int64_t size, void* out, Stored stored) const {
    const SumArguments<Real> args{x, out, stored, partials, size};
    launch(add_partials<Real>, {ceil_div(size, kVectorThreads), kVectorThreads, 0}, stream, args, "add_partials", z);
  }

  // Absorbed: x [rows, J, D_in] times W^T, or `back`, x [rows, J, D_out] times W.
  void transform(const Real* x, int64_t rows, bool back, Real* out) const {
    TransformArguments<Real> args{x, in.weight, in.stored, rows, z.J, z.D_in, z.D_out, in.stride_j, 1, z.D_in, out};
    if (back) args.N = z.D_out, args.L = z.D_in, args.stride_n = z.D_in, args.stride_l = 1;
    launch(transform_vectors<Real>, {ceil_div(rows * z.J * args.L, kVectorThreads), kVectorThreads, 0}, stream, args,
           "transform_vectors", z);
  }
};

}  // namespace
}  // namespace fastcaps::cuda
