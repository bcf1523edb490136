// A sweep by tensor cores whose matrices and poses pass through a ring in shared memory: for float32 in the plain form
// with poses of eight entries, and so many samples that a block of many warps has a batch tile for each.
//
// What the block needs of a chunk of input capsules is copied by all its threads, one chunk ahead, and read as it lies.
// No warp waits until all others are at the same place: a chunk's buffer in the ring has a barrier for "filled" and one
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
constexpr int kRingChunk = 3;    // input capsules
constexpr int kRingBuffers = 3;  // for chunks: one that is read, one that is filled, one that slower warps still read

// Where things lie in a chunk's buffer, in pieces of 16 bytes, half a row of eight entries: matrices in their order,
// but two pieces stay free after eight and one more after 32, so that eight rows that are read at once never meet in a
// bank; the poses of a sample, after which one stays free.
constexpr int kPieceBytes = 16, kPieces = 32, kPiecesPadded = 41;
FASTCAPS_INDEX int padded(int piece) { return piece + piece / 8 * 2 + piece / kPieces; }
template <class T, int WARPS>
struct RingBuffer {
  static constexpr int pieces = 2 * T::JT * T::D;  // of an input capsule's matrices
  static constexpr int capsule = padded(pieces), pose = 2 * kRingChunk + 1;
  static constexpr int poses = kRingChunk * capsule, size = poses + WARPS * kTileSamples * pose;
  static_assert(pieces % kPieces == 0 && padded(kPieces) == kPiecesPadded);
  static FASTCAPS_INDEX int row(int j, int e) { return padded(2 * (j * T::D + e)); }
};
template <class T, int WARPS>
constexpr int64_t kRingBytes = kRingBuffers * (RingBuffer<T, WARPS>::size * kPieceBytes + 2 * sizeof(Barrier));

template <class T, int WARPS>
struct Ring {
  using Buffer = RingBuffer<T, WARPS>;
  const TileArguments& args;
  const int begin, end, first_b;  // input capsules of the slice, and the first sample of the block
  unsigned n = 0, round = 0;      // the buffer of the chunk that is next, and how often all were used before

  __device__ char* buffer(unsigned n) const { return shared_memory<char>() + n * (Buffer::size * kPieceBytes); }
  __device__ Barrier* filled(unsigned n) const { return reinterpret_cast<Barrier*>(buffer(kRingBuffers)) + n; }
  __device__ Barrier* read(unsigned n) const { return filled(kRingBuffers + n); }
  __device__ unsigned next() const { return n + 1 == kRingBuffers ? 0 : n + 1; }
  __device__ unsigned next_round() const { return n + 1 == kRingBuffers ? round + 1 : round; }

  __device__ void start() const {
    if (threadIdx.x < kRingBuffers) {
      start_barrier(filled(threadIdx.x), 32 * WARPS);
      start_barrier(read(threadIdx.x), WARPS);
    }
    __syncthreads();
  }

  // This thread's copies of the chunk that begins with input capsule i.
  __device__ void fill(unsigned n, int i) const {
    constexpr unsigned threads = 32 * WARPS, of_sample = 8;  // threads that share a sample's poses
    static_assert(2 * kRingChunk <= of_sample && kTileSamples % (32 / of_sample) == 0);
    const unsigned capsules = least(end - i, kRingChunk), thread = forgotten(threadIdx.x);
    const Shared to = shared_address(buffer(n));
    const float* const weight = static_cast<const float*>(args.weight) + int64_t(i) * (4 * Buffer::pieces) + 4 * thread;
    const Shared row = to + kPieceBytes * (thread / kPieces * kPiecesPadded + padded(thread % kPieces));
#pragma unroll
    for (unsigned piece = 0; piece < kRingChunk * Buffer::pieces; piece += threads)
      if (piece + thread < capsules * Buffer::pieces)
        copy_16(row + kPieceBytes * (piece / kPieces * kPiecesPadded), weight + 4 * piece, true);
    const unsigned b = thread / of_sample, half = thread % of_sample;
    const float* const poses = static_cast<const float*>(args.poses) + pose_of(args, first_b + b, i) * 8 + 4 * half;
#pragma unroll
    for (unsigned more = 0; more < WARPS * kTileSamples; more += threads / of_sample)
      if (half < 2 * kRingChunk)
        copy_16(to + kPieceBytes * (Buffer::poses + (b + more) * Buffer::pose + half),
                poses + int64_t(more) * args.I * 8, first_b + b + more < unsigned(args.B) && half < 2 * capsules);
    arrive_after_copies(filled(n));
  }
};

// As sweep_slice.
template <class F, class T, Sweep kind, bool BACKWARD, bool SHIFTED, int WARPS>
__device__ bool ring_slice(Ring<T, WARPS>& ring, int slice) {
  using Buffer = RingBuffer<T, WARPS>;
  const TileArguments& args = ring.args;
  const int warp = warp_of_block(), lane = threadIdx.x % 32;
  Sums<F, T, kind, BACKWARD, SHIFTED> sums{args};
  if (ring.begin < ring.end) ring.fill(ring.n, ring.begin);
  sums.start(ring.first_b / kTileSamples + warp, 0);

  // The rows whose addresses this lane gives: of matrices, in each section, and of poses.
  const int r = lane % 8 + lane / 8 % 2 * 8, half = lane / 16;
  const auto row = [&](int section) {
    const int m = T::first_m(section);
    return kPieceBytes * (Buffer::row(T::row_capsule(m, r), T::row_entry(m, r)) + half);
  };
  const int first = row(0), last_section = row(T::sections - 1);
  const int pose = kPieceBytes * (Buffer::poses + (8 * warp + lane / 4) * Buffer::pose) + lane % 4 * 4;
#pragma unroll 1
  for (int i = ring.begin; i < ring.end; i += kRingChunk) {
    const unsigned n = ring.n, next = ring.next(), round = ring.round, next_round = ring.next_round();
    if (i + kRingChunk < ring.end) {
      wait_for(ring.read(next), (next_round + 1) % 2);  // in the first round nobody has read it, and it is over already
      ring.fill(next, i + kRingChunk);
    }
    wait_for(ring.filled(n), round % 2);
    __syncwarp();
    const int capsules = least(ring.end - i, kRingChunk);
    const float* const poses = reinterpret_cast<const float*>(ring.buffer(n) + pose);
    const Shared buffer = shared_address(ring.buffer(n));
#pragma unroll 1
    for (int k = 0; k < capsules; ++k) {
      const Shared matrices = buffer + k * kPieceBytes * Buffer::capsule;
      float x[2] = {poses[k * kOctet], poses[k * kOctet + 4]};
      if constexpr (F::TF32) x[0] = rounded_to_tf32(x[0]), x[1] = rounded_to_tf32(x[1]);
      sums.add(i + k, [&](float* u) {
        each<T::M>([&]<int number>() {
          constexpr int m = (number + T::first_m(T::sections - 1)) % T::M, section = T::section_of_m(m);
          constexpr int e = 2 * (m - T::first_m(section));  // by which the lanes' entries differ from those of `row`
          float a[4];
          load_operand<kPieceBytes * Buffer::row(0, e)>(a, matrices + (section == 0 ? first : last_section));
          if constexpr (F::TF32)
            for (int n = 0; n < 4; ++n) a[n] = rounded_to_tf32(a[n]);
          exact_product<F>(u + 4 * m, a, x);
        });
      });
    }
    __syncwarp();
    if (lane == 0) arrive(ring.read(n));
    ring.n = next, ring.round = next_round;
  }
  if (!SHIFTED && __syncthreads_or(sums.out_of_range())) return true;
  sums.finish(nullptr, slice);
  return false;
}

// Block: (slice, band of WARPS batch tiles), the last running fastest. All output capsules are in the tile.
template <class F, class T, Sweep kind, bool BACKWARD>
__global__ void __launch_bounds__(32 * ring_warps(BACKWARD), 1) tile_ring_sweep(TileArguments args) {
  constexpr int WARPS = ring_warps(BACKWARD);
  const int bands = int(ceil_div(ceil_div(args.B, kTileSamples), WARPS));
  const int band = blockIdx.x % bands, slice = blockIdx.x / bands;
  Ring<T, WARPS> ring{args, int(share_begin(args.I, args.slices, slice)),
                      int(share_begin(args.I, args.slices, slice + 1)), kTileSamples * band * WARPS};
  ring.start();
  if constexpr (kTriesUnshifted<F, kind>)
    if (!ring_slice<F, T, kind, BACKWARD, false>(ring, slice)) return;
  ring_slice<F, T, kind, BACKWARD, true>(ring, slice);
}

}  // namespace fastcaps::cuda
