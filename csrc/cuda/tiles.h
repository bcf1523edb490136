// Dynamic routing by tensor cores: a warp has 8 samples times a tile of output capsules in registers.
//
// Votes are products of the matrices, the rows, with the poses of 8 samples, the columns of mma.sync.m16n8k8. Their
// layout (cuda/layout.h) makes agreement, softmax and weighted sum a matter of a few lanes. Of float32
// three products of tf32 parts are as exact as float32 itself; half types are exact in tf32 as they are. Long sums are
// added outside of the tensor cores, which cut their sums off.
//
// Logits are to base 2, and so is V: the kernels see log2(e) V. Statistics of the softmax are [3, I, B]: the largest
// logit, log2 of the sum of 2^(logit - largest) and, in the backward, sum_j c dc.
#pragma once

#include "cuda/layout.h"
#include "cuda/platform.h"

namespace fastcaps::cuda {

constexpr int kTileThreads = 128;  // four warps
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

struct TileCall {
  const void* poses;                 // [B, I, D_in]
  const void* weight;                // [I, J, D_out, D_in]
  const float* prior;                // [I, J] or [B, I, J], or null
  int64_t prior_stride_b;            // 0 or I * J
  const bool* mask;                  // [B, I], or null
  const float* V;                    // at Tile::place of an iteration, or null: 0
  const float* ds;                   // at Tile::place, or null: the forward
  float* stats;                      // [3, I, B]
  float* partial;                    // [slices, places], at Tile::place
  int B, I, J, D_in, D_out, slices;  // below 2^31 each; their products are not
  int batch_tiles;      // of a block's four warps, the others take every second or fourth input capsule: 4, 2 or 1
  int chunk;            // input capsules whose matrices are in shared memory at a time
  int64_t places;       // Tile::places
  float share;          // the coupling where it is the same for all: 1 / (J + leaky)
  bool leaky, vectors;  // whether four entries of a pose's matrix row can be loaded at once
  // Of the last sweep only: V and ds are [T, Tile::places], stats [T, 3, I, B].
  int T, first_t;
  bool detach;
  Items items;                   // a group: `chunk` input capsules and eight entries of D_in
  float* parts;                  // [2 blocks, part_size], of groups that several blocks have
  float *d_prior, *d_poses_sum;  // float32: [I, J] or [B, I, J]; [B, I, D_in]
  void *d_poses, *d_weight;
};

// A group's part of the gradients of weight, [chunk, J, D_out, 8], and of a prior for all samples, [chunk, J].
FASTCAPS_INDEX int64_t weight_part_size(const TileCall& call) { return int64_t(call.chunk) * call.J * call.D_out * 8; }
FASTCAPS_INDEX int64_t part_size(const TileCall& call) { return weight_part_size(call) + int64_t(call.chunk) * call.J; }

// In: the type of poses and weight. TF32: whether float32 may be rounded to tf32. PLAIN: D_in is 4 or 8 and rows are
// aligned, there is no prior, mask or leak, and tiles are full, so that the inner loop need not ask.
template <class In_, bool TF32_, bool PLAIN_>
struct Form {
  using In = In_;
  static constexpr bool TF32 = TF32_, PLAIN = PLAIN_;
};

// --------------------------------------------------------------------------------------------------------- matrices

// body.operator()<0>() .. <N - 1>(): for code whose registers must be known.
template <int N, class Body, int first = 0>
__device__ inline void each(Body&& body) {
  if constexpr (first < N) {
    body.template operator()<first>();
    each<N, Body, first + 1>(static_cast<Body&&>(body));
  }
}

// A pose's place in units of D_in, a matrix's in units of D_out D_in.
__device__ inline int64_t pose_of(const TileCall& call, int b, int i) { return int64_t(b) * call.I + i; }
__device__ inline int64_t matrix_of(const TileCall& call, int i, int j) { return int64_t(i) * call.J + j; }

// Four entries of a matrix row, `count` of them there.
template <class F>
__device__ inline void load_four(float (&to)[4], const typename F::In* from, int count, bool vectors) {
  using In = typename F::In;
  if ((F::PLAIN || vectors) && count >= 4) {
    if constexpr (sizeof(In) == 4) {
      const float4 x = *reinterpret_cast<const float4*>(from);
      to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
    } else {
      const uint2 x = *reinterpret_cast<const uint2*>(from);
      to[0] = widen(In{uint16_t(x.x)}), to[1] = widen(In{uint16_t(x.x >> 16)});
      to[2] = widen(In{uint16_t(x.y)}), to[3] = widen(In{uint16_t(x.y >> 16)});
    }
  } else {
    for (int n = 0; n < 4; ++n) to[n] = 0;
    if constexpr (!F::PLAIN)
      for (int n = 0; n < 4; ++n)
        if (n < count) to[n] = widen(from[n]);
  }
  if constexpr (F::TF32)
    for (int n = 0; n < 4; ++n) to[n] = rounded_to_tf32(to[n]);
}

// The matrices of input capsules i .. end - 1, at most `count`, into shared memory: [count, D_in / 8, M, 32 lanes] of
// the registers of an instruction's operand a, so that a lane has its four in one load. A warp takes one capsule at a
// time, two instructions at a time.
template <class F, class T>
__device__ void fill(float4* fragments, const TileCall& call, int i, int end, int count, int first_j) {
  static_assert(T::M % 2 == 0 && T::first_m(1) % 2 == 0);
  const int lane = threadIdx.x % 32, q = lane % 2, g = lane / 2 % 8, odd = lane / 16, steps = (call.D_in + 7) / 8;
  for (int c = threadIdx.x / 32; c < count && i + c < end; c += kTileThreads / 32)
    for (int step = 0; step < steps; ++step)
      each<T::blocks>([&]<int block>() {
        constexpr int first_m = T::first_m(block), last_m = block + 1 < T::blocks ? T::first_m(block + 1) : T::M;
        const int j = first_j + T::capsule(block, g);
        const int e = T::first_entry(block, g) + 2 * odd, d = 8 * step + 4 * q;
        const auto* from = static_cast<const typename F::In*>(call.weight) +
                           (matrix_of(call, i + c, j) * call.D_out + e) * call.D_in + d;
        float4* to = fragments + ((c * steps + step) * T::M + first_m + odd) * 32 + 4 * g + 2 * q;
#pragma unroll 2  // so many loads are on their way at a time; more would need registers that V and the sums have
        for (int m = 0; m < last_m - first_m; m += 2) {
          float x[4], y[4];  // of rows g and g + 8 of an instruction, entries e + 2 m and the next
          const int rows = j < call.J || F::PLAIN ? call.D_out - (e + 2 * m) : 0;
          load_four<F>(x, from + 2 * m * call.D_in, rows > 0 || F::PLAIN ? call.D_in - d : 0, call.vectors);
          load_four<F>(y, from + (2 * m + 1) * call.D_in, rows > 1 || F::PLAIN ? call.D_in - d : 0, call.vectors);
          to[m * 32] = {x[0], y[0], x[1], y[1]};
          to[m * 32 + 1] = {x[2], y[2], x[3], y[3]};
        }
      });
}

// c = a b as exactly as the type of the inputs asks for: half types are exact in tf32, TF32 rounds to it.
template <class F>
__device__ inline void exact_product(float* c, const float (&a)[4], const float (&b)[2]) {
  if constexpr (sizeof(typename F::In) == 2 || F::TF32) {
    multiply(c, a, b);
  } else {
    float a_hi[4], a_lo[4];
    const float b_hi[2] = {cut_to_tf32(rounded_to_tf32(b[0])), cut_to_tf32(rounded_to_tf32(b[1]))};
    const float b_lo[2] = {b[0] - b_hi[0], b[1] - b_hi[1]};
    for (int n = 0; n < 4; ++n) a_hi[n] = cut_to_tf32(a[n]), a_lo[n] = a[n] - a_hi[n];
    multiply(c, a_lo, b_hi);
    multiply_add(c, a_hi, b_lo);
    multiply_add(c, a_hi, b_hi);
  }
}

// Two neighbouring entries of the pose of sample b, which is operand b of an instruction.
template <class F>
__device__ inline void load_pose(float (&x)[2], const TileCall& call, int b, int i, int end, int d) {
  using In = typename F::In;
  const bool there = b < call.B && i < end && (F::PLAIN || !call.mask || call.mask[pose_of(call, b, i)]);
  const In* from = static_cast<const In*>(call.poses) + pose_of(call, b, i) * call.D_in + d;
  x[0] = x[1] = 0;
  if (F::PLAIN || call.vectors) {
    if (!there || d >= call.D_in) return;
    if constexpr (sizeof(In) == 4) {
      const float2 two = *reinterpret_cast<const float2*>(from);
      x[0] = two.x, x[1] = two.y;
    } else {
      const uint32_t two = *reinterpret_cast<const uint32_t*>(from);
      x[0] = widen(In{uint16_t(two)}), x[1] = widen(In{uint16_t(two >> 16)});
    }
  } else {
    for (int n = 0; n < 2; ++n)
      if (there && d + n < call.D_in) x[n] = widen(from[n]);
  }
  if constexpr (F::TF32) x[0] = rounded_to_tf32(x[0]), x[1] = rounded_to_tf32(x[1]);
}

// The votes of an input capsule for 8 samples; x are the first entries of the poses, further ones are had by
// load(float (&)[2], first of eight entries).
template <class F, class T, class Load>
__device__ inline void votes(float* u, const float4* fragments, const float (&x)[2], const TileCall& call,
                             Load&& load) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < T::M; ++m) {
    const float4 w = fragments[m * 32 + lane];
    const float a[4] = {w.x, w.y, w.z, w.w};
    exact_product<F>(u + 4 * m, a, x);
  }
  for (int d = 8; !F::PLAIN && d < call.D_in; d += 8) {
    float next[2];
    load(next, d);
    fragments += T::M * 32;
#pragma unroll
    for (int m = 0; m < T::M; ++m) {
      const float4 w = fragments[m * 32 + lane];
      const float a[4] = {w.x, w.y, w.z, w.w};
      float more[4];
      exact_product<F>(more, a, next);
      for (int n = 0; n < 4; ++n) u[4 * m + n] += more[n];
    }
  }
}

// ------------------------------------------------------------------------------------------------------------ lanes

// sum_e u[e] y[e] of a block's capsules, of both samples.
template <class T, int block>
__device__ inline void dot(float (&result)[2], const float* u, const float* y) {
  constexpr int first = T::reg(block, 0, 0);
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    float sum = 0;
#pragma unroll
    for (int n = 0; n < T::entries(block); ++n) {
      const int r = T::reg(block, n, s) - first;
      sum = fmaf(u[r], y[r], sum);
    }
#pragma unroll
    for (int mask = 4; mask < 4 * T::sharing(block); mask *= 2) sum += exchanged(sum, mask);
    result[s] = sum;
  }
}

// Over the lanes that have the same samples, which are all that differ in g.
__device__ inline float sum_over_capsules(float x) {
#pragma unroll
  for (int mask = 4; mask < 32; mask *= 2) x += exchanged(x, mask);
  return x;
}
__device__ inline float largest_over_capsules(float x) {
#pragma unroll
  for (int mask = 4; mask < 32; mask *= 2) x = fmaxf(x, exchanged(x, mask));
  return x;
}

// ----------------------------------------------------------------------------------------------------------- sweeps

enum class Sweep {
  uniform,     // the coupling is the same for all: no V, no prior
  softmax,     // all output capsules are in the tile: the softmax is taken on the way
  with_stats,  // its statistics are read
  stats_only,  // they are written, nothing else: goes through all tiles
};

// Sums of a slice of the input capsules: of c u or, where BACKWARD, of c (dc - sum_j c dc) u, which is dV.
template <class F, class T, Sweep kind, bool BACKWARD>
struct Sums {
  static constexpr bool summed = kind != Sweep::stats_only;
  const TileCall& call;
  const int lane = threadIdx.x % 32, g = lane / 4;
  int first_b, first_j;
  float V[4 * T::M], ds[BACKWARD ? 4 * T::M : 1], sums[summed ? 4 * T::M : 1];

  __device__ int sample(int s) const { return first_b + 2 * (lane % 4) + s; }
  // Of the statistics of input capsule i.
  __device__ float* stats(int i, int s) const { return call.stats + int64_t(i) * call.B + sample(s); }

  // This lane's in V, ds and a slice's sums.
  __device__ int64_t place() const { return T::first_place(call.J, first_b / 8, first_j / T::JT) + 4 * lane; }

  // V and ds of the tile.
  __device__ void start(int batch_tile, int tile) {
    first_b = 8 * batch_tile, first_j = tile * T::JT;
    const int64_t at = place();
    const bool there = first_b < call.B;  // the last block may have fewer samples
#pragma unroll
    for (int m = 0; m < T::M; ++m) {
      const float4 zero{0, 0, 0, 0};
      if constexpr (kind != Sweep::uniform) {
        const float4 x = call.V && there ? *reinterpret_cast<const float4*>(call.V + at + m * 128) : zero;
        V[4 * m] = x.x, V[4 * m + 1] = x.y, V[4 * m + 2] = x.z, V[4 * m + 3] = x.w;
      }
      if constexpr (BACKWARD) {
        const float4 x = there ? *reinterpret_cast<const float4*>(call.ds + at + m * 128) : zero;
        ds[4 * m] = x.x, ds[4 * m + 1] = x.y, ds[4 * m + 2] = x.z, ds[4 * m + 3] = x.w;
      }
      if constexpr (summed)
        for (int n = 0; n < 4; ++n) sums[4 * m + n] = 0;
    }
  }

  // What input capsule i adds.
  template <class Load>
  __device__ void add(const float4* fragments, const float (&x)[2], int i, Load&& load) {
    float u[4 * T::M];
    votes<F, T>(u, fragments, x, call, load);
    if constexpr (kind == Sweep::uniform) {
#pragma unroll
      for (int n = 0; n < 4 * T::M; ++n) sums[n] += u[n];
    } else {
      float c[T::blocks][2], dc[T::blocks][2], mean[2];
      logits(c, u, i);
      if constexpr (BACKWARD)
        each<T::blocks>(
            [&]<int block>() { dot<T, block>(dc[block], u + T::reg(block, 0, 0), ds + T::reg(block, 0, 0)); });
      if constexpr (kind == Sweep::with_stats)
        read_stats(c, mean, i);
      else
        softmax(c, dc, mean, i);
      if constexpr (summed)
        each<T::blocks>([&]<int block>() {
#pragma unroll
          for (int s = 0; s < 2; ++s) {
            const float factor = BACKWARD ? c[block][s] * (dc[block][s] - mean[s]) : c[block][s];
#pragma unroll
            for (int n = 0; n < T::entries(block); ++n) {
              const int r = T::reg(block, n, s);
              sums[r] = fmaf(factor, u[r], sums[r]);
            }
          }
        });
    }
  }

  __device__ void logits(float (&l)[T::blocks][2], const float* u, int i) {
    each<T::blocks>([&]<int block>() {
      l[block][0] = l[block][1] = 0;  // and not a vote times 0, which may be NaN
      if (F::PLAIN || call.V) dot<T, block>(l[block], u + T::reg(block, 0, 0), V + T::reg(block, 0, 0));
      const int j = first_j + T::capsule(block, g);
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        if (!F::PLAIN && call.prior && j < call.J && sample(s) < call.B)
          l[block][s] += kLog2e * call.prior[sample(s) * call.prior_stride_b + matrix_of(call, i, j)];
        if (!F::PLAIN && j >= call.J) l[block][s] = -INFINITY;
      }
    });
  }

  // c: logits on entry, coupling coefficients on return.
  __device__ void softmax(float (&c)[T::blocks][2], float (&dc)[T::blocks][2], float (&mean)[2], int i) {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const bool leaky = !F::PLAIN && call.leaky;
      const float leak = leaky && first_j == 0 ? 0 : -INFINITY;  // a further logit of 0, once for all tiles
      float top = c[0][s], sum = 0, weighted = 0;
      each<T::blocks>([&]<int block>() { top = fmaxf(top, c[block][s]); });
      top = fmaxf(largest_over_capsules(top), leak);
      const float finite = top == -INFINITY ? 0 : top;  // where all routes are closed the sum is 0 and c NaN
      each<T::blocks>([&]<int block>() {
        constexpr float share = 1.f / T::sharing(block);  // of the lanes that have the same capsule
        c[block][s] = power_of_two(c[block][s] - finite);
        sum = fmaf(share, c[block][s], sum);
        if constexpr (BACKWARD) weighted = fmaf(share * c[block][s], dc[block][s], weighted);
      });
      sum = sum_over_capsules(sum);
      if (leaky) sum += power_of_two(leak - finite);
      const float scale = reciprocal(sum);
      if constexpr (BACKWARD) mean[s] = sum_over_capsules(weighted) * scale;
      each<T::blocks>([&]<int block>() { c[block][s] *= scale; });
      if ((BACKWARD || !summed) && g == 0 && sample(s) < call.B)
        write_stats(top, log_of_two(sum), BACKWARD ? mean[s] : 0, i, s);
    }
  }

  // Coupling coefficients of logits c; at most 1 also where rounding would make them more, and a NaN stays one.
  __device__ void read_stats(float (&c)[T::blocks][2], float (&mean)[2], int i) {
    const int64_t size = int64_t(call.I) * call.B;
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const bool there = sample(s) < call.B;
      const float* at = stats(i, s);
      const float top = there ? at[0] : 0, log = there ? at[size] : 0;
      mean[s] = there && BACKWARD ? at[2 * size] : 0;
      each<T::blocks>([&]<int block>() {
        const float exponent = c[block][s] - top - log;
        c[block][s] = power_of_two(exponent > 0 ? 0 : exponent);
      });
    }
  }

  // Merged with those of earlier tiles.
  __device__ void write_stats(float top, float log, float mean, int i, int s) {
    const int64_t size = int64_t(call.I) * call.B;
    float* at = stats(i, s);
    if (!summed && first_j > 0) {
      const float both = fmaxf(at[0], top), finite = both == -INFINITY ? 0 : both;
      const float before = power_of_two(at[0] - finite + at[size]), now = power_of_two(top - finite + log);
      // Where all routes of a tile are closed its share is 0 and its mean NaN.
      const float weighted = (before == 0 ? 0 : before * at[2 * size]) + (now == 0 ? 0 : now * mean);
      top = both, log = log_of_two(before + now), mean = weighted / (before + now);
    }
    at[0] = top, at[size] = log, at[2 * size] = mean;
  }

  // The sums of the warps that shared the samples, in their order, then into `partial`.
  __device__ void finish(float* memory, int slice) {
    const int warp = threadIdx.x / 32, turn = warp / call.batch_tiles;
    if (call.batch_tiles < 4) {
      __syncthreads();
      float* mine = memory + warp * T::M * 128 + lane;
      if (turn > 0)
        for (int n = 0; n < 4 * T::M; ++n) mine[n * 32] = sums[n];
      __syncthreads();
      if (turn > 0) return;
      for (int other = warp + call.batch_tiles; other < 4; other += call.batch_tiles)
#pragma unroll
        for (int n = 0; n < 4 * T::M; ++n) sums[n] += memory[(other * T::M * 4 + n) * 32 + lane];
    }
    if (first_b >= call.B) return;
    const float scale = kind == Sweep::uniform ? call.share : 1.f;
    float* const to = call.partial + slice * call.places + place();
#pragma unroll
    for (int m = 0; m < T::M; ++m)
      *reinterpret_cast<float4*>(to + m * 128) = {scale * sums[4 * m], scale * sums[4 * m + 1], scale * sums[4 * m + 2],
                                                  scale * sums[4 * m + 3]};
  }
};

// Block: (slice, tile of output capsules, group of batch tiles), the last running fastest: its blocks share matrices.
template <class F, class T, Sweep kind, bool BACKWARD>
__global__ void __launch_bounds__(kTileThreads, BACKWARD ? 2 : 3) tile_sweep(TileCall call) {
  const int groups = int(pieces(pieces(call.B, 8), call.batch_tiles)), tiles = int(pieces(call.J, T::JT));
  const int group = blockIdx.x % groups, slice = blockIdx.x / groups / (kind == Sweep::stats_only ? 1 : tiles);
  const int warp = warp_of_block(), turn = warp / call.batch_tiles, turns = 4 / call.batch_tiles;
  const int begin = int(part_begin(call.I, call.slices, slice)), end = int(part_begin(call.I, call.slices, slice + 1));
  const int step = (call.D_in + 7) / 8 * T::M * 32;  // float4 of an input capsule
  float4* const memory = shared_memory<float4>();
  Sums<F, T, kind, BACKWARD> sums{call};
  const auto sweep_tile = [&](int tile) {
    sums.start(group * call.batch_tiles + warp % call.batch_tiles, tile);
    fill<F, T>(memory, call, begin, end, call.chunk, sums.first_j);
    const int d = 2 * (threadIdx.x % 4);
    float x[2], next[2];
    load_pose<F>(next, call, sums.first_b + sums.g, begin + turn, end, d);
    __syncthreads();
#pragma unroll 1
    for (int i = begin, chunk = 0; i < end; i += call.chunk, ++chunk) {
      const float4* now = memory + chunk % 2 * call.chunk * step;
      if (i + call.chunk < end)
        fill<F, T>(memory + (chunk + 1) % 2 * call.chunk * step, call, i + call.chunk, end, call.chunk, sums.first_j);
#pragma unroll 1
      for (int n = turn; n < call.chunk && i + n < end; n += turns) {
        x[0] = next[0], x[1] = next[1];
        load_pose<F>(next, call, sums.first_b + sums.g, i + n + turns, end, d);
        sums.add(now + n * step, x, i + n, [&](float (&more)[2], int first_d) {
          load_pose<F>(more, call, sums.first_b + sums.g, i + n, end, first_d + d);
        });
      }
      __syncthreads();
    }
  };
  if constexpr (kind == Sweep::stats_only) {
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) sweep_tile(tile);
  } else {
    sweep_tile(blockIdx.x / groups % tiles);
    sums.finish(shared_memory<float>(), blockIdx.x / groups / tiles);
  }
}

}  // namespace fastcaps::cuda
