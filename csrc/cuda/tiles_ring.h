// A sweep by tensor cores whose matrices and poses pass through a ring in shared memory: for float32 in the plain form
// with poses of eight entries, and so many samples that a block of many warps has a batch tile for each.
//
// What the block needs of a chunk of input capsules is copied by all its threads, one chunk ahead, and read as it lies.
// No warp waits until all others are at the same place: a chunk's place in the ring has a barrier for "filled" and one
// for "read", at which those wait that are to read or to fill it.
#pragma once

#include <cstdint>

#include "cuda/layout.h"
#include "cuda/platform.h"
#include "cuda/tiles.h"
#include "cuda/tiles_sweep.h"
#include "numbers.h"

namespace fastcaps::cuda {

// Warps of a block, the only one of its multiprocessor, by their registers.
constexpr int kForwardRingWarps = 12, kBackwardRingWarps = 8;
FASTCAPS_INDEX int ring_warps(bool backward) { return backward ? kBackwardRingWarps : kForwardRingWarps; }
constexpr int kRingChunk = 2;   // input capsules
constexpr int kRingPlaces = 4;  // for chunks
constexpr int kRingAhead = 2;   // chunks: a place is filled again two chunks after it was read, and two before the next

// Where things lie in a chunk's place, in units of 16 bytes, half a row of eight entries. Of a matrix two units stay
// free after four rows and one at the end, of the poses of a sample one: so eight rows that are read at once never meet
// in a bank (where D is 16).
template <class T, int WARPS>
struct RingPlace {
  static constexpr int matrix = 2 * T::D + T::D / 2 + 1, capsule = T::JT * matrix, pose = 2 * kRingChunk + 1;
  static constexpr int poses = kRingChunk * capsule, size = poses + WARPS * kTileSamples * pose;
  static FASTCAPS_INDEX int row(int j, int e) { return matrix * j + 2 * e + e / 4 * 2; }
};
constexpr int kRingUnit = 16;
template <class T, int WARPS>
constexpr int64_t kRingBytes = kRingPlaces * (RingPlace<T, WARPS>::size * kRingUnit + 2 * sizeof(Barrier));

template <class T, int WARPS>
struct Ring {
  using Place = RingPlace<T, WARPS>;
  const TileArguments& args;
  const int begin, end, first_b, first_j;  // first_b: of the block
  int chunk = 0;                           // the next

  __device__ char* place(int c) const { return shared_memory<char>() + c % kRingPlaces * (Place::size * kRingUnit); }
  __device__ Barrier* barriers() const {
    return reinterpret_cast<Barrier*>(shared_memory<char>() + kRingPlaces * Place::size * kRingUnit);
  }
  __device__ Barrier* filled(int c) const { return barriers() + c % kRingPlaces; }
  __device__ Barrier* read(int c) const { return barriers() + kRingPlaces + c % kRingPlaces; }
  __device__ static int parity(int c) { return c / kRingPlaces % 2; }  // of the barriers' phases

  __device__ void start() const {
    if (threadIdx.x < kRingPlaces) {
      start_barrier(filled(threadIdx.x), 32 * WARPS);
      start_barrier(read(threadIdx.x), WARPS);
    }
    __syncthreads();
  }

  // This thread's copies of chunk c, which begins with input capsule i.
  __device__ void fill(int c, int i) const {
    if (i >= end) return;
    constexpr int units = T::JT * T::D * 2, threads = 32 * WARPS;   // units: of an input capsule's matrices
    const int capsules = end - i, thread = forgotten(threadIdx.x);  // capsules: or more than a chunk has
    const Shared to = shared_place(place(c));
#pragma unroll
    for (int first = 0; first < units; first += threads) {
      const int unit = first + thread, j = unit / (2 * T::D), half = unit % (2 * T::D);
      if (units % threads && unit >= units) break;
      const float* from = static_cast<const float*>(args.weight) + matrix_of(args, i, first_j) * (T::D * 8) + 4 * unit;
      const Shared row = to + kRingUnit * (Place::row(j, half / 2) + half % 2);
#pragma unroll
      for (int k = 0; k < kRingChunk; ++k, from += args.J * (T::D * 8))
        if (k < capsules) copy_16(row + kRingUnit * k * Place::capsule, from, true);
    }
#pragma unroll
    for (int first = 0; first < WARPS * kTileSamples * 2 * kRingChunk; first += threads) {
      const int unit = first + thread, b = unit / (2 * kRingChunk), half = unit % (2 * kRingChunk);
      const float* const from = static_cast<const float*>(args.poses) + pose_of(args, first_b + b, i) * 8 + 4 * half;
      copy_16(to + kRingUnit * (Place::poses + b * Place::pose + half), from,
              first_b + b < args.B && half / 2 < capsules);
    }
    arrive_after_copies(filled(c));
  }
};

// As sweep_slice.
template <class F, class T, Sweep kind, bool BACKWARD, bool SHIFTED, int WARPS>
__device__ bool ring_slice(Ring<T, WARPS>& ring, int slice) {
  using Place = RingPlace<T, WARPS>;
  const TileArguments& args = ring.args;
  const int warp = warp_of_block(), lane = threadIdx.x % 32;
  Sums<F, T, kind, BACKWARD, SHIFTED> sums{args};
#pragma unroll
  for (int n = 0; n < kRingAhead; ++n) ring.fill(ring.chunk + n, ring.begin + n * kRingChunk);
  sums.start(ring.first_b / kTileSamples + warp, ring.first_j / T::JT);

  // The rows whose places this lane gives: of matrices, in each section, and of poses.
  const int r = lane % 8 + lane / 8 % 2 * 8, half = lane / 16;
  const auto row = [&](int section) {
    const int m = T::first_m(section);
    return kRingUnit * (Place::row(T::row_capsule(m, r), T::row_entry(m, r)) + half);
  };
  const int first = row(0), last_section = row(T::sections - 1);
  const int pose = kRingUnit * (Place::poses + (8 * warp + lane / 4) * Place::pose) + lane % 4 * 4;
#pragma unroll 1
  for (int i = ring.begin; i < ring.end; i += kRingChunk, ++ring.chunk) {
    if (ring.chunk + kRingAhead >= kRingPlaces)
      wait_for(ring.read(ring.chunk + kRingAhead), ring.parity(ring.chunk + kRingAhead - kRingPlaces));
    ring.fill(ring.chunk + kRingAhead, i + kRingAhead * kRingChunk);
    wait_for(ring.filled(ring.chunk), ring.parity(ring.chunk));
    const int last = i + kRingChunk < ring.end ? i + kRingChunk : ring.end;
    const float* entries = reinterpret_cast<const float*>(ring.place(ring.chunk) + pose);
    Shared matrices = shared_place(ring.place(ring.chunk));
#pragma unroll 1
    for (int capsule = i; capsule < last; ++capsule, matrices += kRingUnit * Place::capsule, entries += kOctet) {
      float x[2] = {entries[0], entries[4]};
      if constexpr (F::TF32) x[0] = rounded_to_tf32(x[0]), x[1] = rounded_to_tf32(x[1]);
      sums.add(capsule, [&](float* u) {
        each<T::M>([&]<int number>() {
          constexpr int m = (number + T::first_m(T::sections - 1)) % T::M, section = T::section_of_m(m);
          constexpr int e = 2 * (m - T::first_m(section));  // by which the lanes' entries differ from those of `row`
          float a[4];
          load_operand<kRingUnit * Place::row(0, e)>(a, matrices + (section == 0 ? first : last_section));
          if constexpr (F::TF32)
            for (int n = 0; n < 4; ++n) a[n] = rounded_to_tf32(a[n]);
          exact_product<F>(u + 4 * m, a, x);
        });
      });
    }
    __syncwarp();
    if (lane == 0) arrive(ring.read(ring.chunk));
  }
  if (!SHIFTED && __syncthreads_or(sums.out_of_range())) return true;
  sums.finish(nullptr, slice);
  return false;
}

// Block: (slice, tile of output capsules, band of WARPS batch tiles), the last running fastest.
template <class F, class T, Sweep kind, bool BACKWARD>
__global__ void __launch_bounds__(32 * ring_warps(BACKWARD), 1) tile_ring_sweep(TileArguments args) {
  constexpr int WARPS = ring_warps(BACKWARD);
  const int bands = int(ceil_div(ceil_div(args.B, kTileSamples), WARPS)), tiles = int(ceil_div(args.J, T::JT));
  const int band = blockIdx.x % bands, slice = blockIdx.x / bands / tiles, tile = blockIdx.x / bands % tiles;
  Ring<T, WARPS> ring{args, int(share_begin(args.I, args.slices, slice)),
                      int(share_begin(args.I, args.slices, slice + 1)), kTileSamples * band * WARPS, tile * T::JT};
  ring.start();
  if constexpr (kTriesUnshifted<F, kind>)
    if (!ring_slice<F, T, kind, BACKWARD, false>(ring, slice)) return;
  ring_slice<F, T, kind, BACKWARD, true>(ring, slice);
}

}  // namespace fastcaps::cuda
