// The smaller CUDA kernels: over the B * J vectors of an iteration, and the products of one matrix for all input
// capsules.
#pragma once

#include "cuda/layout.h"
#include "cuda/platform.h"
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
struct VectorCall {
  TileKind kind;  // how V, ds and partial lie
  int64_t B, J, D_out;
  int T;  // iterations, where all are wanted
  int64_t parts;
  const Real* partial;  // [parts, stride_t], at `place`
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
  int64_t stride_t;  // from V or ds of one iteration, or one part, to the next
};

template <class Real>
__device__ inline int64_t place(const VectorCall<Real>& call, int64_t row, int64_t e) {
  if (call.kind == TileKind::none) return row * call.D_out + e;
  const int b = int(row / call.J), j = int(row - b * call.J);
  return with_tile(call.kind, [&]<class T>() { return T::place(int(call.J), b, j, int(e)); });
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

// A group of vectors is what a block takes at a time: some where they are short; by tiles, four samples of an output
// capsule, whose sums lie in whole sectors of 32 bytes.
FASTCAPS_INDEX int64_t rows_of_group(TileKind kind, int64_t D_out) {
  return kind != TileKind::none ? 4 : D_out < 64 ? 64 / D_out : 1;
}
template <class Real>
FASTCAPS_INDEX int64_t groups_of_rows(const VectorCall<Real>& call) {
  if (call.kind != TileKind::none) return pieces(call.B, 4) * call.J;
  return pieces(call.B * call.J, rows_of_group(call.kind, call.D_out));
}
// Numbers in shared memory that a block needs for a group.
constexpr int kSums = 8;
FASTCAPS_INDEX int64_t vector_memory(TileKind kind, int64_t D_out) {
  return rows_of_group(kind, D_out) * D_out + kSums * 64;
}

// Its vectors n < rows, and its numbers in the order in which they lie in memory.
template <class Real>
struct Group {
  const VectorCall<Real>& call;
  const bool tiles = call.kind != TileKind::none;
  const int64_t rows = rows_of_group(call.kind, call.D_out);
  const int64_t first;  // vector or, by tiles, sample
  const int j;          // by tiles, all samples' output capsule

  __device__ Group(const VectorCall<Real>& call_, int64_t group)
      : call(call_),
        first(tiles ? int64_t(uint32_t(group) / uint32_t(call_.J)) * 4 : group * rows),  // no more groups than blocks
        j(tiles ? int(group - first / 4 * call_.J) : 0) {}
  __device__ bool has(int64_t n) const { return first + n < (tiles ? call.B : call.B * call.J); }
  __device__ int64_t row(int64_t n) const { return tiles ? (first + n) * call.J + j : first + n; }
  __device__ int64_t capsule(int64_t n) const { return tiles ? j : (first + n) % call.J; }
  __device__ int64_t place(int64_t n, int64_t e) const {
    if (!tiles) return (first + n) * call.D_out + e;
    return with_tile(call.kind, [&]<class T>() { return T::place(int(call.J), int(first + n), j, int(e)); });
  }

  __device__ int64_t numbers() const {
    return tiles ? with_tile(call.kind, [&]<class T>() { return 4 * T::D; }) : rows * call.D_out;
  }
  // Of number m: where it lies in a part, and its place among rows * D_out; -1 where there is none.
  __device__ int64_t in_part(int64_t m) const {
    if (!tiles) return m < numbers() && m < (call.B * call.J - first) * call.D_out ? first * call.D_out + m : -1;
    return m < numbers() && entry(m) < call.D_out && has(sample(m)) ? place(sample(m), entry(m)) : -1;
  }
  __device__ int64_t in_group(int64_t m) const {
    if (!tiles) return m < numbers() ? m : -1;
    return m < numbers() && entry(m) < call.D_out ? sample(m) * call.D_out + entry(m) : -1;
  }
  // By tiles: four lanes' registers of an instruction, two samples and two entries each, are eight numbers in a row.
  static __device__ int sample(int64_t m) { return int(m) % 8 / 4 * 2 + int(m) % 2; }
  static __device__ int entry(int64_t m) { return int(m) / 8 * 2 + int(m) % 4 / 2; }
};

// Every eighth part from `part` on, COUNT of them, which are on their way at a time.
template <int COUNT, class Real>
__device__ inline void add_parts_of_group(Real (&both)[2], const VectorCall<Real>& call, const int64_t (&at)[2],
                                          int64_t part) {
  Real x[COUNT][2];
#pragma unroll
  for (int k = 0; k < COUNT; ++k)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool there = part + k * kSums < call.parts && at[half] >= 0;
      x[k][half] = there ? call.partial[(part + k * kSums) * call.stride_t + at[half]] : 0;
    }
#pragma unroll
  for (int k = 0; k < COUNT; ++k) both[0] += x[k][0], both[1] += x[k][1];
}

// The sums over the parts of a group's numbers, always in the same order: eight sums of every eighth part first.
template <int THREADS, class Real>
__device__ inline void sum_parts(Real* total, Real* sums, const Group<Real>& group) {
  const VectorCall<Real>& call = group.call;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int64_t begin = 0; begin < group.numbers(); begin += 64) {
    const int64_t at[2] = {group.in_part(begin + lane), group.in_part(begin + lane + 32)};
    for (int n = warp; n < kSums; n += THREADS / 32) {
      Real both[2] = {0, 0};
      int64_t part = n;
      for (; part + 7 * kSums < call.parts; part += 8 * kSums) add_parts_of_group<8>(both, call, at, part);
      for (; part < call.parts; part += 4 * kSums) add_parts_of_group<4>(both, call, at, part);
      sums[n * 64 + lane] = both[0], sums[n * 64 + lane + 32] = both[1];
    }
    __syncthreads();
    const int64_t to = threadIdx.x < 64 ? group.in_group(begin + threadIdx.x) : -1;
    if (to >= 0) {
      Real sum = 0;
      for (int n = 0; n < kSums; ++n) sum += sums[n * 64 + threadIdx.x];
      total[to] = sum;
    }
    __syncthreads();
  }
}

// Of the call for all iterations, that of one. Forward: s = bias + the sum of the parts becomes the output and, before
// the last iteration, V. Backward: from the incoming gradient or the sum of later dV, ds.
template <class Real>
FASTCAPS_INDEX VectorCall<Real> forward_iteration(VectorCall<Real> call, int64_t t) {
  const bool last = t == call.T - 1;
  call.new_sums += t * call.B * call.J * call.D_out;
  call.V = t > 0 ? call.V_next : nullptr;
  if (last) call.V_next = nullptr;
  if (!last) call.out = nullptr;
  return call;
}
template <class Real>
FASTCAPS_INDEX VectorCall<Real> backward_iteration(VectorCall<Real> call, int64_t t) {
  call.sums += t * call.B * call.J * call.D_out;
  call.ds += t * call.stride_t;
  if (t < call.T - 1) call.grad = nullptr;
  call.more = t < call.T - 2;
  return call;
}

// s = bias + the sum of the parts, and what an iteration leaves to the next one or to the caller.
template <int THREADS, class Real>
__device__ inline void squash_rows(const VectorCall<Real>& call, int64_t number, Real* total) {
  const int lane = threadIdx.x % 32;
  const Group<Real> group(call, number);
  sum_parts<THREADS>(total, total + group.rows * call.D_out, group);
  for (int64_t n = threadIdx.x / 32; n < group.rows && group.has(n); n += THREADS / 32) {
    const int64_t at = group.row(n) * call.D_out;
    Real* const s = total + n * call.D_out;
    Real q = 0;
    for (int64_t e = lane; e < call.D_out; e += 32) {
      if (call.bias) s[e] += call.bias[group.capsule(n) * call.D_out + e];
      call.new_sums[at + e] = s[e];
      q = fma(s[e], s[e], q);
    }
    const Real scale = squash_scale(sum_over_warp(q), call.eps);
    for (int64_t e = lane; e < call.D_out; e += 32) {
      const Real v = scale * s[e];
      if (call.out) write(v, call.out, call.stored, at + e);
      if (call.V_next) {
        const int64_t to = group.place(n, e);
        call.V_next[to] = fma(Real(1.4426950408889634074L), v, call.V ? call.V[to] : 0);
      }
    }
  }
}

template <class Real>
__global__ void __launch_bounds__(kVectorThreads) squash_vectors(VectorCall<Real> call) {
  squash_rows<kVectorThreads>(call, blockIdx.x, shared_memory<Real>());
}

// ds = squash'(s)^T dv, dv the incoming gradient or the sum over later iterations' dV.
template <int THREADS, class Real>
__device__ inline void squash_rows_backward(const VectorCall<Real>& call, int64_t number, Real* total) {
  const int lane = threadIdx.x % 32;
  const Group<Real> group(call, number);
  if (!call.grad) sum_parts<THREADS>(total, total + group.rows * call.D_out, group);
  for (int64_t n = threadIdx.x / 32; n < group.rows && group.has(n); n += THREADS / 32) {
    const int64_t at = group.row(n) * call.D_out;
    Real* const d = total + n * call.D_out;
    Real q = 0, along = 0;
    for (int64_t e = lane; e < call.D_out; e += 32) {
      if (call.grad)
        d[e] = read<Real>(call.grad, call.stored, at + e);
      else
        call.dv[at + e] = d[e] += call.more ? call.dv[at + e] : 0;
      q = fma(call.sums[at + e], call.sums[at + e], q);
    }
    q = sum_over_warp(q);
    // d and a multiple of its part along s; in terms of the direction nothing overflows before q does.
    const Real inverse = q == 0 ? 1 : 1 / sqrt(q);
    for (int64_t e = lane; e < call.D_out; e += 32) along = fma(call.sums[at + e] * inverse, d[e], along);
    along = sum_over_warp(along) * (call.eps > 0 ? 2 / (1 + q) - q / (q + call.eps) : (1 - q) / (1 + q));
    const Real scale = squash_scale(q, call.eps);
    for (int64_t e = lane; e < call.D_out; e += 32)
      call.ds[group.place(n, e)] = scale * fma(along, call.sums[at + e] * inverse, d[e]);
  }
}

template <class Real>
__global__ void __launch_bounds__(kVectorThreads) squash_vectors_backward(VectorCall<Real> call) {
  squash_rows_backward<kVectorThreads>(call, blockIdx.x, shared_memory<Real>());
}

// log2(e) V_t, V_t = v_0 + ... + v_{t-1}, of all iterations, from the weighted sums; a warp takes a row.
template <class Real>
__device__ inline void earlier_outputs_of_row(const VectorCall<Real>& call, int64_t row) {
  const int lane = threadIdx.x % 32;
  const int64_t N = call.B * call.J;
  for (int t = 0; t < call.T; ++t) {
    const Real* const s = call.sums + (t * N + row) * call.D_out;
    const Real* const before = call.V_next + (t - 1) * call.stride_t;
    Real q = 0;
    // V_t needs v_{t-1}: s of the iteration before.
    const Real* const last = s - N * call.D_out;
    for (int64_t e = lane; t > 0 && e < call.D_out; e += 32) q = fma(last[e], last[e], q);
    const Real scale = Real(1.4426950408889634074L) * squash_scale(sum_over_warp(q), call.eps);
    for (int64_t e = lane; e < call.D_out; e += 32) {
      const int64_t at = place(call, row, e);
      call.V_next[t * call.stride_t + at] = t > 0 ? fma(scale, last[e], before[at]) : 0;
    }
  }
}
template <class Real>
__global__ void __launch_bounds__(kVectorThreads) earlier_outputs(VectorCall<Real> call) {
  const int64_t row = (int64_t(blockIdx.x) * kVectorThreads + threadIdx.x) / 32;
  if (row < call.B * call.J) earlier_outputs_of_row(call, row);
}

// sum_b of ds of the iterations, a warp for each (j, e).
template <class Real>
__global__ void __launch_bounds__(kVectorThreads) bias_gradient(VectorCall<Real> call) {
  const int64_t n = (int64_t(blockIdx.x) * kVectorThreads + threadIdx.x) / 32, j = n / call.D_out, e = n % call.D_out;
  if (j >= call.J) return;
  Real sum = 0;
  for (int t = 0; t < call.T; ++t)
    for (int64_t b = threadIdx.x % 32; b < call.B; b += 32)
      sum += call.ds[t * call.stride_t + place(call, b * call.J + j, e)];
  sum = sum_over_warp(sum);
  if (threadIdx.x % 32 == 0) call.d_bias[n] = sum;
}

// out[n] = sum over parts of x[part, n], rounded to how `out` is stored.
template <class Real>
struct PartsCall {
  const Real* x;
  void* out;
  Stored stored;
  int64_t parts, size;
};
template <class Real>
__global__ void __launch_bounds__(kVectorThreads) add_parts(PartsCall<Real> call) {
  const int64_t n = int64_t(blockIdx.x) * kVectorThreads + threadIdx.x;
  if (n >= call.size) return;
  Real sum = 0;
  for (int64_t part = 0; part < call.parts; ++part) sum += call.x[part * call.size + n];
  write(sum, call.out, call.stored, n);
}

// One matrix for all input capsules: out[row, j, l] = sum_n x[row, j, n] w[j, n, l], w with strides, 0 where shared.
template <class Real>
struct TransformCall {
  const Real* x;
  const void* w;
  Stored stored;
  int64_t rows, J, N, L, stride_j, stride_n, stride_l;
  Real* out;
};
template <class Real>
__global__ void __launch_bounds__(kVectorThreads) transform_vectors(TransformCall<Real> call) {
  const int64_t n = int64_t(blockIdx.x) * kVectorThreads + threadIdx.x, row = n / call.L, l = n % call.L;
  if (row >= call.rows * call.J) return;
  const int64_t w = row % call.J * call.stride_j + l * call.stride_l;
  Real sum = 0;
  for (int64_t m = 0; m < call.N; ++m)
    sum = fma(call.x[row * call.N + m], read<Real>(call.w, call.stored, w + m * call.stride_n), sum);
  call.out[n] = sum;
}

// Its gradient, in parts of the samples and iterations: sum of ds c_x^T + ln2 V db_x^T, c_x and db_x being sum_i c
// poses and sum_i db poses, [count, B, J, D_in].
template <class Real>
struct MatrixCall {
  const Real *ds, *V, *c_poses, *db_poses;  // the last is null where coupling is constant
  int64_t rows, J, D_out, D_in, parts;      // rows: iterations times samples
  bool one_for_all;                         // one matrix for all output capsules, too
  Real* out;                                // [parts, J or 1, D_out, D_in]
};
template <class Real>
__global__ void __launch_bounds__(kVectorThreads) matrix_gradient(MatrixCall<Real> call) {
  const int64_t matrices = call.one_for_all ? 1 : call.J, n = int64_t(blockIdx.x) * kVectorThreads + threadIdx.x;
  const int64_t d = n % call.D_in, e = n / call.D_in % call.D_out, matrix = n / call.D_in / call.D_out % matrices;
  const int64_t part = n / call.D_in / call.D_out / matrices;
  if (part >= call.parts) return;
  Real sum = 0;
  for (int64_t row = part_begin(call.rows, call.parts, part); row < part_begin(call.rows, call.parts, part + 1); ++row)
    for (int64_t j = matrix; j < (call.one_for_all ? call.J : matrix + 1); ++j) {
      const int64_t left = (row * call.J + j) * call.D_out + e, right = (row * call.J + j) * call.D_in + d;
      sum = fma(call.ds[left], call.c_poses[right], sum);
      if (call.db_poses) sum = fma(Real(0.6931471805599453094L) * call.V[left], call.db_poses[right], sum);
    }
  call.out[n] = sum;
}

}  // namespace fastcaps::cuda
