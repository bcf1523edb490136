// The last sweep of the backward by tensor cores: the gradients of poses, weight and prior from all iterations at once.
//
// With V, ds and the statistics of the softmax at hand all is local to one (sample, input capsule, output capsule):
//   du = sum_t c_t ds_t + db_t V_t with c_t = 2^(logit - top - log), db_t = c_t (dc_t - sum_j c_t dc_t).
// A warp has one input capsule and goes through the samples, beside warps with other capsules that need the same V and
// ds at the same time: these come out of the L1 cache then. (Where matrices are large, warps share a capsule and take
// turns.) du is laid out as the left operand of d_weight = du poses^T wants it; d_poses = weight^T du is plain
// arithmetic and a sum over lanes.
#pragma once

#include <type_traits>

#include "cuda/tiles.h"
#include "cuda/vectors.h"

namespace fastcaps::cuda {

// The matrices once more, eight entries of every row: a lane's rows one after the other, lanes 16 bytes beside a
// multiple of 128 bytes, so that no two of them meet in a bank.
template <class T>
struct Rows {
  static FASTCAPS_INDEX int stride(int block) { return 8 * T::entries(block) + 4; }
  static FASTCAPS_INDEX int place(int block, int g) { return (block == 0 ? 0 : 8 * stride(0)) + g * stride(block); }
  static constexpr int size = 8 * stride(0) + (T::blocks > 1 ? 8 * stride(1) : 0);
};

// c = a b for du, which is float32, and poses. Exact poses of float16 need two products; bfloat16, with its eight bits,
// is content with du rounded to the eleven of tf32.
template <class F>
__device__ inline void gradient_product(float* c, const float (&a)[4], const float (&b)[2]) {
  if constexpr (F::TF32 || std::is_same_v<typename F::In, bfloat16>) {
    const float rounded[4] = {rounded_to_tf32(a[0]), rounded_to_tf32(a[1]), rounded_to_tf32(a[2]),
                              rounded_to_tf32(a[3])};
    multiply(c, rounded, b);
  } else if constexpr (std::is_same_v<typename F::In, float16>) {
    float hi[4], lo[4];
    for (int n = 0; n < 4; ++n) hi[n] = cut_to_tf32(a[n]), lo[n] = a[n] - hi[n];
    multiply(c, lo, b);
    multiply_add(c, hi, b);
  } else {
    exact_product<F>(c, a, b);
  }
}

template <class F, class T>
struct LastSweep {
  using In = typename F::In;
  const TileCall& call;
  const float4* fragments;
  const float* rows;
  int i, tile, first_d;  // first_d: of the eight entries of poses and matrix rows whose gradients are computed
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  int first_b;
  float d_weight[4 * T::M], d_prior[T::blocks], dx[16];  // dx: eight entries of two samples

  __device__ int sample(int s) const { return first_b + 2 * t + s; }

  __device__ void start(int next_tile) {
    tile = next_tile;
#pragma unroll
    for (int n = 0; n < 4 * T::M; ++n) d_weight[n] = 0;
#pragma unroll
    for (int block = 0; block < T::blocks; ++block) d_prior[block] = 0;
  }

  __device__ void add(int batch_tile) {
    first_b = 8 * batch_tile;
    float x[2], columns[2];  // the right operands of votes and d_weight
    load_pose<F>(x, call, first_b + g, i, call.I, 2 * t);
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const int b = sample(s), d = first_d + g;
      const bool there = b < call.B && d < call.D_in && (F::PLAIN || !call.mask || call.mask[pose_of(call, b, i)]);
      columns[s] = there ? widen(static_cast<const In*>(call.poses)[pose_of(call, b, i) * call.D_in + d]) : 0;
      if constexpr (F::TF32) columns[s] = rounded_to_tf32(columns[s]);
    }
    float u[4 * T::M], du[4 * T::M], db[T::blocks][2] = {};
    votes<F, T>(u, fragments, x, call,
                [&](float (&more)[2], int first) { load_pose<F>(more, call, first_b + g, i, call.I, first + 2 * t); });
    add_iterations(du, db, u, T::first_place(call.J, batch_tile, tile) + 4 * lane);
    if (!F::PLAIN && call.d_prior) add_prior(db);
    if (call.d_poses) {
#pragma unroll
      for (int n = 0; n < 16; ++n) dx[n] = 0;
      each<T::blocks>([&]<int block>() { add_poses<block>(du); });
      store_poses();
    }
    if (call.d_weight)
#pragma unroll
      for (int m = 0; m < T::M; ++m) {
        const float a[4] = {du[4 * m], du[4 * m + 2], du[4 * m + 1], du[4 * m + 3]};
        float more[4];
        gradient_product<F>(more, a, columns);
#pragma unroll
        for (int n = 0; n < 4; ++n) d_weight[4 * m + n] += more[n];
      }
  }

  // du and sum_t db_t, of all iterations; `at` is the lane's place in V and ds of one.
  __device__ void add_iterations(float (&du)[4 * T::M], float (&db)[T::blocks][2], const float* u, int64_t at) {
    const int64_t vectors = call.places, size = int64_t(call.I) * call.B;
    const float *ds = call.ds + call.first_t * vectors + at, *V = call.V + call.first_t * vectors + at;
    const float* stats = call.stats + 3 * call.first_t * size + int64_t(i) * call.B + first_b + 2 * t;
    int iteration = call.first_t;
    const bool uniform = iteration == 0 && (F::PLAIN || !call.prior);  // and V is 0
#pragma unroll
    for (int m = 0; m < T::M; ++m) {
      const float4 y = uniform ? *reinterpret_cast<const float4*>(ds + m * 128) : float4{0, 0, 0, 0};
      du[4 * m] = call.share * y.x, du[4 * m + 1] = call.share * y.y;
      du[4 * m + 2] = call.share * y.z, du[4 * m + 3] = call.share * y.w;
    }
    if (uniform) ++iteration, ds += vectors, V += vectors, stats += 3 * size;
#pragma unroll 1
    for (; iteration < call.T; ++iteration, ds += vectors, V += vectors, stats += 3 * size) {
      float top[2], log[2], mean[2];
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const bool there = sample(s) < call.B;
        top[s] = there ? stats[s] : 0, log[s] = there ? stats[size + s] : 0;
        mean[s] = there && !call.detach ? stats[2 * size + s] : 0;
      }
      each<T::blocks>([&]<int block>() { add_iteration<block>(du, db[block], u, V, ds, top, log, mean, iteration); });
    }
  }

  template <int block>
  __device__ void add_iteration(float* du, float (&db)[2], const float* u, const float* V_at, const float* ds_at,
                                const float (&top)[2], const float (&log)[2], const float (&mean)[2], int iteration) {
    constexpr int first_m = T::first_m(block), M = (block + 1 < T::blocks ? T::first_m(block + 1) : T::M) - first_m;
    float V[4 * M], ds[4 * M], c[2] = {0, 0}, dc[2];
#pragma unroll
    for (int m = 0; m < M; ++m) {
      const float4 x = *reinterpret_cast<const float4*>(V_at + (first_m + m) * 128);
      const float4 y = *reinterpret_cast<const float4*>(ds_at + (first_m + m) * 128);
      V[4 * m] = x.x, V[4 * m + 1] = x.y, V[4 * m + 2] = x.z, V[4 * m + 3] = x.w;
      ds[4 * m] = y.x, ds[4 * m + 1] = y.y, ds[4 * m + 2] = y.z, ds[4 * m + 3] = y.w;
    }
    if (F::PLAIN || iteration > 0) dot<T, block>(c, u + 4 * first_m, V);
    dot<T, block>(dc, u + 4 * first_m, ds);
    const int j = tile * T::JT + T::capsule(block, g);
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const bool there = sample(s) < call.B && (F::PLAIN || j < call.J);
      if (!F::PLAIN && call.prior && there)
        c[s] += kLog2e * call.prior[sample(s) * call.prior_stride_b + matrix_of(call, i, j)];
      const float exponent = c[s] - top[s] - log[s];
      c[s] = power_of_two(exponent > 0 ? 0 : exponent);
      dc[s] = there && !call.detach ? c[s] * (dc[s] - mean[s]) : 0;
      db[s] += dc[s];
      dc[s] = iteration > 0 ? kLn2 * dc[s] : 0;  // V_0 is 0, and 0 times NaN would not be
#pragma unroll
      for (int n = 0; n < T::entries(block); ++n) {
        const int r = T::reg(block, n, s);
        du[r] = fmaf(c[s], ds[r - 4 * first_m], fmaf(dc[s], V[r - 4 * first_m], du[r]));
      }
    }
  }

  __device__ void add_prior(const float (&db)[T::blocks][2]) {
    each<T::blocks>([&]<int block>() {
      const int j = tile * T::JT + T::capsule(block, g);
      if (call.prior_stride_b == 0)
        d_prior[block] += db[block][0] + db[block][1];
      else if (g % T::sharing(block) == 0 && j < call.J)
#pragma unroll
        for (int s = 0; s < 2; ++s)
          if (sample(s) < call.B) call.d_prior[pose_of(call, sample(s), i) * call.J + j] = db[block][s];
    });
  }

  template <int block>
  __device__ void add_poses(const float* du) {
    const float* row = rows + Rows<T>::place(block, g);
#pragma unroll
    for (int n = 0; n < T::entries(block); ++n, row += 8) {
      const float4 low = *reinterpret_cast<const float4*>(row), high = *reinterpret_cast<const float4*>(row + 4);
      const float w[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (int s = 0; s < 2; ++s)
#pragma unroll
        for (int d = 0; d < 8; ++d) dx[8 * s + d] = fmaf(w[d], du[T::reg(block, n, s)], dx[8 * s + d]);
    }
  }

  // Of 2 `half` entries a lane keeps one half and gets from another lane what that has of it.
  template <int half>
  __device__ void halve() {
    const bool upper = lane & 2 * half;
#pragma unroll
    for (int n = 0; n < half; ++n) {
      const float mine = upper ? dx[n + half] : dx[n], theirs = upper ? dx[n] : dx[n + half];
      dx[n] = mine + exchanged(theirs, 2 * half);
    }
  }

  // The sum of dx over the lanes with other capsules; each keeps a part of it: of sample g / 4, entries 2 (g % 4) and
  // the next.
  __device__ void store_poses() {
    halve<8>();
    halve<4>();
    halve<2>();
    const int b = sample(g / 4), d = first_d + 2 * (g % 4);
    const int64_t at = pose_of(call, b, i) * call.D_in + d;
    if (b >= call.B) return;
    const bool masked = !F::PLAIN && call.mask && !call.mask[pose_of(call, b, i)], last = (tile + 1) * T::JT >= call.J;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      if (d + n >= call.D_in) return;
      if (masked) dx[n] = 0;
      if (tile > 0) dx[n] += call.d_poses_sum[at + n];  // written by this thread
      if (last)
        narrow(dx[n], static_cast<In*>(call.d_poses)[at + n]);
      else
        call.d_poses_sum[at + n] = dx[n];
    }
  }
};

// A block's share of the work: runs of batch tiles of one group after the other.
template <class F, class T>
struct GroupGradients {
  static constexpr int warps = kTileThreads / 32, registers = 4 * T::M;
  const TileCall& call;
  const int steps = (call.D_in + 7) / 8, capsules = call.chunk, sharing = warps / capsules;  // warps with one capsule
  const int warp = warp_of_block(), lane = threadIdx.x % 32, g = lane / 4;
  float4* const fragments = shared_memory<float4>();  // of all capsules
  float* const rows = reinterpret_cast<float*>(fragments + capsules * steps * T::M * 32);
  float* const sums = shared_memory<float>();  // of all warps, in the place of both, when these are no longer needed
  int first_i, d_chunk;
  float* part;  // null: the group is this block's alone

  __device__ void run(int64_t group, int begin, int end) {
    first_i = int(group / steps) * capsules, d_chunk = int(group % steps);
    const bool whole = begin == 0 && end == call.items.batch_tiles;
    part = whole ? nullptr : call.parts + call.items.part(blockIdx.x, begin == 0) * part_size(call);
    const int capsule = warp / sharing, i = first_i + capsule;
    LastSweep<F, T> sweep{call,       fragments + capsule * steps * T::M * 32, rows + capsule * Rows<T>::size, i, 0,
                          8 * d_chunk};
    for (int tile = 0; tile * T::JT < call.J; ++tile) {
      load(tile);
      sweep.start(tile);
#pragma unroll 1
      for (int batch_tile = begin + warp % sharing; i < call.I && batch_tile < end; batch_tile += sharing)
        sweep.add(batch_tile);
      if (call.d_weight) write_weight(sweep, tile);
      if (!F::PLAIN && call.d_prior && call.prior_stride_b == 0 && d_chunk == 0) write_prior(sweep, tile);
    }
  }

  __device__ void load(int tile) const {
    __syncthreads();
    fill<F, T>(fragments, call, first_i, call.I, capsules, tile * T::JT);
    __syncthreads();
    for (int n = warp; n < capsules * T::M; n += warps) {
      const int capsule = n / T::M, m = n % T::M, block = T::block_of_m(m);
      const float4 w = fragments[((capsule * steps + d_chunk) * T::M + m) * 32 + lane];
      float* row =
          rows + capsule * Rows<T>::size + Rows<T>::place(block, g) + 16 * (m - T::first_m(block)) + 2 * (lane % 4);
      row[0] = w.x, row[1] = w.z, row[8] = w.y, row[9] = w.w;
    }
    __syncthreads();
  }

  // Sums over the warps that share a capsule.
  __device__ void write_weight(const LastSweep<F, T>& sweep, int tile) const {
    __syncthreads();
#pragma unroll
    for (int n = 0; n < registers; ++n) sums[(warp * registers + n) * 32 + lane] = sweep.d_weight[n];
    __syncthreads();
    for (int n = warp; n < capsules * registers; n += warps) {
      const int capsule = n / registers, r = n % registers, row = fragment_row(lane, r % 4);
      const float* at = sums + (capsule * sharing * registers + r) * 32 + lane;
      float total = 0;
      for (int other = 0; other < sharing; ++other) total += at[other * registers * 32];
      const int j = tile * T::JT + T::row_capsule(r / 4, row), e = T::row_entry(r / 4, row);
      const int column = fragment_column(lane, r % 4), i = first_i + capsule;
      if (i >= call.I || j >= call.J || e >= call.D_out || 8 * d_chunk + column >= call.D_in) continue;
      if (part)
        part[((int64_t(capsule) * call.J + j) * call.D_out + e) * 8 + column] = total;
      else
        narrow(total, static_cast<typename F::In*>(
                          call.d_weight)[(matrix_of(call, i, j) * call.D_out + e) * call.D_in + 8 * d_chunk + column]);
    }
  }

  __device__ void write_prior(const LastSweep<F, T>& sweep, int tile) const {
    __syncthreads();
    each<T::blocks>([&]<int block>() {  // over the lanes with other samples
      const float two = sweep.d_prior[block] + exchanged(sweep.d_prior[block], 1);
      const float all = two + exchanged(two, 2);
      if (lane % 4 == 0 && g % T::sharing(block) == 0) sums[warp * T::JT + T::capsule(block, g)] = all;
    });
    __syncthreads();
    const int capsule = threadIdx.x / T::JT, j = tile * T::JT + threadIdx.x % T::JT, i = first_i + capsule;
    if (capsule >= capsules || i >= call.I || j >= call.J) return;
    float total = 0;
    for (int other = 0; other < sharing; ++other)
      total += sums[(capsule * sharing + other) * T::JT + threadIdx.x % T::JT];
    if (part)
      part[weight_part_size(call) + int64_t(capsule) * call.J + j] = total;
    else
      call.d_prior[matrix_of(call, i, j)] = total;
  }
};

template <class F, class T>
__global__ void __launch_bounds__(kTileThreads, 2) tile_gradients(TileCall call) {
  const int64_t end = call.items.begin(blockIdx.x + 1), tiles = call.items.batch_tiles;
  GroupGradients<F, T> gradients{call};
#pragma unroll 1
  for (int64_t item = call.items.begin(blockIdx.x); item < end;) {
    const int64_t first = item % tiles, left = end - item, last = first + left < tiles ? first + left : tiles;
    gradients.run(item / tiles, int(first), int(last));
    item += last - first;
  }
}

// The sums of the parts that several blocks have left of a group, in the order of the blocks.
struct SplitCall {
  TileCall tile;
  Stored stored;  // of d_weight
};
constexpr int kSplitNumbers = 4;  // of a thread
FASTCAPS_INDEX int64_t split_blocks_of_group(const TileCall& call) {
  return pieces(part_size(call), kSplitNumbers * kVectorThreads);
}
template <class Real>
__global__ void __launch_bounds__(kVectorThreads) add_split_gradients(SplitCall split) {
  const TileCall& call = split.tile;
  const int64_t group = blockIdx.x / split_blocks_of_group(call), size = part_size(call);
  const int64_t first = call.items.first_block(group), last = call.items.last_block(group);
  if (first == last) return;
  const int chunks = int(pieces(call.D_in, 8)), first_i = int(group / chunks) * call.chunk, chunk = int(group % chunks);
  const int weights = int(weight_part_size(call)),
            begin = int(blockIdx.x % split_blocks_of_group(call)) * kSplitNumbers;
#pragma unroll
  for (int n = 0; n < kSplitNumbers; ++n) {
    const int at = (begin + n) * kVectorThreads + int(threadIdx.x), d = 8 * chunk + at % 8;
    const bool of_weight = at < weights;
    const int row = of_weight ? at / 8 : at - weights, matrix = of_weight ? row / call.D_out : row;
    if (at >= size || first_i + matrix / call.J >= call.I) continue;
    if (of_weight ? !call.d_weight || d >= call.D_in : !call.d_prior || call.prior_stride_b || chunk > 0) continue;
    Real sum = 0;
    for (int64_t block = first; block <= last; ++block)
      sum += call.parts[call.items.part(block, block == first) * size + at];
    if (of_weight)
      write(sum, call.d_weight, split.stored, (int64_t(first_i) * call.J * call.D_out + row) * call.D_in + d);
    else
      call.d_prior[int64_t(first_i) * call.J + row] = sum;
  }
}

}  // namespace fastcaps::cuda
