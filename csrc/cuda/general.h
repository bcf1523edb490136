// Dynamic routing on NVIDIA GPUs for any size and type, float64 too: a warp per vote vector, no tensor cores.
//
// For what the tiles of cuda/tiles.h do not hold, votes that are given and one matrix for all input
// capsules among it. Votes are computed wherever they are needed. Letters and statistics are as in that file.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/layout.h"
#include "cuda/platform.h"
#include "numbers.h"
#include "routing.h"

namespace fastcaps::cuda {

constexpr int kGeneralWarps = 4;  // of a block, at most

template <class Real>
struct GeneralArguments {
  Routing<Real> in;
  const Real* V;   // [B, J, D_out], log2(e) times the sum of earlier outputs, or null: 0
  const Real* ds;  // [B, J, D_out], or null: the forward
  Real* stats;     // [3, I, B], or null where nobody wants them
  Real* partial;   // [slices, B, J, D_out], or null where only statistics are wanted
  int64_t slices;
  bool in_shared_memory;  // whether sums fit there
  // Of the gradients only: V and ds are [T, B, J, D_out], stats [T, 3, I, B].
  int64_t first_t, columns;  // columns of a matrix that a warp sums up at a time
  void* d_poses;
  void* d_weight;
  Real* d_prior;  // [I, J] or [B, I, J]
};

template <class Real>
__device__ inline bool masked(const Routing<Real>& in, int64_t b, int64_t i) {
  return in.mask && !in.mask[b * in.size.I + i];
}

// Entry e of the vote of input capsule i of sample b for output capsule j.
template <class Real, class In>
__device__ inline Real vote(const Routing<Real>& in, int64_t b, int64_t i, int64_t j, int64_t e) {
  const bool hidden = masked(in, b, i);  // a pose that counts as 0, whatever it holds
  const int64_t row = b * in.size.I + i;
  const In* poses = static_cast<const In*>(in.poses);
  if (!in.weight)
    return hidden ? Real(0) : widen(poses[row * (in.stride_j ? in.size.J : 1) * in.size.D_out + j * in.stride_j + e]);
  const In* w = static_cast<const In*>(in.weight) + i * in.stride_i + j * in.stride_j + e * in.size.D_in;
  const In* x = poses + row * in.size.D_in;
  Real sum = 0;
  for (int64_t d = 0; d < in.size.D_in; ++d) sum = fma(Real(widen(w[d])), hidden ? Real(0) : Real(widen(x[d])), sum);
  return sum;
}

// The logit and, where there is ds, dc: of one vote, in all lanes.
template <class Real, class In>
__device__ inline void agreement(Real& logit, Real& dc, const Routing<Real>& in, const Real* V, const Real* ds,
                                 int64_t b, int64_t i, int64_t j) {
  const int64_t at = (b * in.size.J + j) * in.size.D_out;
  logit = dc = 0;
  for (int64_t e = threadIdx.x % 32; (V || ds) && e < in.size.D_out; e += 32) {
    const Real u = vote<Real, In>(in, b, i, j, e);
    if (V) logit = fma(u, V[at + e], logit);
    if (ds) dc = fma(u, ds[at + e], dc);
  }
  logit = sum_over_warp(logit), dc = sum_over_warp(dc);
  if (in.prior && !masked(in, b, i))  // a finite prior stays finite: -inf alone closes a route
    logit = fma_towards_zero(kLog2e<Real>, in.prior[b * in.prior_stride_b + i * in.size.J + j], logit);
}

// Warp: (slice of the input capsules, sample). Sums of c u or, where there is ds, of c (dc - sum_j c dc) u, which is
// dV.
template <class Real, class In>
__global__ void __launch_bounds__(32 * kGeneralWarps) general_sweep(GeneralArguments<Real> args) {
  const Routing<Real>& in = args.in;
  const Sizes& z = in.size;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t index = int64_t(blockIdx.x) * (blockDim.x / 32) + warp, slice = index / z.B, b = index % z.B,
                N = z.J * z.D_out;
  if (slice >= args.slices) return;
  const bool uniform = !args.V && !in.prior && !args.ds;
  Real* const partial = args.partial ? args.partial + (slice * z.B + b) * N : nullptr;
  Real* const sums = args.in_shared_memory ? shared_memory<Real>() + warp * N : partial;
  for (int64_t j = 0; args.partial && j < z.J; ++j)
    for (int64_t e = lane; e < z.D_out; e += 32) sums[j * z.D_out + e] = 0;
  const int64_t end = share_begin(z.I, args.slices, slice + 1), size = z.I * z.B;
  for (int64_t i = share_begin(z.I, args.slices, slice); i < end; ++i) {
    Real top = in.leaky ? 0 : kLeastLogit<Real>, sum = in.leaky ? 1 : kLeastShare<Real>, weighted = 0, logit, dc;
    for (int64_t j = 0; !uniform && j < z.J; ++j) {
      agreement<Real, In>(logit, dc, in, args.V, args.ds, b, i, j);
      const Real next = fmax(top, logit);
      const Real before = power_of_two(top - next), now = power_of_two(logit - next);
      sum = sum * before + now, weighted = weighted * before + now * dc, top = next;
    }
    const Real scale = uniform ? Real(1) / (z.J + in.leaky) : 1 / sum;
    if (args.stats && lane == 0) {
      Real* to = args.stats + i * z.B + b;
      to[0] = top, to[size] = log_of_two(sum), to[2 * size] = weighted * scale;
    }
    for (int64_t j = 0; args.partial && j < z.J; ++j) {
      Real factor = scale;
      if (!uniform) {
        agreement<Real, In>(logit, dc, in, args.V, args.ds, b, i, j);
        factor *= power_of_two(logit - top);
        if (args.ds) factor *= dc - weighted * scale;
      }
      for (int64_t e = lane; e < z.D_out; e += 32)
        sums[j * z.D_out + e] = fma(factor, vote<Real, In>(in, b, i, j, e), sums[j * z.D_out + e]);
    }
  }
  for (int64_t j = 0; args.in_shared_memory && j < z.J; ++j)
    for (int64_t e = lane; e < z.D_out; e += 32) partial[j * z.D_out + e] = sums[j * z.D_out + e];
}

// du of one vote into du[D_out], each lane its entries; returns sum_t db_t.
template <class Real, class In>
__device__ inline Real vote_gradient(Real* du, const GeneralArguments<Real>& args, int64_t b, int64_t i, int64_t j) {
  const Sizes& z = args.in.size;
  const int lane = threadIdx.x % 32;
  const int64_t at = (b * z.J + j) * z.D_out, stride_t = z.B * z.J * z.D_out, size = z.I * z.B;
  Real d_prior = 0;
  for (int64_t e = lane; e < z.D_out; e += 32) du[e] = 0;
  for (int64_t t = args.first_t; t < z.T; ++t) {
    const Real* const V = t > 0 ? args.V + t * stride_t : nullptr;
    const Real* const ds = args.ds + t * stride_t;
    Real c = Real(1) / (z.J + args.in.leaky), db = 0;
    if (V || args.in.prior) {
      Real logit, dc;
      agreement<Real, In>(logit, dc, args.in, V, args.in.detach ? nullptr : ds, b, i, j);
      const Real* stats = args.stats + 3 * t * size + i * z.B + b;
      const Real exponent = logit - stats[0] - stats[size];
      c = power_of_two(exponent > 0 ? 0 : exponent);
      if (!args.in.detach) db = c * (dc - stats[2 * size]);
    }
    d_prior += db;
    for (int64_t e = lane; e < z.D_out; e += 32) {
      du[e] = fma(c, ds[at + e], du[e]);
      if (V) du[e] = fma(kLn2<Real> * db, V[at + e], du[e]);
    }
  }
  return d_prior;
}

// Warp: (sample, input capsule), the gradient of its pose or of its votes.
template <class Real, class In>
__global__ void __launch_bounds__(32 * kGeneralWarps) general_poses(GeneralArguments<Real> args) {
  const Routing<Real>& in = args.in;
  const Sizes& z = in.size;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t row = int64_t(blockIdx.x) * (blockDim.x / 32) + warp, b = row / z.I, i = row % z.I;
  if (b >= z.B) return;
  const int64_t D = in.weight ? z.D_in : z.D_out;
  const bool added = in.weight || in.stride_j == 0, hidden = masked(in, b, i);
  Real* const du = shared_memory<Real>() + warp * (z.D_out + D);
  Real* const sum = du + z.D_out;
  In* const to = static_cast<In*>(args.d_poses) + row * D * (added ? 1 : z.J);
  for (int64_t d = lane; d < D; d += 32) sum[d] = 0;
  for (int64_t j = 0; j < z.J; ++j) {
    vote_gradient<Real, In>(du, args, b, i, j);
    __syncwarp();
    if (in.weight) {
      const In* w = static_cast<const In*>(in.weight) + i * in.stride_i + j * in.stride_j;
      for (int64_t d = lane; d < D; d += 32)
        for (int64_t e = 0; e < z.D_out; ++e) sum[d] = fma(Real(widen(w[e * D + d])), du[e], sum[d]);
    } else {
      for (int64_t e = lane; e < D; e += 32) {
        if (added)
          sum[e] += du[e];
        else
          narrow(hidden ? Real(0) : du[e], to[j * D + e]);
      }
    }
    __syncwarp();
  }
  for (int64_t d = lane; added && d < D; d += 32) narrow(hidden ? Real(0) : sum[d], to[d]);
}

// Warp: (input capsule, output capsule or all of them where they share a matrix, some columns), the gradient of its
// matrix over all samples, and of the prior.
template <class Real, class In>
__global__ void __launch_bounds__(32 * kGeneralWarps) general_weight(GeneralArguments<Real> args) {
  const Routing<Real>& in = args.in;
  const Sizes& z = in.size;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const bool shared = in.stride_j == 0 && z.J > 1 && args.d_weight;
  const int64_t panels = args.d_weight ? ceil_div(z.D_in, args.columns) : 1, matrices = shared ? 1 : z.J;
  const int64_t index = int64_t(blockIdx.x) * (blockDim.x / 32) + warp, panel = index % panels,
                i = index / panels / matrices;
  if (i >= z.I) return;
  const int64_t first_j = index / panels % matrices, first_d = panel * args.columns;
  const int64_t N = args.d_weight ? z.D_out * args.columns : 0;
  Real* const du = shared_memory<Real>() + warp * (z.D_out + N);
  Real* const sum = du + z.D_out;
  for (int64_t n = lane; n < N; n += 32) sum[n] = 0;
  for (int64_t j = first_j; j < (shared ? z.J : first_j + 1); ++j) {
    Real d_prior = 0;
    for (int64_t b = 0; b < z.B; ++b) {
      const bool hidden = masked(in, b, i);
      const Real all = vote_gradient<Real, In>(du, args, b, i, j), db = hidden ? 0 : all;
      d_prior += db;
      if (args.d_prior && in.prior_stride_b && panel == 0 && lane == 0) args.d_prior[(b * z.I + i) * z.J + j] = db;
      __syncwarp();
      const In* x = static_cast<const In*>(in.poses) + (b * z.I + i) * z.D_in + first_d;
      for (int64_t n = lane; n < N; n += 32) {
        const int64_t d = n % args.columns;
        if (first_d + d < z.D_in) sum[n] = fma(du[n / args.columns], hidden ? Real(0) : Real(widen(x[d])), sum[n]);
      }
      __syncwarp();
    }
    if (args.d_prior && !in.prior_stride_b && panel == 0 && lane == 0) args.d_prior[i * z.J + j] = d_prior;
  }
  In* const to = static_cast<In*>(args.d_weight) + (i * matrices + first_j) * z.D_out * z.D_in + first_d;
  for (int64_t n = lane; n < N; n += 32) {
    const int64_t e = n / args.columns, d = n % args.columns;
    if (first_d + d < z.D_in) narrow(sum[n], to[e * z.D_in + d]);
  }
}

}  // namespace fastcaps::cuda
