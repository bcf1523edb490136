// Dynamic routing by tensor cores: a warp has 8 samples times a tile of output capsules in registers. This file has
// what all its sweeps share: arguments, matrices and poses as fragments, votes, products with them.
//
// Votes are products of the matrices, the rows, with the poses of 8 samples, the columns of mma.sync.m16n8k8. Their
// layout (cuda/layout.h) makes agreement, softmax and weighted sum a matter of a few lanes. Of float32
// three products of numbers split for tf32 are as exact as float32 itself; half types are exact in tf32 as they are.
// Long sums are added outside of the tensor cores, which cut their sums off.
//
// Logits are to base 2, and so is V: the kernels see log2(e) V. Statistics of the softmax are [3, I, B]: a
// shift, log2 of the sum of 2^(logit - shift) and, in the backward, sum_j c dc. The shift is the largest logit, or what
// keeps the logarithm small.
//
// Indices: g a quad of the warp, t a lane of it; m an instruction of the tile, r a register; s one of a lane's two
// samples; n an entry of a capsule that a lane has, or an input capsule of a chunk; d an entry of an input pose.
#pragma once

#include <cstdint>

#include "cuda/layout.h"
#include "cuda/platform.h"
#include "numbers.h"

namespace fastcaps::cuda {

constexpr int kTileThreads = 128;  // four warps
// Blocks that a multiprocessor has at a time, by their registers: of a sweep of the forward, and of the backward.
constexpr int kForwardBlocks = 3, kBackwardBlocks = 2;

struct TileArguments {
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
  int band_tiles;  // batch tiles of a block: 4; with 2 or 1 its four warps share them, and take turns with the capsules
  int chunk_capsules;      // input capsules whose matrices are in shared memory at a time
  int64_t places;          // Tile::places
  float uniform_coupling;  // the coupling where it is the same for all: 1 / (J + leaky)
  bool leaky, aligned;     // whether four entries of a pose's matrix row can be loaded at once
  // Of the last sweep only: V and ds are [T, Tile::places], stats [T, 3, I, B].
  int T, first_t;
  bool detach;
  Items items;                   // a panel: `chunk_capsules` input capsules and an octet of D_in
  float* partial_panels;         // [2 blocks, partial_panel_size], of panels that several blocks have
  float *d_prior, *d_poses_sum;  // float32: [I, J] or [B, I, J]; [B, I, D_in]
  void *d_poses, *d_weight;
};

// A partial gradient of a panel: of the weight, [chunk, J, D_out, 8], and of a prior for all samples, [chunk, J].
FASTCAPS_INDEX int64_t partial_weight_size(const TileArguments& args) {
  return int64_t(args.chunk_capsules) * args.J * args.D_out * 8;
}
FASTCAPS_INDEX int64_t partial_panel_size(const TileArguments& args) {
  return partial_weight_size(args) + int64_t(args.chunk_capsules) * args.J;
}

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
__device__ inline int64_t pose_of(const TileArguments& args, int b, int i) { return int64_t(b) * args.I + i; }
__device__ inline int64_t matrix_of(const TileArguments& args, int i, int j) { return int64_t(i) * args.J + j; }

// Whether the mask leaves an input capsule of a sample out: its pose and its prior count as 0, whatever they hold.
template <class F>
__device__ inline bool masked(const TileArguments& args, int b, int i) {
  return !F::PLAIN && args.mask && !args.mask[pose_of(args, b, i)];
}

// A logit, to base two, with the prior of this input and output capsule. One that is finite stays finite, however low:
// -inf alone closes a route.
__device__ inline float plus_prior(const TileArguments& args, float logit, int b, int64_t ij) {
  return fma_towards_zero(kLog2e<float>, args.prior[b * args.prior_stride_b + ij], logit);
}

// Four entries of a matrix row, `count` of them there.
template <class F>
__device__ inline void load_four(float (&to)[4], const typename F::In* from, int count, bool aligned) {
  using In = typename F::In;
  if ((F::PLAIN || aligned) && count >= 4) {
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
__device__ void fill(float4* fragments, const TileArguments& args, int i, int end, int count, int first_j) {
  static_assert(T::M % 2 == 0 && T::first_m(1) % 2 == 0);
  const int lane = threadIdx.x % 32, q = lane % 2, g = lane / 2 % 8, odd = lane / 16, octets = (args.D_in + 7) / 8;
  for (int c = threadIdx.x / 32; c < count && i + c < end; c += kTileThreads / 32)
    for (int octet = 0; octet < octets; ++octet)
      each<T::sections>([&]<int section>() {
        constexpr int first_m = T::first_m(section),
                      last_m = section + 1 < T::sections ? T::first_m(section + 1) : T::M;
        const int j = first_j + T::capsule(section, g);
        const int e = T::first_entry(section, g) + 2 * odd, d = 8 * octet + 4 * q;
        const auto* from = static_cast<const typename F::In*>(args.weight) +
                           (matrix_of(args, i + c, j) * args.D_out + e) * args.D_in + d;
        float4* to = fragments + ((c * octets + octet) * T::M + first_m + odd) * 32 + 4 * g + 2 * q;
#pragma unroll 2  // so many loads are on their way at a time; more would need registers that V and the sums have
        for (int m = 0; m < last_m - first_m; m += 2) {
          float x[4], y[4];  // of rows g and g + 8 of an instruction, entries e + 2 m and the next
          const int rows = j < args.J || F::PLAIN ? args.D_out - (e + 2 * m) : 0;
          load_four<F>(x, from + 2 * m * args.D_in, rows > 0 || F::PLAIN ? args.D_in - d : 0, args.aligned);
          load_four<F>(y, from + (2 * m + 1) * args.D_in, rows > 1 || F::PLAIN ? args.D_in - d : 0, args.aligned);
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
    const float b_hi[2] = {nearest_tf32(b[0]), nearest_tf32(b[1])};
    const float b_lo[2] = {b[0] - b_hi[0], b[1] - b_hi[1]};
    for (int n = 0; n < 4; ++n) a_hi[n] = cut_to_tf32(a[n]), a_lo[n] = a[n] - a_hi[n];
    multiply(c, a_lo, b_hi);
    multiply_add(c, a_hi, b_lo);
    multiply_add(c, a_hi, b_hi);
  }
}

// Two neighbouring entries of the pose of sample b, which is operand b of an instruction.
template <class F>
__device__ inline void load_pose(float (&x)[2], const TileArguments& args, int b, int i, int end, int d) {
  using In = typename F::In;
  const bool there = b < args.B && i < end && !masked<F>(args, b, i);
  const In* from = static_cast<const In*>(args.poses) + pose_of(args, b, i) * args.D_in + d;
  x[0] = x[1] = 0;
  if (F::PLAIN || args.aligned) {
    if (!there || d >= args.D_in) return;
    if constexpr (sizeof(In) == 4) {
      const float2 two = *reinterpret_cast<const float2*>(from);
      x[0] = two.x, x[1] = two.y;
    } else {
      const uint32_t two = *reinterpret_cast<const uint32_t*>(from);
      x[0] = widen(In{uint16_t(two)}), x[1] = widen(In{uint16_t(two >> 16)});
    }
  } else {
    for (int n = 0; n < 2; ++n)
      if (there && d + n < args.D_in) x[n] = widen(from[n]);
  }
  if constexpr (F::TF32) x[0] = rounded_to_tf32(x[0]), x[1] = rounded_to_tf32(x[1]);
}

// The votes of an input capsule for 8 samples; x are the first entries of the poses, further ones are had by
// load(float (&)[2], first of eight entries).
template <class F, class T, class Load>
__device__ inline void votes(float* u, const float4* fragments, const float (&x)[2], const TileArguments& args,
                             Load&& load) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < T::M; ++k) {
    // The smaller section first: its agreements pass between lanes, meanwhile the products of the other one go on.
    const int m = (k + T::first_m(T::sections - 1)) % T::M;
    const float4 w = fragments[m * 32 + lane];
    const float a[4] = {w.x, w.y, w.z, w.w};
    exact_product<F>(u + 4 * m, a, x);
  }
  for (int d = 8; !F::PLAIN && d < args.D_in; d += 8) {
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

// sum_e u[e] y[e] of a section's capsules, of both samples.
template <class T, int section>
__device__ inline void dot(float (&result)[2], const float* u, const float* y) {
  constexpr int first = T::reg(section, 0, 0);
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    float sum = 0;
#pragma unroll
    for (int n = 0; n < T::entries(section); ++n) {
      const int r = T::reg(section, n, s) - first;
      sum = fmaf(u[r], y[r], sum);
    }
#pragma unroll
    for (int mask = 4; mask < 4 * T::quads(section); mask *= 2) sum += exchanged(sum, mask);
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

}  // namespace fastcaps::cuda
