// A call as the host sees it: which kernels serve its sizes, with how many blocks, and how each is launched.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cuda/general.h"
#include "cuda/tiles_launch.h"
#include "cuda/vectors.h"

namespace fastcaps::cuda {
namespace {

// Scratch memory, cut into pieces, or only counted.
struct Scratch {
  char* memory;
  bool only_counted = false;
  int64_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* const piece = memory ? reinterpret_cast<T*>(memory + used) : nullptr;
    used += pieces(count * int64_t(sizeof(T)), 256) * 256;
#ifdef FASTCAPS_EMULATED
    if (memory) emulated::fence(memory + used);
    used += emulated::kFence;
#endif
    return piece;
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

// The tile with the fewest rows that are not there; `none` where no tile holds the vectors or there is none for the
// type.
template <class Real>
TileKind tile_kind(const Routing<Real>& in) {
  const Sizes& z = in.size;
  const bool matrices = in.weight && (in.stride_i || z.I == 1) && (in.stride_j || z.J == 1);
  if (std::max({z.B, z.I, z.J}) > INT32_MAX - 64) return TileKind::none;
  if (!std::is_same_v<Real, float> || !matrices || z.D_in > 64 || z.D_out > 32) return TileKind::none;
  if (z.D_out > 16) return TileKind::capsules5;
  return pieces(z.J, 8) * 8 <= pieces(z.J, 10) * 10 ? TileKind::capsules8 : TileKind::capsules10;
}

// A call, with what its sweeps have in common.
template <class Real>
struct Call {
  Routing<Real> in;
  bool allow_tf32;
  cudaStream_t stream;
  Sizes z = in.size;
  TileKind kind = tile_kind(in);
  bool absorbed = in.weight && in.stride_i == 0 && z.I != 1;
  int64_t D_sum = absorbed ? z.D_in : z.D_out;  // entries of what is summed over the input capsules
  int64_t N = z.B * z.J * z.D_out;
  int64_t capsules = kind == TileKind::none ? 1 : with_tile(kind, [&]<class T>() { return int64_t(T::JT); });
  int64_t rows = kind == TileKind::none ? 1 : with_tile(kind, [&]<class T>() { return int64_t(T::D); });
  // From V or ds of one iteration to the next: where tiles read them they are padded.
  int64_t vectors = kind == TileKind::none ? N : with_tile(kind, [&]<class T>() { return T::places(z.B, z.J); });
  int64_t batch_tiles, slices;

  // resident: how many blocks of a sweep by tiles a multiprocessor has at a time.
  Call(const Routing<Real>& in_, bool allow_tf32_, int resident, void* stream_)
      : in(in_), allow_tf32(allow_tf32_), stream(static_cast<cudaStream_t>(stream_)) {
    if (kind == TileKind::none) {
      slices = most_slices(multiprocessors() * 24 / std::max<int64_t>(z.B, 1));
    } else {
      const int64_t tiles = pieces(z.B, 8);
      batch_tiles = std::max<int64_t>(tiles >= 3 ? 4 : tiles, 4 / chunk());
      const int64_t blocks = std::max<int64_t>(pieces(tiles, batch_tiles) * pieces(z.J, capsules), 1);
      // One wave of blocks; of many slices, whose sums are to be added again, only those with four input capsules a
      // warp.
      const int64_t worth_it = std::max<int64_t>(64, z.I * batch_tiles / 16);
      slices = most_slices(std::min(multiprocessors() * resident / blocks, worth_it));
    }
  }

  // As many as wanted, if there are so many input capsules and their sums take at most 64 MB.
  int64_t most_slices(int64_t wanted) const {
    const int64_t affordable = (64 << 20) / std::max<int64_t>(sums_of_part() * int64_t(sizeof(Real)), 1);
    return std::max<int64_t>(std::min({wanted, z.I, affordable}), 1);
  }
  bool padded() const { return vectors > N; }
  int64_t tiles() const { return kind == TileKind::none ? 1 : pieces(z.J, capsules); }

  // Bytes of an input capsule's matrices in shared memory, and how many of them are there at a time.
  int64_t matrix_bytes() const { return pieces(z.D_in, 8) * 8 * capsules * rows * 4; }
  int64_t chunk() const { return matrix_bytes() <= 10 * 1024 ? 4 : matrix_bytes() <= 20 * 1024 ? 2 : 1; }

  bool plain() const {
    const int64_t type = in.stored == Stored::real ? 4 : 2;
    return (z.D_in == 4 || z.D_in == 8) && aligned(4 * type) && !in.prior && !in.mask && !in.leaky &&
           z.J % capsules == 0 && z.D_out == rows;
  }
  bool aligned(int64_t bytes) const {
    return z.D_in % 4 == 0 && (uintptr_t(in.poses) | uintptr_t(in.weight)) % bytes == 0;
  }

  TileCall tile_call() const {
    TileCall call{};
    call.poses = in.poses, call.weight = in.weight, call.mask = in.mask;
    if constexpr (std::is_same_v<Real, float>) call.prior = in.prior;
    call.prior_stride_b = in.prior_stride_b;
    call.B = int(z.B), call.I = int(z.I), call.J = int(z.J), call.D_in = int(z.D_in), call.D_out = int(z.D_out);
    call.slices = int(slices), call.batch_tiles = int(batch_tiles), call.chunk = int(chunk()), call.leaky = in.leaky;
    call.places = vectors, call.share = 1.f / float(z.J + in.leaky);
    call.vectors = aligned(in.stored == Stored::real ? 16 : 8);
    return call;
  }
  // in as the kernels without tiles see it: poses that stand for votes.
  AnyCall<Real> any_call() const {
    AnyCall<Real> call{};
    call.in = in, call.slices = slices;
    if (absorbed) call.in.weight = nullptr, call.in.stride_j = 0, call.in.size.D_out = z.D_in;
    return call;
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
  int64_t sums_of_part() const { return absorbed ? z.B * z.J * z.D_in : vectors; }
  int64_t partial_size() const { return slices * sums_of_part(); }

  // Partial sums [slices, sums_of_part()] of c u or, with ds, of db u; statistics where asked for or needed.
  void sweep(const Real* V, const Real* ds, Real* stats, Real* partial) const {
    const bool uniform = !V && !in.prior && !ds;
    if constexpr (std::is_same_v<Real, float>) {
      if (kind != TileKind::none) {
        TileCall call = tile_call();
        call.V = V, call.ds = ds, call.stats = stats, call.partial = partial;
        if (uniform) return tile_sweep(Sweep::uniform, call);
        if (tiles() > 1 || !partial) tile_sweep(Sweep::stats_only, call);
        if (partial) tile_sweep(tiles() > 1 ? Sweep::with_stats : Sweep::softmax, call);
        return;
      }
    }
    AnyCall<Real> call = any_call();
    call.V = V, call.ds = ds, call.stats = uniform ? nullptr : stats, call.partial = partial;
    const int64_t bytes = z.J * D_sum * int64_t(sizeof(Real));
    call.in_shared_memory = partial && bytes <= 8 * 1024;
    const Grid grid = grid_of_warps(slices * z.B, call.in_shared_memory ? bytes : 0);
    with_type([&]<class In>() { launch(any_sweep<Real, In>, grid, stream, call, "any_sweep", z); });
  }
  // Of kernels without tiles: four warps to a block unless that is too much shared memory.
  static Grid grid_of_warps(int64_t warps, int64_t bytes_of_a_warp) {
    const int of_block = 4 * bytes_of_a_warp <= 48 * 1024 ? 4 : 1;
    return {pieces(warps, of_block), 32 * of_block, of_block * bytes_of_a_warp};
  }
  void tile_sweep(Sweep sweep, const TileCall& call) const {
    const int64_t groups = pieces(pieces(z.B, 8), batch_tiles);
    const int64_t shared = std::max(2 * call.chunk * matrix_bytes(), batch_tiles < 4 ? 16 * 8 * capsules * rows : 0);
    const Grid grid{groups * slices * (sweep == Sweep::stats_only ? 1 : tiles()), kTileThreads, shared};
    with_form([&]<class In, bool TF32>() { launch_tile_sweep<In, TF32>(kind, sweep, plain(), grid, stream, call); });
  }

  // Whether all iterations ran in one launch.
  bool run_together(bool backward, TileCall tile, const VectorCall<Real>& vectors) const {
    bool launched = false;
    if constexpr (std::is_same_v<Real, float>) {
      if (kind == TileKind::none || tiles() > 1 || z.T < 2) return false;
      const int64_t blocks = pieces(pieces(z.B, 8), batch_tiles) * slices;
      with_form([&]<class In, bool TF32>() {
        launched = launch_tile_persistent<In, TF32>(kind, backward, plain(), blocks, stream, {tile, vectors, {}});
      });
    }
    return launched;
  }

  // ------------------------------------------------------------------------------------------------------- vectors

  VectorCall<Real> vector_call() const {
    VectorCall<Real> call{};
    call.kind = kind, call.B = z.B, call.J = z.J, call.D_out = z.D_out, call.T = int(z.T), call.eps = in.eps;
    call.stored = in.stored, call.stride_t = vectors;
    return call;
  }
  void per_block(void (*kernel)(VectorCall<Real>), const VectorCall<Real>& call, const char* name) const {
    const int64_t bytes = vector_memory(kind, z.D_out) * int64_t(sizeof(Real));
    launch(kernel, {groups_of_rows(call), kVectorThreads, bytes}, stream, call, name, z);
  }
  void per_warp(void (*kernel)(VectorCall<Real>), int64_t warps, const VectorCall<Real>& call, const char* name) const {
    launch(kernel, {pieces(32 * warps, kVectorThreads), kVectorThreads, 0}, stream, call, name, z);
  }
  void sum(const Real* x, int64_t parts, int64_t size, void* out, Stored stored) const {
    const PartsCall<Real> call{x, out, stored, parts, size};
    launch(add_parts<Real>, {pieces(size, kVectorThreads), kVectorThreads, 0}, stream, call, "add_parts", z);
  }

  // Absorbed: x [rows, J, D_in] times W^T, or `back`, x [rows, J, D_out] times W.
  void transform(const Real* x, int64_t rows, bool back, Real* out) const {
    TransformCall<Real> call{x, in.weight, in.stored, rows, z.J, z.D_in, z.D_out, in.stride_j, 1, z.D_in, out};
    if (back) call.N = z.D_out, call.L = z.D_in, call.stride_n = z.D_in, call.stride_l = 1;
    launch(transform_vectors<Real>, {pieces(rows * z.J * call.L, kVectorThreads), kVectorThreads, 0}, stream, call,
           "transform_vectors", z);
  }
};

}  // namespace
}  // namespace fastcaps::cuda
