// Dynamic routing on NVIDIA GPUs: which kernels run, in what order, with how many blocks and how much memory.
//
// Forward, T times: a sweep over the input capsules (partial sums over slices of them), then their sum in a fixed
// order, the output, V. Backward, from the weighted sums alone: for t = T-1 .. 1 a sweep (partial dV) and ds of the
// iteration before, then the gradients from all iterations at once. With one matrix for all input capsules no vote is
// computed, as <W x, V> = <x, W^T V> and sum c W x = W sum c x: poses stand for votes, `transform` goes between.
#include <algorithm>
#include <type_traits>

#include "cuda/cuda_routing.h"
#include "cuda/plan.h"

namespace fastcaps::cuda {
namespace {

// ------------------------------------------------------------------------------------------------------------ forward

template <class Real>
int64_t run_forward(const Routing<Real>& in, bool allow_tf32, void* out, Real* sums, Scratch scratch, void* stream) {
  const Call<Real> call(in, allow_tf32, 3, stream);
  const Sizes& z = call.z;
  Real* const partial = scratch.take<Real>(call.partial_size());
  Real* const V = scratch.take<Real>(call.vectors);
  Real* const stats = call.tiles() > 1 ? scratch.take<Real>(call.stats_size()) : nullptr;
  const int64_t absorbed_size = call.absorbed ? z.B * z.J * z.D_in : 0;
  Real* const V_poses = scratch.take<Real>(absorbed_size);
  Real* const sum_poses = scratch.take<Real>(absorbed_size);
  Real* const sum = scratch.take<Real>(call.absorbed ? call.N : 0);
  if (scratch.only_counted) return scratch.used;

  if (call.padded()) set_to_zero(V, call.vectors * sizeof(Real), call.stream);
  VectorCall<Real> vectors = call.vector_call();
  vectors.partial = call.absorbed ? sum : partial, vectors.parts = call.absorbed ? 1 : call.slices;
  vectors.bias = in.bias, vectors.new_sums = sums, vectors.out = out, vectors.V_next = V;
  TileCall tile = call.tile_call();
  if constexpr (std::is_same_v<Real, float>) tile.V = V, tile.partial = partial;
  if (call.run_together(false, tile, vectors)) return scratch.used;
  for (int64_t t = 0; t < z.T; ++t) {
    if (call.absorbed) {
      if (t > 0) call.transform(V, z.B, true, V_poses);
      call.sweep(t > 0 ? V_poses : nullptr, nullptr, stats, partial);
      call.sum(partial, call.slices, absorbed_size, sum_poses, Stored::real);
      call.transform(sum_poses, z.B, false, sum);
    } else {
      call.sweep(t > 0 ? V : nullptr, nullptr, stats, partial);
    }
    call.per_block(squash_vectors<Real>, forward_iteration(vectors, t), "squash_vectors");
  }
  return scratch.used;
}

// ----------------------------------------------------------------------------------------------------------- backward

// The gradients of poses (or votes), of the weight unless absorbed, and of the prior; the last sweep. By tiles a group
// of input capsules for each block, or equal shares where that would leave much of the last wave of blocks empty.
template <class Real>
struct LastSweepMemory {
  Items items{};
  Real *parts = nullptr, *poses_sum = nullptr;

  LastSweepMemory(const Call<Real>& call, const Gradients<Real>& out, Scratch& scratch) {
    const Sizes& z = call.z;
    if (call.kind == TileKind::none) return;
    const int64_t capsules = call.chunk(), groups = pieces(z.I, capsules) * pieces(z.D_in, 8), tiles = pieces(z.B, 8);
    items = {groups, tiles, tiles > 0 ? groups : 0};
    const int64_t resident = 2 * multiprocessors(), blocks = std::min(groups * tiles, resident);
    const int64_t size = 2 * blocks * capsules * z.J * (8 * z.D_out + 1);
    const bool uneven = 10 * groups < 9 * resident * pieces(groups, resident);
    if (uneven && tiles > 1 && 4 * size <= 128 << 20) items.blocks = blocks, parts = scratch.take<Real>(size);
    if (call.tiles() > 1 && out.d_poses)
      poses_sum =
          call.in.stored == Stored::real ? static_cast<Real*>(out.d_poses) : scratch.take<Real>(z.B * z.I * z.D_in);
  }
};

template <class Real>
void last_sweep(const Call<Real>& call, const Gradients<Real>& out, const LastSweepMemory<Real>& memory, const Real* V,
                const Real* ds, Real* stats) {
  const Sizes& z = call.z;
  const Routing<Real>& in = call.in;
  const bool weight = out.d_weight && !call.absorbed;
  Real* const d_prior = in.detach ? nullptr : out.d_prior;
  if (!out.d_poses && !weight && !d_prior) return;
  if (z.B == 0 && call.kind != TileKind::none) {
    const int64_t matrices = z.I * z.J;
    if (weight)
      set_to_zero(out.d_weight, matrices * z.D_out * z.D_in * (in.stored == Stored::real ? 4 : 2), call.stream);
    if (d_prior && !in.prior_stride_b) set_to_zero(d_prior, matrices * 4, call.stream);
    return;
  }
  if constexpr (std::is_same_v<Real, float>) {
    if (call.kind != TileKind::none) {
      TileCall tile = call.tile_call();
      tile.V = V, tile.ds = ds, tile.stats = stats, tile.T = int(z.T), tile.first_t = in.detach ? int(z.T) - 1 : 0;
      tile.detach = in.detach, tile.items = memory.items, tile.parts = memory.parts;
      tile.d_poses = out.d_poses, tile.d_weight = out.d_weight, tile.d_poses_sum = memory.poses_sum,
      tile.d_prior = d_prior;
      const int64_t matrix = 4 * call.capsules * call.rows;  // bytes of one entry of its rows
      const int64_t rows = with_tile(call.kind, [&]<class T>() { return int64_t(Rows<T>::size) * 4; });
      const int64_t shared = std::max(call.chunk() * (call.matrix_bytes() + rows), 32 * matrix);
      const Grid grid{memory.items.blocks, kTileThreads, shared};
      call.with_form([&]<class In, bool TF32>() {
        launch_tile_gradients<In, TF32>(call.kind, call.plain(), grid, call.stream, tile);
      });
      if (memory.parts) {
        const int64_t blocks = memory.items.groups * split_blocks_of_group(tile);
        launch(add_split_gradients<Real>, {blocks, kVectorThreads, 0}, call.stream, SplitCall{tile, in.stored},
               "add_split_gradients", z);
      }
      return;
    }
  }
  AnyCall<Real> any = call.any_call();
  any.V = V, any.ds = ds, any.stats = stats, any.first_t = in.detach ? z.T - 1 : 0;
  any.d_poses = out.d_poses, any.d_weight = weight ? out.d_weight : nullptr, any.d_prior = d_prior;
  const int64_t D_out = any.in.size.D_out, D = any.in.weight ? z.D_in : D_out, number = sizeof(Real);
  any.columns = weight ? std::clamp<int64_t>(1024 / D_out, 1, z.D_in) : 0;
  const bool shared = in.stride_j == 0 && weight;
  const int64_t warps = z.I * (shared ? 1 : z.J) * (weight ? pieces(z.D_in, any.columns) : 1);
  call.with_type([&]<class In>() {
    if (out.d_poses)
      launch(any_poses<Real, In>, call.grid_of_warps(z.B * z.I, number * (D_out + D)), call.stream, any, "any_poses",
             z);
    if (weight || d_prior)
      launch(any_weight<Real, In>, call.grid_of_warps(warps, number * D_out * (1 + any.columns)), call.stream, any,
             "any_weight", z);
  });
}

template <class Real>
int64_t run_backward(const Routing<Real>& in, bool allow_tf32, const Gradients<Real>& out, Scratch scratch,
                     void* stream) {
  const Call<Real> call(in, allow_tf32, 2, stream);
  const Sizes& z = call.z;
  const int64_t first = in.detach ? z.T - 1 : 0, absorbed_size = call.absorbed ? z.B * z.J * z.D_in : 0;
  const bool absorbed_weight = call.absorbed && out.d_weight;
  const int64_t matrix_rows = (z.T - first) * z.B, matrix_parts = std::clamp<int64_t>(matrix_rows / 64, 1, 64);
  Real* const V = scratch.take<Real>(z.T * call.vectors);
  Real* const ds = scratch.take<Real>(z.T * call.vectors);
  Real* const dv = scratch.take<Real>(call.N);
  Real* const stats = scratch.take<Real>(z.T * call.stats_size());
  Real* const partial = scratch.take<Real>(call.partial_size());
  Real* const V_poses = scratch.take<Real>(z.T * absorbed_size);
  Real* const ds_poses = scratch.take<Real>(z.T * absorbed_size);
  Real* const db_poses = scratch.take<Real>(z.T * absorbed_size);  // sum_i db poses
  Real* const c_poses = scratch.take<Real>(z.T * absorbed_size);   // sum_i c poses
  Real* const dV = scratch.take<Real>(call.absorbed ? call.N : 0);
  const int64_t matrix = (in.stride_j ? z.J : 1) * z.D_out * z.D_in;
  Real* const matrices = scratch.take<Real>(absorbed_weight ? matrix_parts * matrix : 0);
  const LastSweepMemory<Real> memory(call, out, scratch);
  if (scratch.only_counted) return scratch.used;

  if (call.padded()) {
    set_to_zero(V, z.T * call.vectors * sizeof(Real), call.stream);
    set_to_zero(ds, z.T * call.vectors * sizeof(Real), call.stream);
  }
  VectorCall<Real> vectors = call.vector_call();
  vectors.sums = out.sums, vectors.V_next = V, vectors.ds = ds, vectors.dv = dv, vectors.grad = out.grad;
  vectors.partial = call.absorbed ? dV : partial, vectors.parts = call.absorbed ? 1 : call.slices;
  TileCall tile = call.tile_call();
  if constexpr (std::is_same_v<Real, float>) tile.V = V, tile.ds = ds, tile.stats = stats, tile.partial = partial;
  const bool together = !in.detach && call.run_together(true, tile, vectors);
  if (!together) call.per_warp(earlier_outputs<Real>, z.B * z.J, vectors, "earlier_outputs");
  if (call.absorbed) call.transform(V, z.T * z.B, true, V_poses);
  const Real* const seen_V = call.absorbed ? V_poses : V;
  Real* const seen_ds = call.absorbed ? ds_poses : ds;
  const int64_t seen_size = call.absorbed ? absorbed_size : call.vectors;
  for (int64_t t = together ? 0 : z.T - 1; t >= first; --t) {
    if (!together)
      call.per_block(squash_vectors_backward<Real>, backward_iteration(vectors, t), "squash_vectors_backward");
    if (call.absorbed) call.transform(ds + t * call.vectors, z.B, true, ds_poses + t * absorbed_size);
    const Real* const V_now = t > 0 ? seen_V + t * seen_size : nullptr;
    const Real* const ds_now = in.detach ? nullptr : seen_ds + t * seen_size;
    Real* const stats_now = stats + t * call.stats_size();
    if (t > 0 && !in.detach) {
      call.sweep(V_now, ds_now, stats_now, partial);
      if (call.absorbed) {
        call.sum(partial, call.slices, absorbed_size, db_poses + t * absorbed_size, Stored::real);
        call.transform(db_poses + t * absorbed_size, z.B, false, dV);
      }
    } else if (t > 0 || in.prior) {
      call.sweep(V_now, ds_now, stats_now, nullptr);
    }
  }
  last_sweep(call, out, memory, seen_V, static_cast<const Real*>(seen_ds), stats);
  if (absorbed_weight) {
    if (!in.detach) set_to_zero(db_poses, absorbed_size * sizeof(Real), call.stream);  // V_0 is 0
    for (int64_t t = first; t < z.T; ++t) {
      call.sweep(t > 0 ? seen_V + t * seen_size : nullptr, nullptr, nullptr, partial);
      call.sum(partial, call.slices, absorbed_size, c_poses + t * absorbed_size, Stored::real);
    }
    const MatrixCall<Real> product{ds + first * call.vectors,
                                   V + first * call.vectors,
                                   c_poses + first * absorbed_size,
                                   in.detach ? nullptr : db_poses,
                                   matrix_rows,
                                   z.J,
                                   z.D_out,
                                   z.D_in,
                                   matrix_parts,
                                   in.stride_j == 0,
                                   matrices};
    launch(matrix_gradient<Real>, {pieces(matrix_parts * matrix, kVectorThreads), kVectorThreads, 0}, call.stream,
           product, "matrix_gradient", z);
    call.sum(matrices, matrix_parts, matrix, out.d_weight, in.stored);
  }
  if (out.d_prior && in.detach) {
    const int64_t size = (in.prior_stride_b ? z.B : 1) * z.I * z.J;
    set_to_zero(out.d_prior, size * sizeof(Real), call.stream);
  }
  if (out.d_bias) {
    vectors.ds = ds + first * call.vectors, vectors.T = int(z.T - first), vectors.d_bias = out.d_bias;
    call.per_warp(bias_gradient<Real>, z.J * z.D_out, vectors, "bias_gradient");
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
