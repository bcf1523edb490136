// The smaller CUDA kernels: over the B * J output vectors of an iteration, and products of one matrix for all input
// capsules.
#pragma once

#include <cstdint>

#include "cuda/layout.h"
#include "cuda/platform.h"
#include "numbers.h"
#include "routing.h"

namespace fastcaps::cuda {

constexpr int kVectorThreads = 256;

// Which output capsules a warp's tile holds; `none`: vectors lie as in a tensor [B, J, D_out].
enum class TileKind { none, capsules8, capsules10, capsules5 };

// Calls body.operator()<Tile>() with the type of a kind that is not `none`.
template <class Body>
FASTCAPS_INDEX auto with_tile(TileKind kind, Body&& body) {
  if (kind == TileKind::capsules8) return body.template operator()<Tile<8, 16>>();
  if (kind == TileKind::capsules10) return body.template operator()<Tile<10, 16>>();
  return body.template operator()<Tile<5, 32>>();
}

template <class Real>
struct VectorArguments {
  TileKind kind;  // how V, ds and partial lie
  int64_t B, J, D_out;
  int T;  // iterations, where all are wanted
  int64_t slices;
  const Real* partial;  // [slices, stride_t], at `place`
  const Real* bias;     // [J, D_out], or null
  const void* grad;     // [B, J, D_out], the incoming gradient, or null
  Stored stored;        // of grad and out
  Real eps;
  const Real* sums;   // [B, J, D_out], or [T, B, J, D_out]
  Real* new_sums;     // the same, written
  const Real* V;      // earlier outputs, or null: none
  Real *V_next, *ds;  // written, or null
  Real* dv;           // [B, J, D_out], the sum of later dV; read if `more`, written
  bool more;
  void* out;  // [B, J, D_out], or null
  Real* d_bias;
  int64_t stride_t;  // from V or ds of one iteration, or one slice, to the next
};

template <class Real>
__device__ inline int64_t place(const VectorArguments<Real>& args, int64_t row, int64_t e) {
  if (args.kind == TileKind::none) return row * args.D_out + e;
  const int b = int(row / args.J), j = int(row - b * args.J);
  return with_tile(args.kind, [&]<class T>() { return T::place(int(args.J), b, j, int(e)); });
}

template <class Real>
__device__ inline Real read(const void* from, Stored stored, int64_t at) {
  if (stored == Stored::bfloat16) return widen(static_cast<const bfloat16*>(from)[at]);
  if (stored == Stored::float16) return widen(static_cast<const float16*>(from)[at]);
  return static_cast<const Real*>(from)[at];
}
template <class Real>
__device__ inline void write(Real x, void* to, Stored stored, int64_t at) {
  if (stored == Stored::bfloat16)
    narrow(float(x), static_cast<bfloat16*>(to)[at]);
  else if (stored == Stored::float16)
    narrow(float(x), static_cast<float16*>(to)[at]);
  else
    static_cast<Real*>(to)[at] = x;
}

// squash(s) / s for |s|^2 = q.
template <class Real>
__device__ inline Real squash_scale(Real q, Real eps) {
  return eps > 0 ? q / (1 + q) / sqrt(q + eps) : sqrt(q) / (1 + q);
}

// A set of vectors is what a block takes at a time: some where they are short; by tiles, kSetSamples samples of an
// output capsule, whose sums lie in whole sectors of 32 bytes (the forward of the paper's layer: 42 us less).
constexpr int kSetSamples = 4;
constexpr int kSetNumbers = 64;  // whose sums over the slices a block takes at a time, about
FASTCAPS_INDEX int64_t set_rows(TileKind kind, int64_t D_out) {
  return kind != TileKind::none ? kSetSamples : D_out < kSetNumbers ? kSetNumbers / D_out : 1;
}
template <class Real>
FASTCAPS_INDEX int64_t count_sets(const VectorArguments<Real>& args) {
  if (args.kind != TileKind::none) return ceil_div(args.B, kSetSamples) * args.J;
  return ceil_div(args.B * args.J, set_rows(args.kind, args.D_out));
}
constexpr int kSums = 8;  // of every eighth slice, which warps take side by side
// Numbers in shared memory that a block needs for a set.
FASTCAPS_INDEX int64_t vector_memory(TileKind kind, int64_t D_out) {
  return set_rows(kind, D_out) * D_out + kSums * kSetNumbers;
}

// Its vectors n < rows, and its numbers in the order in which they lie in memory.
template <class Real>
struct VectorSet {
  const VectorArguments<Real>& args;
  const bool tiles = args.kind != TileKind::none;
  const int64_t rows = set_rows(args.kind, args.D_out);
  const int64_t first;  // vector or, by tiles, sample
  const int j;          // by tiles, all samples' output capsule

  __device__ VectorSet(const VectorArguments<Real>& args_, int64_t set)
      : args(args_),
        first(tiles ? int64_t(uint32_t(set) / uint32_t(args_.J)) * kSetSamples
                    : set * rows),  // no more sets than blocks
        j(tiles ? int(set - first / kSetSamples * args_.J) : 0) {}
  __device__ bool has(int64_t n) const { return first + n < (tiles ? args.B : args.B * args.J); }
  __device__ int64_t row(int64_t n) const { return tiles ? (first + n) * args.J + j : first + n; }
  __device__ int64_t capsule(int64_t n) const { return tiles ? j : (first + n) % args.J; }
  __device__ int64_t place(int64_t n, int64_t e) const {
    if (!tiles) return (first + n) * args.D_out + e;
    return with_tile(args.kind, [&]<class T>() { return T::place(int(args.J), int(first + n), j, int(e)); });
  }

  __device__ int64_t numbers() const {
    return tiles ? with_tile(args.kind, [&]<class T>() { return kSetSamples * T::D; }) : rows * args.D_out;
  }
  // Of number m: where it lies in a partial sum, and its place among rows * D_out.
  static constexpr int64_t kNowhere = -1;  // there is no such number
  __device__ int64_t in_partial(int64_t m) const {
    if (!tiles) return m < numbers() && m < (args.B * args.J - first) * args.D_out ? first * args.D_out + m : kNowhere;
    return m < numbers() && entry(m) < args.D_out && has(sample(m)) ? place(sample(m), entry(m)) : kNowhere;
  }
  __device__ int64_t in_set(int64_t m) const {
    if (!tiles) return m < numbers() ? m : kNowhere;
    return m < numbers() && entry(m) < args.D_out ? sample(m) * args.D_out + entry(m) : kNowhere;
  }
  // By tiles: four lanes' registers of an instruction, two samples and two entries each, are eight numbers in a row.
  static __device__ int sample(int64_t m) { return int(m) % 8 / 4 * 2 + int(m) % 2; }
  static __device__ int entry(int64_t m) { return int(m) / 8 * 2 + int(m) % 4 / 2; }
};

// Every eighth slice from `slice` on, COUNT of them, which are on their way at a time.
template <int COUNT, class Real>
__device__ inline void add_slices(Real (&both)[2], const VectorArguments<Real>& args, const int64_t (&at)[2],
                                  int64_t slice) {
  Real x[COUNT][2];
#pragma unroll
  for (int k = 0; k < COUNT; ++k)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool there = slice + k * kSums < args.slices && at[half] >= 0;
      x[k][half] = there ? args.partial[(slice + k * kSums) * args.stride_t + at[half]] : 0;
    }
#pragma unroll
  for (int k = 0; k < COUNT; ++k) both[0] += x[k][0], both[1] += x[k][1];
}

// The sums over the slices of a set's numbers, always in the same order: eight sums of every eighth slice first.
template <int THREADS, class Real>
__device__ inline void sum_slices(Real* total, Real* sums, const VectorSet<Real>& set) {
  const VectorArguments<Real>& args = set.args;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int64_t begin = 0; begin < set.numbers(); begin += kSetNumbers) {
    const int64_t at[2] = {set.in_partial(begin + lane), set.in_partial(begin + lane + 32)};
    for (int n = warp; n < kSums; n += THREADS / 32) {
      Real both[2] = {0, 0};
      int64_t slice = n;
      for (; slice + 7 * kSums < args.slices; slice += 8 * kSums) add_slices<8>(both, args, at, slice);
      for (; slice < args.slices; slice += 4 * kSums) add_slices<4>(both, args, at, slice);
      sums[n * kSetNumbers + lane] = both[0], sums[n * kSetNumbers + lane + 32] = both[1];
    }
    __syncthreads();
    const int64_t to = threadIdx.x < kSetNumbers ? set.in_set(begin + threadIdx.x) : VectorSet<Real>::kNowhere;
    if (to >= 0) {
      Real sum = 0;
      for (int n = 0; n < kSums; ++n) sum += sums[n * kSetNumbers + threadIdx.x];
      total[to] = sum;
    }
    __syncthreads();
  }
}

// Of the arguments for all iterations, those of one. Forward: s = bias + the sum of the slices becomes the output and,
// before the last iteration, V. Backward: from the incoming gradient or the sum of later dV, ds.
template <class Real>
FASTCAPS_INDEX VectorArguments<Real> forward_iteration(VectorArguments<Real> args, int64_t t) {
  const bool last = t == args.T - 1;
  args.new_sums += t * args.B * args.J * args.D_out;
  args.V = t > 0 ? args.V_next : nullptr;
  if (last) args.V_next = nullptr;
  if (!last) args.out = nullptr;
  return args;
}
template <class Real>
FASTCAPS_INDEX VectorArguments<Real> backward_iteration(VectorArguments<Real> args, int64_t t) {
  args.sums += t * args.B * args.J * args.D_out;
  args.ds += t * args.stride_t;
  if (t < args.T - 1) args.grad = nullptr;
  args.more = t < args.T - 2;
  return args;
}

// s = bias + the sum of the slices, and what an iteration leaves to the next one or to the caller.
template <int THREADS, class Real>
__device__ inline void squash_rows(const VectorArguments<Real>& args, int64_t set_number, Real* total) {
  const int lane = threadIdx.x % 32;
  const VectorSet<Real> set(args, set_number);
  sum_slices<THREADS>(total, total + set.rows * args.D_out, set);
  for (int64_t n = threadIdx.x / 32; n < set.rows && set.has(n); n += THREADS / 32) {
    const int64_t at = set.row(n) * args.D_out;
    Real* const s = total + n * args.D_out;
    Real q = 0;
    for (int64_t e = lane; e < args.D_out; e += 32) {
      if (args.bias) s[e] += args.bias[set.capsule(n) * args.D_out + e];
      args.new_sums[at + e] = s[e];
      q = fma(s[e], s[e], q);
    }
    const Real scale = squash_scale(sum_over_warp(q), args.eps);
    for (int64_t e = lane; e < args.D_out; e += 32) {
      const Real v = scale * s[e];
      if (args.out) write(v, args.out, args.stored, at + e);
      if (args.V_next) {
        const int64_t to = set.place(n, e);
        args.V_next[to] = fma(kLog2e<Real>, v, args.V ? args.V[to] : 0);
      }
    }
  }
}

template <class Real>
__global__ void __launch_bounds__(kVectorThreads) squash_vectors(VectorArguments<Real> args) {
  squash_rows<kVectorThreads>(args, blockIdx.x, shared_memory<Real>());
}

// ds = squash'(s)^T dv, dv the incoming gradient or the sum over later iterations' dV.
template <int THREADS, class Real>
__device__ inline void squash_rows_backward(const VectorArguments<Real>& args, int64_t set_number, Real* total) {
  const int lane = threadIdx.x % 32;
  const VectorSet<Real> set(args, set_number);
  if (!args.grad) sum_slices<THREADS>(total, total + set.rows * args.D_out, set);
  for (int64_t n = threadIdx.x / 32; n < set.rows && set.has(n); n += THREADS / 32) {
    const int64_t at = set.row(n) * args.D_out;
    Real* const d = total + n * args.D_out;
    Real q = 0, along = 0;
    for (int64_t e = lane; e < args.D_out; e += 32) {
      if (args.grad)
        d[e] = read<Real>(args.grad, args.stored, at + e);
      else
        args.dv[at + e] = d[e] += args.more ? args.dv[at + e] : 0;
      q = fma(args.sums[at + e], args.sums[at + e], q);
    }
    q = sum_over_warp(q);
    // d and a multiple of its slice along s; in terms of the direction nothing overflows before q does.
    const Real inverse = q == 0 ? 1 : 1 / sqrt(q);
    for (int64_t e = lane; e < args.D_out; e += 32) along = fma(args.sums[at + e] * inverse, d[e], along);
    along = sum_over_warp(along) * (args.eps > 0 ? 2 / (1 + q) - q / (q + args.eps) : (1 - q) / (1 + q));
    const Real scale = squash_scale(q, args.eps);
    for (int64_t e = lane; e < args.D_out; e += 32)
      args.ds[set.place(n, e)] = scale * fma(along, args.sums[at + e] * inverse, d[e]);
  }
}

template <class Real>
__global__ void __launch_bounds__(kVectorThreads) squash_vectors_backward(VectorArguments<Real> args) {
  squash_rows_backward<kVectorThreads>(args, blockIdx.x, shared_memory<Real>());
}

// log2(e) V_t, V_t = v_0 + ... + v_{t-1}, of all iterations, from the weighted sums; a warp takes a row.
template <class Real>
__device__ inline void earlier_outputs_of_row(const VectorArguments<Real>& args, int64_t row) {
  const int lane = threadIdx.x % 32;
  const int64_t N = args.B * args.J;
  for (int t = 0; t < args.T; ++t) {
    const Real* const s = args.sums + (t * N + row) * args.D_out;
    const Real* const before = args.V_next + (t - 1) * args.stride_t;
    Real q = 0;
    // V_t needs v_{t-1}: s of the iteration before.
    const Real* const last = s - N * args.D_out;
    for (int64_t e = lane; t > 0 && e < args.D_out; e += 32) q = fma(last[e], last[e], q);
    const Real scale = kLog2e<Real> * squash_scale(sum_over_warp(q), args.eps);
    for (int64_t e = lane; e < args.D_out; e += 32) {
      const int64_t at = place(args, row, e);
      args.V_next[t * args.stride_t + at] = t > 0 ? fma(scale, last[e], before[at]) : 0;
    }
  }
}
template <class Real>
__global__ void __launch_bounds__(kVectorThreads) earlier_outputs(VectorArguments<Real> args) {
  const int64_t row = (int64_t(blockIdx.x) * kVectorThreads + threadIdx.x) / 32;
  if (row < args.B * args.J) earlier_outputs_of_row(args, row);
}

// sum_b of ds of the iterations, a warp for each (j, e).
template <class Real>
__global__ void __launch_bounds__(kVectorThreads) bias_gradient(VectorArguments<Real> args) {
  const int64_t n = (int64_t(blockIdx.x) * kVectorThreads + threadIdx.x) / 32, j = n / args.D_out, e = n % args.D_out;
  if (j >= args.J) return;
  Real sum = 0;
  for (int t = 0; t < args.T; ++t)
    for (int64_t b = threadIdx.x % 32; b < args.B; b += 32)
      sum += args.ds[t * args.stride_t + place(args, b * args.J + j, e)];
  sum = sum_over_warp(sum);
  if (threadIdx.x % 32 == 0) args.d_bias[n] = sum;
}

// out[n] = sum over partials of x[partial, n], rounded to how `out` is stored.
template <class Real>
struct SumArguments {
  const Real* x;
  void* out;
  Stored stored;
  int64_t partials, size;
};
template <class Real>
__global__ void __launch_bounds__(kVectorThreads) add_partials(SumArguments<Real> args) {
  const int64_t n = int64_t(blockIdx.x) * kVectorThreads + threadIdx.x;
  if (n >= args.size) return;
  Real sum = 0;
  for (int64_t partial = 0; partial < args.partials; ++partial) sum += args.x[partial * args.size + n];
  write(sum, args.out, args.stored, n);
}

// One matrix for all input capsules: out[row, j, l] = sum_n x[row, j, n] w[j, n, l], w with strides, 0 where shared.
template <class Real>
struct TransformArguments {
  const Real* x;
  const void* w;
  Stored stored;
  int64_t rows, J, N, L, stride_j, stride_n, stride_l;
  Real* out;
};
template <class Real>
__global__ void __launch_bounds__(kVectorThreads) transform_vectors(TransformArguments<Real> args) {
  const int64_t n = int64_t(blockIdx.x) * kVectorThreads + threadIdx.x, row = n / args.L, l = n % args.L;
  if (row >= args.rows * args.J) return;
  const int64_t w = row % args.J * args.stride_j + l * args.stride_l;
  Real sum = 0;
  for (int64_t m = 0; m < args.N; ++m)
    sum = fma(args.x[row * args.N + m], read<Real>(args.w, args.stored, w + m * args.stride_n), sum);
  args.out[n] = sum;
}

// Its gradient, in shares of the samples and iterations: sum of ds c_x^T + ln2 V db_x^T, c_x and db_x being sum_i c
// poses and sum_i db poses, [count, B, J, D_in].
template <class Real>
struct MatrixGradientArguments {
  const Real *ds, *V, *c_poses, *db_poses;  // the last is null where coupling is constant
  int64_t rows, J, D_out, D_in, shares;     // rows: iterations times samples
  bool one_for_all;                         // one matrix for all output capsules, too
  Real* out;                                // [shares, J or 1, D_out, D_in]
};
template <class Real>
__global__ void __launch_bounds__(kVectorThreads) matrix_gradient(MatrixGradientArguments<Real> args) {
  const int64_t matrices = args.one_for_all ? 1 : args.J, n = int64_t(blockIdx.x) * kVectorThreads + threadIdx.x;
  const int64_t d = n % args.D_in, e = n / args.D_in % args.D_out, matrix = n / args.D_in / args.D_out % matrices;
  const int64_t share = n / args.D_in / args.D_out / matrices;
  if (share >= args.shares) return;
  Real sum = 0;
  for (int64_t row = share_begin(args.rows, args.shares, share); row < share_begin(args.rows, args.shares, share + 1);
       ++row)
    for (int64_t j = matrix; j < (args.one_for_all ? args.J : matrix + 1); ++j) {
      const int64_t left = (row * args.J + j) * args.D_out + e, right = (row * args.J + j) * args.D_in + d;
      sum = fma(args.ds[left], args.c_poses[right], sum);
      if (args.db_poses) sum = fma(kLn2<Real> * args.V[left], args.db_poses[right], sum);
    }
  args.out[n] = sum;
}

}  // namespace fastcaps::cuda
