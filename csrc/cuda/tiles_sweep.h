// A sweep over the input capsules by tensor cores: sums of c u (in the backward of db u), statistics of the softmax.
#pragma once

#include <cstdint>

#include "cuda/layout.h"
#include "cuda/platform.h"
#include "cuda/tiles.h"
#include "numbers.h"

namespace fastcaps::cuda {

enum class Sweep {
  uniform,     // the coupling is the same for all: no V, no prior
  softmax,     // all output capsules are in the tile: the softmax is taken on the way
  with_stats,  // its statistics are read
  stats_only,  // they are written, nothing else: goes through all tiles
};

// Sums of 2^logit for which logits need not be shifted by the largest one: no shares above 2^-106 are left out, and
// gradients may be as large as 2^87.
constexpr float kLeastSum = 0x1p-20f, kLargestSum = 0x1p40f;

// Whether a sweep first takes softmaxes of logits as they are: finding the largest one is a fifth of its time, by the
// cycle model. Where a sum is not within the bounds, the sweep is done again.
template <class F, Sweep kind>
constexpr bool kTriesUnshifted = F::PLAIN && kind == Sweep::softmax;

// Sums of a slice of the input capsules: of c u or, where BACKWARD, of c (dc - sum_j c dc) u, which is dV.
// SHIFTED: the softmax subtracts the largest logit.
template <class F, class T, Sweep kind, bool BACKWARD, bool SHIFTED>
struct Sums {
  static constexpr bool summed = kind != Sweep::stats_only;
  const TileArguments& args;
  const int lane = threadIdx.x % 32, g = lane / 4;
  int first_b, first_j;
  uint32_t farthest = 0;  // of the sums of 2^logit, in their bits, from kLeastSum upwards; those below it wrap around
  float V[4 * T::M], ds[BACKWARD ? 4 * T::M : 1], sums[summed ? 4 * T::M : 1];

  __device__ int sample(int s) const { return first_b + 2 * (lane % 4) + s; }
  // Whether a softmax needs the largest logit.
  __device__ bool out_of_range() const { return farthest > bits_of(kLargestSum) - bits_of(kLeastSum); }
  // Of the statistics of input capsule i.
  __device__ float* stats(int i, int s) const { return args.stats + int64_t(i) * args.B + sample(s); }

  // This lane's in V, ds and a slice's sums.
  __device__ int64_t place() const { return T::first_place(args.J, first_b / 8, first_j / T::JT) + 4 * lane; }

  // V and ds of the tile.
  __device__ void start(int batch_tile, int tile) {
    first_b = 8 * batch_tile, first_j = tile * T::JT;
    const int64_t at = place();
    const bool there = first_b < args.B;  // the last block may have fewer samples
#pragma unroll
    for (int m = 0; m < T::M; ++m) {
      const float4 zero{0, 0, 0, 0};
      if constexpr (kind != Sweep::uniform) {
        const float4 x = args.V && there ? *reinterpret_cast<const float4*>(args.V + at + m * 128) : zero;
        V[4 * m] = x.x, V[4 * m + 1] = x.y, V[4 * m + 2] = x.z, V[4 * m + 3] = x.w;
      }
      if constexpr (BACKWARD) {
        const float4 x = there ? *reinterpret_cast<const float4*>(args.ds + at + m * 128) : zero;
        ds[4 * m] = x.x, ds[4 * m + 1] = x.y, ds[4 * m + 2] = x.z, ds[4 * m + 3] = x.w;
      }
      if constexpr (summed)
        for (int n = 0; n < 4; ++n) sums[4 * m + n] = 0;
    }
  }

  // What input capsule i adds, whose votes are had by get_votes(u).
  template <class Votes>
  __device__ void add(int i, Votes&& get_votes) {
    float u[4 * T::M];
    get_votes(u);
    if constexpr (kind == Sweep::uniform) {
#pragma unroll
      for (int n = 0; n < 4 * T::M; ++n) sums[n] += u[n];
    } else {
      float c[T::sections][2], dc[T::sections][2], mean[2];
      logits(c, u, i);
      if constexpr (BACKWARD)
        each<T::sections>([&]<int section>() {
          dot<T, section>(dc[section], u + T::reg(section, 0, 0), ds + T::reg(section, 0, 0));
        });
      if constexpr (kind == Sweep::with_stats)
        read_stats(c, mean, i);
      else
        softmax(c, dc, mean, i);
      if constexpr (summed)
        each<T::sections>([&]<int section>() {
#pragma unroll
          for (int s = 0; s < 2; ++s) {
            const float factor = BACKWARD ? c[section][s] * (dc[section][s] - mean[s]) : c[section][s];
#pragma unroll
            for (int n = 0; n < T::entries(section); ++n) {
              const int r = T::reg(section, n, s);
              sums[r] = fmaf(factor, u[r], sums[r]);
            }
          }
        });
    }
  }

  __device__ void logits(float (&l)[T::sections][2], const float* u, int i) {
    each<T::sections>([&]<int section>() {
      l[section][0] = l[section][1] = 0;  // and not a vote times 0, which may be NaN
      if (F::PLAIN || args.V) dot<T, section>(l[section], u + T::reg(section, 0, 0), V + T::reg(section, 0, 0));
      const int j = first_j + T::capsule(section, g);
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        if (!F::PLAIN && args.prior && j < args.J && sample(s) < args.B && !masked<F>(args, sample(s), i))
          l[section][s] = plus_prior(args, l[section][s], sample(s), matrix_of(args, i, j));
        if (!F::PLAIN && j >= args.J) l[section][s] = -INFINITY;
      }
    });
  }

  // c: logits on entry, coupling coefficients on return.
  __device__ void softmax(float (&c)[T::sections][2], float (&dc)[T::sections][2], float (&mean)[2], int i) {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const bool leaky = !F::PLAIN && args.leaky && first_j == 0;  // a further logit of 0, once for all tiles
      float top = 0, sum = SHIFTED ? kLeastShare<float> : 0, weighted = 0;
      if constexpr (SHIFTED) {
        top = c[0][s];
        each<T::sections>([&]<int section>() { top = fmaxf(top, c[section][s]); });
        top = fmaxf(largest_over_capsules(top), leaky ? 0 : kLeastLogit<float>);
      }
      each<T::sections>([&]<int section>() {
        constexpr float once = 1.f / T::quads(section);  // of the lanes that have the same capsule
        c[section][s] = power_of_two(SHIFTED ? c[section][s] - top : c[section][s]);
        sum = fmaf(once, c[section][s], sum);
        if constexpr (BACKWARD) weighted = fmaf(once * c[section][s], dc[section][s], weighted);
      });
      sum = sum_over_capsules(sum);
      if (leaky) sum += power_of_two(-top);
      if constexpr (!SHIFTED) {
        const uint32_t distance = bits_of(sum) - bits_of(kLeastSum);
        farthest = distance > farthest ? distance : farthest;
      }
      const float scale = reciprocal(sum);
      if constexpr (BACKWARD) mean[s] = sum_over_capsules(weighted) * scale;
      each<T::sections>([&]<int section>() { c[section][s] *= scale; });
      if ((BACKWARD || !summed) && g == 0 && sample(s) < args.B) {
        if constexpr (!SHIFTED) top = take_exponent(sum);
        write_stats(top, log_of_two(sum), BACKWARD ? mean[s] : 0, i, s);
      }
    }
  }

  // Coupling coefficients of logits c; at most 1 also where rounding would make them more, and a NaN stays one.
  __device__ void read_stats(float (&c)[T::sections][2], float (&mean)[2], int i) {
    const int64_t size = int64_t(args.I) * args.B;
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const bool there = sample(s) < args.B;
      const float* at = stats(i, s);
      const float top = there ? at[0] : 0, log = there ? at[size] : 0;
      mean[s] = there && BACKWARD ? at[2 * size] : 0;
      each<T::sections>([&]<int section>() {
        const float exponent = c[section][s] - top - log;
        c[section][s] = power_of_two(exponent > 0 ? 0 : exponent);
      });
    }
  }

  // Merged with those of earlier tiles.
  __device__ void write_stats(float top, float log, float mean, int i, int s) {
    const int64_t size = int64_t(args.I) * args.B;
    float* at = stats(i, s);
    if (!summed && first_j > 0) {
      const float both = fmaxf(at[0], top);
      const float before = power_of_two(at[0] - both + at[size]), now = power_of_two(top - both + log);
      mean = (before * at[2 * size] + now * mean) / (before + now);
      top = both, log = log_of_two(before + now);
    }
    at[0] = top, at[size] = log, at[2 * size] = mean;
  }

  // The sums of the warps that shared the samples, in their order, then into `partial`.
  __device__ void finish(float* memory, int slice) {
    const int warp = threadIdx.x / 32, turn = warp / args.band_tiles;
    if (args.band_tiles < 4) {
      __syncthreads();
      float* mine = memory + warp * T::M * 128 + lane;
      if (turn > 0)
        for (int n = 0; n < 4 * T::M; ++n) mine[n * 32] = sums[n];
      __syncthreads();
      if (turn > 0) return;
      for (int other = warp + args.band_tiles; other < 4; other += args.band_tiles)
#pragma unroll
        for (int n = 0; n < 4 * T::M; ++n) sums[n] += memory[(other * T::M * 4 + n) * 32 + lane];
    }
    if (first_b >= args.B) return;
    const float scale = kind == Sweep::uniform ? args.uniform_coupling : 1.f;
    float* const to = args.partial + slice * args.places + place();
#pragma unroll
    for (int m = 0; m < T::M; ++m)
      *reinterpret_cast<float4*>(to + m * 128) = {scale * sums[4 * m], scale * sums[4 * m + 1], scale * sums[4 * m + 2],
                                                  scale * sums[4 * m + 3]};
  }
};

// A block's part of a sweep: a slice of the input capsules, a band of batch tiles. All its threads return whether
// logits must be shifted for it, and then nothing has been written but statistics.
template <class F, class T, Sweep kind, bool BACKWARD, bool SHIFTED>
__device__ bool sweep_slice(const TileArguments& args, int band, int slice, int tile) {
  const int warp = warp_of_block(), turn = warp / args.band_tiles, turns = 4 / args.band_tiles;
  const int begin = int(share_begin(args.I, args.slices, slice)),
            end = int(share_begin(args.I, args.slices, slice + 1));
  const int octets = F::PLAIN ? 1 : (args.D_in + 7) / 8, capsule_fragments = octets * T::M * 32;
  float4* const memory = shared_memory<float4>();
  Sums<F, T, kind, BACKWARD, SHIFTED> sums{args};
  sums.start(band * args.band_tiles + warp % args.band_tiles, tile);
  fill<F, T>(memory, args, begin, end, args.chunk_capsules, sums.first_j);
  const int d = 2 * (threadIdx.x % 4);
  float x[2], next[2];
  load_pose<F>(next, args, sums.first_b + sums.g, begin + turn, end, d);
  __syncthreads();
#pragma unroll 1
  for (int i = begin, chunk = 0; i < end; i += args.chunk_capsules, ++chunk) {
    const float4* now = memory + (chunk % 2 * args.chunk_capsules + turn) * capsule_fragments;
    if (i + args.chunk_capsules < end)
      fill<F, T>(memory + (chunk + 1) % 2 * args.chunk_capsules * capsule_fragments, args, i + args.chunk_capsules, end,
                 args.chunk_capsules, sums.first_j);
    const int last = i + args.chunk_capsules < end ? i + args.chunk_capsules : end;
#pragma unroll 1
    for (int n = i + turn; n < last; n += turns, now += turns * capsule_fragments) {
      x[0] = next[0], x[1] = next[1];
      load_pose<F>(next, args, sums.first_b + sums.g, n + turns, end, d);
      sums.add(n, [&](float* u) {
        votes<F, T>(u, now, x, args, [&](float (&more)[2], int first_d) {
          load_pose<F>(more, args, sums.first_b + sums.g, n, end, first_d + d);
        });
      });
    }
    __syncthreads();
  }
  if (!SHIFTED && __syncthreads_or(sums.out_of_range())) return true;
  if constexpr (kind != Sweep::stats_only) sums.finish(shared_memory<float>(), slice);
  return false;
}

// Block: (slice, tile of output capsules, band of batch tiles), the last running fastest: its blocks share matrices.
template <class F, class T, Sweep kind, bool BACKWARD>
__global__ void __launch_bounds__(kTileThreads, BACKWARD ? kBackwardBlocks : kForwardBlocks)
    tile_sweep(TileArguments args) {
  const int bands = int(ceil_div(ceil_div(args.B, kTileSamples), args.band_tiles)),
            tiles = int(ceil_div(args.J, T::JT)), band = blockIdx.x % bands, rest = blockIdx.x / bands;
  if constexpr (kind == Sweep::stats_only) {
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) sweep_slice<F, T, kind, BACKWARD, true>(args, band, rest, tile);
  } else {
    if constexpr (kTriesUnshifted<F, kind>)
      if (!sweep_slice<F, T, kind, BACKWARD, false>(args, band, rest / tiles, rest % tiles)) return;
    sweep_slice<F, T, kind, BACKWARD, true>(args, band, rest / tiles, rest % tiles);
  }
}

}  // namespace fastcaps::cuda
