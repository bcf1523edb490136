// All iterations in one launch, for sizes whose blocks are all resident at once and hold their matrices and poses in
// shared memory: these are read once, and a barrier takes the place of each further launch.
#pragma once

#include <cstdint>

#include "cuda/layout.h"
#include "cuda/platform.h"
#include "cuda/tiles.h"
#include "cuda/tiles_sweep.h"
#include "cuda/vectors.h"
#include "numbers.h"

namespace fastcaps::cuda {

// Where things lie in a block's shared memory, in bytes: the matrices of its slice, as `fill` leaves them; the poses,
// [input capsules, D_in / 8, batch tiles, 32 lanes] of what load_pose gave the lane; the sums of its warps, where they
// share samples; what squash_rows needs.
struct PersistentMemory {
  int64_t poses, sums, vectors, size;
};
template <class T>
PersistentMemory persistent_memory(const TileArguments& args, TileKind kind) {
  constexpr int64_t fragment = 32 * sizeof(float4), pose = 32 * sizeof(float2);  // of all lanes
  const int64_t octets_of_slice = ceil_div(args.I, args.slices) * ceil_div(args.D_in, kOctet);
  const int64_t poses = octets_of_slice * T::M * fragment, sums = poses + octets_of_slice * args.band_tiles * pose;
  const int64_t vectors = sums + (args.band_tiles < 4 ? kTileThreads / 32 * T::M * fragment : 0);
  return {poses, sums, vectors, vectors + vector_memory(kind, args.D_out) * int64_t(sizeof(float))};
}

// As for launches of single sweeps, with the pointers of iteration 0.
struct PersistentArguments {
  TileArguments tile;
  VectorArguments<float> vectors;
  PersistentMemory memory;
};

template <class F, class T, bool BACKWARD>
struct Persistent {
  const PersistentArguments& args;
  const int bands = int(ceil_div(ceil_div(args.tile.B, kTileSamples), args.tile.band_tiles));
  const int band = blockIdx.x % bands, slice = blockIdx.x / bands;
  const int begin = int(share_begin(args.tile.I, args.tile.slices, slice));
  const int end = int(share_begin(args.tile.I, args.tile.slices, slice + 1));
  const int warp = warp_of_block(), lane = threadIdx.x % 32, octets = F::PLAIN ? 1 : (args.tile.D_in + 7) / 8;
  const int batch_tile = warp % args.tile.band_tiles, turn = warp / args.tile.band_tiles;
  const int turns = 4 / args.tile.band_tiles;

  __device__ char* shared(int64_t at) const { return shared_memory<char>() + at; }

  // What a lane has of the pose of the slice's input capsule n.
  __device__ float2* pose(int n, int octet) const {
    return reinterpret_cast<float2*>(shared(args.memory.poses)) +
           ((n * octets + octet) * args.tile.band_tiles + batch_tile) * 32 + lane;
  }

  __device__ void load() const {
    fill<F, T>(reinterpret_cast<float4*>(shared(0)), args.tile, begin, end, end - begin, 0);
    const int b = 8 * (band * args.tile.band_tiles + batch_tile) + lane / 4;
    for (int octet = 0; octet < octets; ++octet)
      // The same that this warp reads, four on their way at a time.
      for (int n = turn; n < end - begin; n += 4 * turns) {
        float x[4][2];
#pragma unroll
        for (int k = 0; k < 4; ++k)
          load_pose<F>(x[k], args.tile, b, begin + n + k * turns, end, 8 * octet + 2 * (lane % 4));
#pragma unroll
        for (int k = 0; k < 4; ++k)
          if (n + k * turns < end - begin) *pose(n + k * turns, octet) = {x[k][0], x[k][1]};
      }
    __syncthreads();
  }

  template <Sweep kind>
  __device__ void sweep(const TileArguments& tile) const {
    if constexpr (kTriesUnshifted<F, kind>)
      if (!try_sweep<kind, false>(tile)) return;
    try_sweep<kind, true>(tile);
  }

  // As sweep_slice.
  template <Sweep kind, bool SHIFTED>
  __device__ bool try_sweep(const TileArguments& tile) const {
    Sums<F, T, kind, BACKWARD, SHIFTED> sums{tile};
    sums.start(band * tile.band_tiles + batch_tile, 0);
    const float4* const fragments = reinterpret_cast<const float4*>(shared(0));
#pragma unroll 1
    for (int n = turn; n < end - begin; n += turns) {
      const float2* const poses = pose(n, 0);
      const float x[2] = {poses->x, poses->y};
      sums.add(begin + n, [&](float* u) {
        votes<F, T>(u, fragments + n * octets * T::M * 32, x, tile, [&](float (&more)[2], int first_d) {
          const float2 next = poses[first_d / 8 * tile.band_tiles * 32];
          more[0] = next.x, more[1] = next.y;
        });
      });
    }
    if (!SHIFTED && __syncthreads_or(sums.out_of_range())) return true;
    sums.finish(reinterpret_cast<float*>(shared(args.memory.sums)), slice);
    return false;
  }

  __device__ void vectors(int64_t t) const {
    float* const total = reinterpret_cast<float*>(shared(args.memory.vectors));
    const VectorArguments<float> now =
        BACKWARD ? backward_iteration(args.vectors, t) : forward_iteration(args.vectors, t);
    for (int64_t set = blockIdx.x; set < count_sets(now); set += gridDim.x) {
      if constexpr (BACKWARD)
        squash_rows_backward<kTileThreads>(now, set, total);
      else
        squash_rows<kTileThreads>(now, set, total);
    }
  }

  __device__ TileArguments iteration(int t) const {
    TileArguments tile = args.tile;
    if constexpr (BACKWARD) {
      tile.V += t * args.vectors.stride_t, tile.ds += t * args.vectors.stride_t;
      tile.stats += t * 3 * int64_t(tile.I) * tile.B;
    } else if (t == 0) {
      tile.V = nullptr;
    }
    return tile;
  }

  __device__ void forward() const {
    int t = 0;
    if (F::PLAIN || !args.tile.prior) {
      sweep<Sweep::uniform>(args.tile);
      grid_barrier();
      vectors(t++);
      grid_barrier();
    }
#pragma unroll 1
    for (; t < args.vectors.T; ++t) {
      sweep<Sweep::softmax>(iteration(t));
      grid_barrier();
      vectors(t);
      if (t + 1 < args.vectors.T) grid_barrier();
    }
  }

  // dV of iterations T - 1 .. 1, ds of all.
  __device__ void backward() const {
    for (int64_t row = int64_t(blockIdx.x) * (kTileThreads / 32) + warp; row < args.vectors.B * args.vectors.J;
         row += int64_t(gridDim.x) * (kTileThreads / 32))
      earlier_outputs_of_row(args.vectors, row);
    vectors(args.vectors.T - 1);
#pragma unroll 1
    for (int t = args.vectors.T - 1; t > 0; --t) {
      grid_barrier();
      sweep<Sweep::softmax>(iteration(t));
      grid_barrier();
      vectors(t - 1);
    }
  }
};

// Block: (slice, band of batch tiles), the last running fastest, as in tile_sweep.
template <class F, class T, bool BACKWARD>
__global__ void __launch_bounds__(kTileThreads, BACKWARD ? kBackwardBlocks : kForwardBlocks)
    tile_persistent(PersistentArguments args) {
  const Persistent<F, T, BACKWARD> routing{args};
  routing.load();
  if constexpr (BACKWARD)
    routing.backward();
  else
    routing.forward();
}

}  // namespace fastcaps::cuda
