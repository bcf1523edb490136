// Dynamic routing on NVIDIA GPUs: which kernels run, in what order, with how many blocks and how much memory.
//
// Forward, T times: a sweep over the input capsules (partial sums over slices of them), then their sum in a fixed
// order, the output, V. Backward, from the weighted sums alone: for t = T-1 .. 1 a sweep (partial dV) and ds of the
// iteration before, then the gradients from all iterations at once. With one matrix for all input capsules no vote is
// computed, as <W x, V> = <x, W^T V> and sum c W x = W sum c x: poses stand for votes, `transform` goes between.
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cuda/entry_points.h"
#include "cuda/general.h"
#include "cuda/layout.h"
#include "cuda/plan.h"
#include "cuda/platform.h"
#include "cuda/tiles.h"
#include "cuda/tiles_backward.h"
#include "cuda/tiles_launch.h"
#include "cuda/vectors.h"
#include "numbers.h"
#include "routing.h"

namespace fastcaps::cuda {
namespace {

// ------------------------------------------------------------------------------------------------------------ forward

template <class Real>
int64_t run_forward(const Routing<Real>& in, bool allow_tf32, void* out, Real* sums, Scratch scratch, void* stream) {
  Plan<Real> plan(in, allow_tf32, kForwardBlocks, stream);
  const Sizes& z = plan.z;
  Real* const partial = scratch.take<Real>(plan.partial_size());
  Real* const V = scratch.take<Real>(plan.stride_t);
  Real* const stats = plan.tiles() > 1 ? scratch.take<Real>(plan.stats_size()) : nullptr;
  const int64_t absorbed_size = plan.absorbed ? z.B * z.J * z.D_in : 0;
  Real* const V_poses = scratch.take<Real>(absorbed_size);
  Real* const sum_poses = scratch.take<Real>(absorbed_size);
  Real* const sum = scratch.take<Real>(plan.absorbed ? plan.N : 0);
  if (scratch.only_counted) return scratch.used;

  if (plan.padded()) set_to_zero(V, plan.stride_t * sizeof(Real), plan.stream);
  VectorArguments<Real> vectors = plan.vector_arguments();
  vectors.partial = plan.absorbed ? sum : partial, vectors.slices = plan.absorbed ? 1 : plan.slices;
  vectors.bias = in.bias, vectors.new_sums = sums, vectors.out = out, vectors.V_next = V;
  TileArguments tile = plan.tile_arguments();
  if constexpr (std::is_same_v<Real, float>) tile.V = V, tile.partial = partial;
  if (plan.run_persistent(false, tile, vectors)) return scratch.used;
  plan = plan.of_sweeps(false);
  if (!plan.absorbed) vectors.slices = plan.slices;
  for (int64_t t = 0; t < z.T; ++t) {
    if (plan.absorbed) {
      if (t > 0) plan.transform(V, z.B, true, V_poses);
      plan.sweep(t > 0 ? V_poses : nullptr, nullptr, stats, partial);
      plan.sum(partial, plan.slices, absorbed_size, sum_poses, Stored::real);
      plan.transform(sum_poses, z.B, false, sum);
    } else {
      plan.sweep(t > 0 ? V : nullptr, nullptr, stats, partial);
    }
    plan.per_block(squash_vectors<Real>, forward_iteration(vectors, t), "squash_vectors");
  }
  return scratch.used;
}

// ----------------------------------------------------------------------------------------------------------- backward

// Memory of the last sweep, which computes the gradients of poses (or votes), of the weight unless absorbed, and of the
// prior. By tiles a block has a panel, or an equal share of all items where panels would leave much of the last wave of
// blocks empty: at the paper's size 288 panels where 264 blocks are resident.
constexpr int64_t kFullPercent = 90;                // of the last wave, below which blocks get equal shares
constexpr int64_t kPartialPanelBytes = 128 << 20;   // of the partial gradients that these leave, at most
constexpr int64_t kNumbersOfWarp = 1024;            // of a matrix's gradient that a warp sums up in shared memory
constexpr int64_t kRowsOfShare = 64, kShares = 64;  // of the gradient of one matrix for all: least rows, most shares

template <class Real>
struct LastSweepMemory {
  Items items{};
  Real *partial_panels = nullptr, *poses_sum = nullptr;

  LastSweepMemory(const Plan<Real>& plan, const Gradients<Real>& out, Scratch& scratch) {
    const Sizes& z = plan.z;
    if (plan.kind == TileKind::none) return;
    const int64_t capsules = plan.chunk_capsules(), batch_tiles = ceil_div(z.B, kTileSamples);
    const int64_t panels = ceil_div(z.I, capsules) * ceil_div(z.D_in, kOctet);
    items = {panels, batch_tiles, batch_tiles > 0 ? panels : 0};
    const int64_t resident = kBackwardBlocks * multiprocessors(), blocks = std::min(panels * batch_tiles, resident);
    const int64_t size = 2 * blocks * capsules * z.J * (kOctet * z.D_out + 1);
    const bool uneven = 100 * panels < kFullPercent * resident * ceil_div(panels, resident);
    if (uneven && batch_tiles > 1 && size * int64_t(sizeof(float)) <= kPartialPanelBytes)
      items.blocks = blocks, partial_panels = scratch.take<Real>(size);
    if (plan.tiles() > 1 && out.d_poses)
      poses_sum =
          plan.in.stored == Stored::real ? static_cast<Real*>(out.d_poses) : scratch.take<Real>(z.B * z.I * z.D_in);
  }
};

// What no sample adds to.
template <class Real>
void last_sweep_of_nothing(const Plan<Real>& plan, void* d_weight, Real* d_prior) {
  const int64_t matrices = plan.z.I * plan.z.J, number = plan.in.stored == Stored::real ? 4 : 2;
  if (d_weight) set_to_zero(d_weight, matrices * plan.z.D_out * plan.z.D_in * number, plan.stream);
  if (d_prior && !plan.in.prior_stride_b) set_to_zero(d_prior, matrices * 4, plan.stream);
}

void last_sweep_by_tiles(const Plan<float>& plan, const TileArguments& tile) {
  const int64_t rows = with_tile(plan.kind, [&]<class T>() { return int64_t(MatrixRows<T>::size) * 4; });
  const int64_t sums = 32 * 4 * plan.capsules * plan.rows;  // in the place of matrices and rows, which are read before
  const int64_t shared = std::max(plan.chunk_capsules() * (plan.matrix_bytes() + rows), sums);
  const Grid grid{tile.items.blocks, kTileThreads, shared};
  plan.with_form([&]<class In, bool TF32>() {
    launch_tile_gradients<In, TF32>(plan.kind, plan.plain(), grid, plan.stream, tile);
  });
  if (!tile.partial_panels) return;
  const int64_t blocks = tile.items.panels * split_blocks_of_panel(tile);
  launch(add_split_gradients<float>, {blocks, kVectorThreads, 0}, plan.stream, SplitArguments{tile, plan.in.stored},
         "add_split_gradients", plan.z);
}

template <class Real>
void last_sweep_in_general(const Plan<Real>& plan, GeneralArguments<Real> args) {
  const Sizes& z = plan.z;
  const bool weight = args.d_weight, shared = plan.in.stride_j == 0 && weight;
  const int64_t D_out = args.in.size.D_out, D = args.in.weight ? z.D_in : D_out, number = sizeof(Real);
  args.columns = weight ? std::clamp<int64_t>(kNumbersOfWarp / D_out, 1, z.D_in) : 0;
  const int64_t warps = z.I * (shared ? 1 : z.J) * (weight ? ceil_div(z.D_in, args.columns) : 1);
  plan.with_type([&]<class In>() {
    if (args.d_poses)
      launch(general_poses<Real, In>, plan.grid_of_warps(z.B * z.I, number * (D_out + D)), plan.stream, args,
             "general_poses", z);
    if (weight || args.d_prior)
      launch(general_weight<Real, In>, plan.grid_of_warps(warps, number * D_out * (1 + args.columns)), plan.stream,
             args, "general_weight", z);
  });
}

template <class Real>
void last_sweep(const Plan<Real>& plan, const Gradients<Real>& out, const LastSweepMemory<Real>& memory, const Real* V,
                const Real* ds, Real* stats) {
  const bool detach = plan.in.detach, by_tiles = plan.kind != TileKind::none;
  const int64_t first_t = detach ? plan.z.T - 1 : 0;
  void* const d_weight = plan.absorbed ? nullptr : out.d_weight;
  Real* const d_prior = detach ? nullptr : out.d_prior;
  if (!out.d_poses && !d_weight && !d_prior) return;
  if (plan.z.B == 0 && by_tiles) return last_sweep_of_nothing(plan, d_weight, d_prior);
  if constexpr (std::is_same_v<Real, float>) {
    if (by_tiles) {
      TileArguments tile = plan.tile_arguments();
      tile.V = V, tile.ds = ds, tile.stats = stats, tile.T = int(plan.z.T), tile.first_t = int(first_t);
      tile.detach = detach, tile.items = memory.items, tile.partial_panels = memory.partial_panels;
      tile.d_poses = out.d_poses, tile.d_weight = out.d_weight, tile.d_prior = d_prior;
      tile.d_poses_sum = memory.poses_sum;
      return last_sweep_by_tiles(plan, tile);
    }
  }
  GeneralArguments<Real> args = plan.general_arguments();
  args.V = V, args.ds = ds, args.stats = stats, args.first_t = first_t;
  args.d_poses = out.d_poses, args.d_weight = d_weight, args.d_prior = d_prior;
  last_sweep_in_general(plan, args);
}

template <class Real>
int64_t run_backward(const Routing<Real>& in, bool allow_tf32, const Gradients<Real>& out, Scratch scratch,
                     void* stream) {
  Plan<Real> plan(in, allow_tf32, kBackwardBlocks, stream);
  const Sizes& z = plan.z;
  const int64_t first = in.detach ? z.T - 1 : 0, absorbed_size = plan.absorbed ? z.B * z.J * z.D_in : 0;
  const bool absorbed_weight = plan.absorbed && out.d_weight;
  const int64_t matrix_rows = (z.T - first) * z.B,
                matrix_shares = std::clamp<int64_t>(matrix_rows / kRowsOfShare, 1, kShares);
  Real* const V = scratch.take<Real>(z.T * plan.stride_t);
  Real* const ds = scratch.take<Real>(z.T * plan.stride_t);
  Real* const dv = scratch.take<Real>(plan.N);
  Real* const stats = scratch.take<Real>(z.T * plan.stats_size());
  Real* const partial = scratch.take<Real>(plan.partial_size());
  Real* const V_poses = scratch.take<Real>(z.T * absorbed_size);
  Real* const ds_poses = scratch.take<Real>(z.T * absorbed_size);
  Real* const db_poses = scratch.take<Real>(z.T * absorbed_size);  // sum_i db poses
  Real* const c_poses = scratch.take<Real>(z.T * absorbed_size);   // sum_i c poses
  Real* const dV = scratch.take<Real>(plan.absorbed ? plan.N : 0);
  const int64_t matrix = (in.stride_j ? z.J : 1) * z.D_out * z.D_in;
  Real* const matrices = scratch.take<Real>(absorbed_weight ? matrix_shares * matrix : 0);
  const LastSweepMemory<Real> memory(plan, out, scratch);
  if (scratch.only_counted) return scratch.used;

  if (plan.padded()) {
    set_to_zero(V, z.T * plan.stride_t * sizeof(Real), plan.stream);
    set_to_zero(ds, z.T * plan.stride_t * sizeof(Real), plan.stream);
  }
  VectorArguments<Real> vectors = plan.vector_arguments();
  vectors.sums = out.sums, vectors.V_next = V, vectors.ds = ds, vectors.dv = dv, vectors.grad = out.grad;
  vectors.partial = plan.absorbed ? dV : partial, vectors.slices = plan.absorbed ? 1 : plan.slices;
  TileArguments tile = plan.tile_arguments();
  if constexpr (std::is_same_v<Real, float>) tile.V = V, tile.ds = ds, tile.stats = stats, tile.partial = partial;
  const bool persistent = !in.detach && plan.run_persistent(true, tile, vectors);
  if (!persistent) plan = plan.of_sweeps(true);
  if (!plan.absorbed) vectors.slices = plan.slices;
  if (!persistent) plan.per_warp(earlier_outputs<Real>, z.B * z.J, vectors, "earlier_outputs");
  if (plan.absorbed) plan.transform(V, z.T * z.B, true, V_poses);
  const Real* const seen_V = plan.absorbed ? V_poses : V;
  Real* const seen_ds = plan.absorbed ? ds_poses : ds;
  const int64_t seen_size = plan.absorbed ? absorbed_size : plan.stride_t;
  for (int64_t t = persistent ? 0 : z.T - 1; t >= first; --t) {
    if (!persistent)
      plan.per_block(squash_vectors_backward<Real>, backward_iteration(vectors, t), "squash_vectors_backward");
    if (plan.absorbed) plan.transform(ds + t * plan.stride_t, z.B, true, ds_poses + t * absorbed_size);
    const Real* const V_now = t > 0 ? seen_V + t * seen_size : nullptr;
    const Real* const ds_now = in.detach ? nullptr : seen_ds + t * seen_size;
    Real* const stats_now = stats + t * plan.stats_size();
    if (t > 0 && !in.detach) {
      plan.sweep(V_now, ds_now, stats_now, partial);
      if (plan.absorbed) {
        plan.sum(partial, plan.slices, absorbed_size, db_poses + t * absorbed_size, Stored::real);
        plan.transform(db_poses + t * absorbed_size, z.B, false, dV);
      }
    } else if (t > 0 || in.prior) {
      plan.sweep(V_now, ds_now, stats_now, nullptr);
    }
  }
  last_sweep(plan, out, memory, seen_V, static_cast<const Real*>(seen_ds), stats);
  if (absorbed_weight) {
    if (!in.detach) set_to_zero(db_poses, absorbed_size * sizeof(Real), plan.stream);  // V_0 is 0
    for (int64_t t = first; t < z.T; ++t) {
      plan.sweep(t > 0 ? seen_V + t * seen_size : nullptr, nullptr, nullptr, partial);
      plan.sum(partial, plan.slices, absorbed_size, c_poses + t * absorbed_size, Stored::real);
    }
    const MatrixGradientArguments<Real> product{ds + first * plan.stride_t,
                                                V + first * plan.stride_t,
                                                c_poses + first * absorbed_size,
                                                in.detach ? nullptr : db_poses,
                                                matrix_rows,
                                                z.J,
                                                z.D_out,
                                                z.D_in,
                                                matrix_shares,
                                                in.stride_j == 0,
                                                matrices};
    launch(matrix_gradient<Real>, {ceil_div(matrix_shares * matrix, kVectorThreads), kVectorThreads, 0}, plan.stream,
           product, "matrix_gradient", z);
    plan.sum(matrices, matrix_shares, matrix, out.d_weight, in.stored);
  }
  if (out.d_prior && in.detach) {
    const int64_t size = (in.prior_stride_b ? z.B : 1) * z.I * z.J;
    set_to_zero(out.d_prior, size * sizeof(Real), plan.stream);
  }
  if (out.d_bias) {
    vectors.ds = ds + first * plan.stride_t, vectors.T = int(z.T - first), vectors.d_bias = out.d_bias;
    plan.per_warp(bias_gradient<Real>, z.J * z.D_out, vectors, "bias_gradient");
  }
  return scratch.used;
}

}  // namespace

#ifndef FASTCAPS_EMULATED
const char* why_unavailable(int device) {
  int major = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  return major >= 8 ? nullptr : "its compute capability is below 8.0 (Ampere)";
}
#endif

template <class Real>
int64_t forward_scratch(const Routing<Real>& in) {
  return run_forward<Real>(in, false, nullptr, nullptr, Scratch{nullptr, true}, nullptr);
}
template <class Real>
int64_t backward_scratch(const Routing<Real>& in, const Gradients<Real>& out) {
  return run_backward<Real>(in, false, out, Scratch{nullptr, true}, nullptr);
}
template <class Real>
void forward(const Routing<Real>& in, bool allow_tf32, void* out, Real* sums, void* scratch, void* stream) {
  run_forward<Real>(in, allow_tf32, out, sums, Scratch{static_cast<char*>(scratch)}, stream);
}
template <class Real>
void backward(const Routing<Real>& in, bool allow_tf32, const Gradients<Real>& out, void* scratch, void* stream) {
  run_backward<Real>(in, allow_tf32, out, Scratch{static_cast<char*>(scratch)}, stream);
}

#define FASTCAPS_INSTANTIATE_CUDA(Real)                                            \
  template int64_t forward_scratch(const Routing<Real>&);                          \
  template int64_t backward_scratch(const Routing<Real>&, const Gradients<Real>&); \
  template void forward(const Routing<Real>&, bool, void*, Real*, void*, void*);   \
  template void backward(const Routing<Real>&, bool, const Gradients<Real>&, void*, void*);
FASTCAPS_INSTANTIATE_CUDA(float)
FASTCAPS_INSTANTIATE_CUDA(double)

}  // namespace fastcaps::cuda
