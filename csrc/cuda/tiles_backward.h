// The last sweep of the backward by tensor cores: the gradients of poses, weight and prior from all iterations at once.
//
// With V, ds and the statistics of the softmax at hand all is local to one (sample, input capsule, output capsule):
//   du = sum_t c_t ds_t + db_t V_t with c_t = 2^(logit - top - log), db_t = c_t (dc_t - sum_j c_t dc_t).
// A warp has one input capsule and goes through the samples, beside warps with other capsules that need the same V and
// ds at the same time: these come out of the L1 cache then. (Where matrices are large, warps share a capsule and take
// turns.) du is laid out as the left operand of d_weight = du poses^T wants it; d_poses = weight^T du is plain
// arithmetic and a sum over lanes.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/layout.h"
#include "cuda/platform.h"
#include "cuda/tiles.h"
#include "cuda/vectors.h"
#include "numbers.h"
#include "routing.h"

namespace fastcaps::cuda {

// The matrices once more, eight entries of every row: a lane's rows one after the other, lanes 16 bytes beside a
// multiple of 128 bytes, so that no two of them meet in a bank.
template <class T>
struct MatrixRows {
  static FASTCAPS_INDEX int stride(int section) { return 8 * T::entries(section) + 4; }
  static FASTCAPS_INDEX int place(int section, int g) {
    return (section == 0 ? 0 : 8 * stride(0)) + g * stride(section);
  }
  static constexpr int size = 8 * stride(0) + (T::sections > 1 ? 8 * stride(1) : 0);
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
  const TileArguments& args;
  const float4* fragments;
  const float* rows;
  int i, tile, first_d;  // first_d: of the eight entries of poses and matrix rows whose gradients are computed
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  int first_b;
  float d_weight[4 * T::M], d_prior[T::sections], dx[16];  // dx: eight entries of two samples

  __device__ int sample(int s) const { return first_b + 2 * t + s; }

  __device__ void start(int next_tile) {
    tile = next_tile;
#pragma unroll
    for (int n = 0; n < 4 * T::M; ++n) d_weight[n] = 0;
#pragma unroll
    for (int section = 0; section < T::sections; ++section) d_prior[section] = 0;
  }

  __device__ void add(int batch_tile) {
    first_b = 8 * batch_tile;
    float x[2], columns[2];  // the right operands of votes and d_weight
    load_pose<F>(x, args, first_b + g, i, args.I, 2 * t);
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const int b = sample(s), d = first_d + g;
      const bool there = b < args.B && d < args.D_in && !masked<F>(args, b, i);
      columns[s] = there ? widen(static_cast<const In*>(args.poses)[pose_of(args, b, i) * args.D_in + d]) : 0;
      if constexpr (F::TF32) columns[s] = rounded_to_tf32(columns[s]);
    }
    float u[4 * T::M], du[4 * T::M], db[T::sections][2] = {};
    votes<F, T>(u, fragments, x, args,
                [&](float (&more)[2], int first) { load_pose<F>(more, args, first_b + g, i, args.I, first + 2 * t); });
    add_iterations(du, db, u, T::first_place(args.J, batch_tile, tile) + 4 * lane);
    if (!F::PLAIN && args.prior && args.mask) clear_masked(du, db);
    if (!F::PLAIN && args.d_prior) add_prior(db);
    if (args.d_poses) {
#pragma unroll
      for (int n = 0; n < 16; ++n) dx[n] = 0;
      each<T::sections>([&]<int section>() { add_poses<section>(du); });
      store_poses();
    }
    if (args.d_weight)
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
  __device__ void add_iterations(float (&du)[4 * T::M], float (&db)[T::sections][2], const float* u, int64_t at) {
    const int64_t stride_t = args.places, size = int64_t(args.I) * args.B;
    const float *ds = args.ds + args.first_t * stride_t + at, *V = args.V + args.first_t * stride_t + at;
    const float* stats = args.stats + 3 * args.first_t * size + int64_t(i) * args.B + first_b + 2 * t;
    int iteration = args.first_t;
    const bool uniform = iteration == 0 && (F::PLAIN || !args.prior);  // and V is 0
#pragma unroll
    for (int m = 0; m < T::M; ++m) {
      const float4 y = uniform ? *reinterpret_cast<const float4*>(ds + m * 128) : float4{0, 0, 0, 0};
      du[4 * m] = args.uniform_coupling * y.x, du[4 * m + 1] = args.uniform_coupling * y.y;
      du[4 * m + 2] = args.uniform_coupling * y.z, du[4 * m + 3] = args.uniform_coupling * y.w;
    }
    if (uniform) ++iteration, ds += stride_t, V += stride_t, stats += 3 * size;
#pragma unroll 1
    for (; iteration < args.T; ++iteration, ds += stride_t, V += stride_t, stats += 3 * size) {
      float top[2], log[2], mean[2];
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const bool there = sample(s) < args.B;
        top[s] = there ? stats[s] : 0, log[s] = there ? stats[size + s] : 0;
        mean[s] = there && !args.detach ? stats[2 * size + s] : 0;
      }
      each<T::sections>(
          [&]<int section>() { add_iteration<section>(du, db[section], u, V, ds, top, log, mean, iteration); });
    }
  }

  template <int section>
  __device__ void add_iteration(float* du, float (&db)[2], const float* u, const float* V_at, const float* ds_at,
                                const float (&top)[2], const float (&log)[2], const float (&mean)[2], int iteration) {
    constexpr int first_m = T::first_m(section),
                  M = (section + 1 < T::sections ? T::first_m(section + 1) : T::M) - first_m;
    float V[4 * M], ds[4 * M], c[2] = {0, 0}, dc[2];
#pragma unroll
    for (int m = 0; m < M; ++m) {
      const float4 x = *reinterpret_cast<const float4*>(V_at + (first_m + m) * 128);
      const float4 y = *reinterpret_cast<const float4*>(ds_at + (first_m + m) * 128);
      V[4 * m] = x.x, V[4 * m + 1] = x.y, V[4 * m + 2] = x.z, V[4 * m + 3] = x.w;
      ds[4 * m] = y.x, ds[4 * m + 1] = y.y, ds[4 * m + 2] = y.z, ds[4 * m + 3] = y.w;
    }
    if (F::PLAIN || iteration > 0) dot<T, section>(c, u + 4 * first_m, V);
    dot<T, section>(dc, u + 4 * first_m, ds);
    const int j = tile * T::JT + T::capsule(section, g);
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const bool there = sample(s) < args.B && (F::PLAIN || j < args.J);
      if (!F::PLAIN && args.prior && there) c[s] = plus_prior(args, c[s], sample(s), matrix_of(args, i, j));
      const float exponent = c[s] - top[s] - log[s];
      c[s] = power_of_two(exponent > 0 ? 0 : exponent);
      dc[s] = there && !args.detach ? c[s] * (dc[s] - mean[s]) : 0;
      db[s] += dc[s];
      dc[s] = iteration > 0 ? kLn2<float> * dc[s] : 0;  // V_0 is 0, and 0 times NaN would not be
#pragma unroll
      for (int n = 0; n < T::entries(section); ++n) {
        const int r = T::reg(section, n, s);
        du[r] = fmaf(c[s], ds[r - 4 * first_m], fmaf(dc[s], V[r - 4 * first_m], du[r]));
      }
    }
  }

  // What came of a masked input capsule's prior, which may be anything.
  __device__ void clear_masked(float (&du)[4 * T::M], float (&db)[T::sections][2]) {
#pragma unroll
    for (int s = 0; s < 2; ++s)
      if (sample(s) < args.B && masked<F>(args, sample(s), i)) {
#pragma unroll
        for (int n = s; n < 4 * T::M; n += 2) du[n] = 0;
#pragma unroll
        for (int section = 0; section < T::sections; ++section) db[section][s] = 0;
      }
  }

  __device__ void add_prior(const float (&db)[T::sections][2]) {
    each<T::sections>([&]<int section>() {
      const int j = tile * T::JT + T::capsule(section, g);
      if (args.prior_stride_b == 0)
        d_prior[section] += db[section][0] + db[section][1];
      else if (g % T::quads(section) == 0 && j < args.J)
#pragma unroll
        for (int s = 0; s < 2; ++s)
          if (sample(s) < args.B) args.d_prior[pose_of(args, sample(s), i) * args.J + j] = db[section][s];
    });
  }

  template <int section>
  __device__ void add_poses(const float* du) {
    const float* row = rows + MatrixRows<T>::place(section, g);
#pragma unroll
    for (int n = 0; n < T::entries(section); ++n, row += 8) {
      const float4 low = *reinterpret_cast<const float4*>(row), high = *reinterpret_cast<const float4*>(row + 4);
      const float w[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (int s = 0; s < 2; ++s)
#pragma unroll
        for (int d = 0; d < 8; ++d) dx[8 * s + d] = fmaf(w[d], du[T::reg(section, n, s)], dx[8 * s + d]);
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

  // The sum of dx over the lanes with other capsules; each keeps some of it: of sample g / 4, entries 2 (g % 4) and
  // the next.
  __device__ void store_poses() {
    halve<8>();
    halve<4>();
    halve<2>();
    const int b = sample(g / 4), d = first_d + 2 * (g % 4);
    const int64_t at = pose_of(args, b, i) * args.D_in + d;
    if (b >= args.B) return;
    const bool hidden = masked<F>(args, b, i), last = (tile + 1) * T::JT >= args.J;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      if (d + n >= args.D_in) return;
      if (hidden) dx[n] = 0;
      if (tile > 0) dx[n] += args.d_poses_sum[at + n];  // written by this thread
      if (last)
        narrow(dx[n], static_cast<In*>(args.d_poses)[at + n]);
      else
        args.d_poses_sum[at + n] = dx[n];
    }
  }
};

// A block's share of the work: runs of batch tiles of one panel after the other.
template <class F, class T>
struct PanelGradients {
  static constexpr int warps = kTileThreads / 32, registers = 4 * T::M;
  const TileArguments& args;
  const int octets = (args.D_in + 7) / 8, capsules = args.chunk_capsules,
            capsule_warps = warps / capsules;  // warps with one capsule
  const int warp = warp_of_block(), lane = threadIdx.x % 32, g = lane / 4;
  float4* const fragments = shared_memory<float4>();  // of all capsules
  float* const rows = reinterpret_cast<float*>(fragments + capsules * octets * T::M * 32);
  float* const sums = shared_memory<float>();  // of all warps, in the place of both, when these are no longer needed
  int first_i, octet;
  float* partial;  // null: the panel is this block's alone

  __device__ void run(int64_t panel, int begin, int end) {
    first_i = int(panel / octets) * capsules, octet = int(panel % octets);
    const bool whole = begin == 0 && end == args.items.batch_tiles;
    partial =
        whole ? nullptr : args.partial_panels + args.items.slot(blockIdx.x, begin == 0) * partial_panel_size(args);
    const int capsule = warp / capsule_warps, i = first_i + capsule;
    LastSweep<F, T> sweep{
        args, fragments + capsule * octets * T::M * 32, rows + capsule * MatrixRows<T>::size, i, 0, 8 * octet};
    for (int tile = 0; tile * T::JT < args.J; ++tile) {
      load(tile);
      sweep.start(tile);
#pragma unroll 1
      for (int batch_tile = begin + warp % capsule_warps; i < args.I && batch_tile < end; batch_tile += capsule_warps)
        sweep.add(batch_tile);
      if (args.d_weight) write_weight(sweep, tile);
      if (!F::PLAIN && args.d_prior && args.prior_stride_b == 0 && octet == 0) write_prior(sweep, tile);
    }
  }

  __device__ void load(int tile) const {
    __syncthreads();
    fill<F, T>(fragments, args, first_i, args.I, capsules, tile * T::JT);
    __syncthreads();
    for (int n = warp; n < capsules * T::M; n += warps) {
      const int capsule = n / T::M, m = n % T::M, section = T::section_of_m(m);
      const float4 w = fragments[((capsule * octets + octet) * T::M + m) * 32 + lane];
      float* row = rows + capsule * MatrixRows<T>::size + MatrixRows<T>::place(section, g) +
                   16 * (m - T::first_m(section)) + 2 * (lane % 4);
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
      const float* at = sums + (capsule * capsule_warps * registers + r) * 32 + lane;
      float total = 0;
      for (int other = 0; other < capsule_warps; ++other) total += at[other * registers * 32];
      const int j = tile * T::JT + T::row_capsule(r / 4, row), e = T::row_entry(r / 4, row);
      const int column = fragment_column(lane, r % 4), i = first_i + capsule;
      if (i >= args.I || j >= args.J || e >= args.D_out || 8 * octet + column >= args.D_in) continue;
      if (partial)
        partial[((int64_t(capsule) * args.J + j) * args.D_out + e) * 8 + column] = total;
      else
        narrow(total, static_cast<typename F::In*>(
                          args.d_weight)[(matrix_of(args, i, j) * args.D_out + e) * args.D_in + 8 * octet + column]);
    }
  }

  __device__ void write_prior(const LastSweep<F, T>& sweep, int tile) const {
    __syncthreads();
    each<T::sections>([&]<int section>() {  // over the lanes with other samples
      const float two = sweep.d_prior[section] + exchanged(sweep.d_prior[section], 1);
      const float all = two + exchanged(two, 2);
      if (lane % 4 == 0 && g % T::quads(section) == 0) sums[warp * T::JT + T::capsule(section, g)] = all;
    });
    __syncthreads();
    const int capsule = threadIdx.x / T::JT, j = tile * T::JT + threadIdx.x % T::JT, i = first_i + capsule;
    if (capsule >= capsules || i >= args.I || j >= args.J) return;
    float total = 0;
    for (int other = 0; other < capsule_warps; ++other)
      total += sums[(capsule * capsule_warps + other) * T::JT + threadIdx.x % T::JT];
    if (partial)
      partial[partial_weight_size(args) + int64_t(capsule) * args.J + j] = total;
    else
      args.d_prior[matrix_of(args, i, j)] = total;
  }
};

template <class F, class T>
__global__ void __launch_bounds__(kTileThreads, kBackwardBlocks) tile_gradients(TileArguments args) {
  const int64_t end = args.items.begin(blockIdx.x + 1), tiles = args.items.batch_tiles;
  PanelGradients<F, T> gradients{args};
#pragma unroll 1
  for (int64_t item = args.items.begin(blockIdx.x); item < end;) {
    const int64_t first = item % tiles, left = end - item, last = first + left < tiles ? first + left : tiles;
    gradients.run(item / tiles, int(first), int(last));
    item += last - first;
  }
}

// The sums of the partial gradients that several blocks have left of a panel, in the order of the blocks.
struct SplitArguments {
  TileArguments tile;
  Stored stored;  // of d_weight
};
constexpr int kSplitNumbers = 4;  // of a thread
FASTCAPS_INDEX int64_t split_blocks_of_panel(const TileArguments& args) {
  return ceil_div(partial_panel_size(args), kSplitNumbers * kVectorThreads);
}
template <class Real>
__global__ void __launch_bounds__(kVectorThreads) add_split_gradients(SplitArguments split) {
  const TileArguments& args = split.tile;
  const int64_t panel = blockIdx.x / split_blocks_of_panel(args), size = partial_panel_size(args);
  const int64_t first = args.items.first_block(panel), last = args.items.last_block(panel);
  if (first == last) return;
  const int octets = int(ceil_div(args.D_in, 8)), first_i = int(panel / octets) * args.chunk_capsules,
            octet = int(panel % octets);
  const int weights = int(partial_weight_size(args)),
            begin = int(blockIdx.x % split_blocks_of_panel(args)) * kSplitNumbers;
#pragma unroll
  for (int n = 0; n < kSplitNumbers; ++n) {
    const int at = (begin + n) * kVectorThreads + int(threadIdx.x), d = 8 * octet + at % 8;
    const bool of_weight = at < weights;
    const int row = of_weight ? at / 8 : at - weights, matrix = of_weight ? row / args.D_out : row;
    if (at >= size || first_i + matrix / args.J >= args.I) continue;
    if (of_weight ? !args.d_weight || d >= args.D_in : !args.d_prior || args.prior_stride_b || octet > 0) continue;
    Real sum = 0;
    for (int64_t block = first; block <= last; ++block)
      sum += args.partial_panels[args.items.slot(block, block == first) * size + at];
    if (of_weight)
      write(sum, args.d_weight, split.stored, (int64_t(first_i) * args.J * args.D_out + row) * args.D_in + d);
    else
      args.d_prior[int64_t(first_i) * args.J + row] = sum;
  }
}

}  // namespace fastcaps::cuda
