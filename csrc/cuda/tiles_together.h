// All iterations in one launch, for sizes whose blocks are all resident at once and hold their matrices and poses in
// shared memory: these are read once, and a barrier takes the place of each further launch.
#pragma once

#include "cuda/tiles.h"
#include "cuda/vectors.h"

namespace fastcaps::cuda {

// Where things lie in a block's shared memory, in bytes: the matrices of its slice, as `fill` leaves them; the poses,
// [input capsules, D_in / 8, batch tiles, 32 lanes] of what load_pose gave the lane; the sums of its warps, where they
// share samples; what squash_rows needs.
struct PersistentMemory {
  int64_t poses, sums, vectors, size;
};
template <class T>
PersistentMemory persistent_memory(const TileCall& call, TileKind kind) {
  const int64_t poses_of_tile = pieces(call.I, call.slices) * pieces(call.D_in, 8);
  const int64_t poses = poses_of_tile * T::M * 512, sums = poses + poses_of_tile * call.batch_tiles * 256;
  const int64_t vectors = sums + (call.batch_tiles < 4 ? kTileThreads / 32 * T::M * 512 : 0);
  return {poses, sums, vectors, vectors + vector_memory(kind, call.D_out) * 4};
}

// As for the launches of single passes, with the pointers of iteration 0.
struct PersistentCall {
  TileCall tile;
  VectorCall<float> vectors;
  PersistentMemory memory;
};

template <class F, class T, bool BACKWARD>
struct Persistent {
  const PersistentCall& call;
  const int groups = int(pieces(pieces(call.tile.B, 8), call.tile.batch_tiles));
  const int group = blockIdx.x % groups, slice = blockIdx.x / groups;
  const int begin = int(part_begin(call.tile.I, call.tile.slices, slice));
  const int end = int(part_begin(call.tile.I, call.tile.slices, slice + 1));
  const int warp = warp_of_block(), lane = threadIdx.x % 32, steps = (call.tile.D_in + 7) / 8;
  const int batch_tile = warp % call.tile.batch_tiles, turn = warp / call.tile.batch_tiles;
  const int turns = 4 / call.tile.batch_tiles;

  __device__ char* shared(int64_t at) const { return shared_memory<char>() + at; }

  // A lane's part of the pose of the slice's input capsule n.
  __device__ float2* pose(int n, int step) const {
    return reinterpret_cast<float2*>(shared(call.memory.poses)) +
           ((n * steps + step) * call.tile.batch_tiles + batch_tile) * 32 + lane;
  }

  __device__ void load() const {
    fill<F, T>(reinterpret_cast<float4*>(shared(0)), call.tile, begin, end, end - begin, 0);
    const int b = 8 * (group * call.tile.batch_tiles + batch_tile) + lane / 4;
    for (int step = 0; step < steps; ++step)
      for (int n = turn; n < end - begin;
           n += 4 * turns) {  // the same that this warp reads, four on their way at a time
        float x[4][2];
#pragma unroll
        for (int k = 0; k < 4; ++k)
          load_pose<F>(x[k], call.tile, b, begin + n + k * turns, end, 8 * step + 2 * (lane % 4));
#pragma unroll
        for (int k = 0; k < 4; ++k)
          if (n + k * turns < end - begin) *pose(n + k * turns, step) = {x[k][0], x[k][1]};
      }
    __syncthreads();
  }

  template <Sweep kind>
  __device__ void sweep(const TileCall& tile) const {
    Sums<F, T, kind, BACKWARD> sums{tile};
    sums.start(group * tile.batch_tiles + batch_tile, 0);
    const float4* const fragments = reinterpret_cast<const float4*>(shared(0));
#pragma unroll 1
    for (int n = turn; n < end - begin; n += turns) {
      const float2 two = *pose(n, 0);
      const float x[2] = {two.x, two.y};
      sums.add(fragments + n * steps * T::M * 32, x, begin + n, [&](float (&more)[2], int first_d) {
        const float2 next = *pose(n, first_d / 8);
        more[0] = next.x, more[1] = next.y;
      });
    }
    sums.finish(reinterpret_cast<float*>(shared(call.memory.sums)), slice);
  }

  __device__ void vectors(int64_t t) const {
    float* const total = reinterpret_cast<float*>(shared(call.memory.vectors));
    const VectorCall<float> now = BACKWARD ? backward_iteration(call.vectors, t) : forward_iteration(call.vectors, t);
    for (int64_t rows = blockIdx.x; rows < groups_of_rows(now); rows += gridDim.x) {
      if constexpr (BACKWARD)
        squash_rows_backward<kTileThreads>(now, rows, total);
      else
        squash_rows<kTileThreads>(now, rows, total);
    }
  }

  __device__ TileCall iteration(int t) const {
    TileCall tile = call.tile;
    if constexpr (BACKWARD) {
      tile.V += t * call.vectors.stride_t, tile.ds += t * call.vectors.stride_t;
      tile.stats += t * 3 * int64_t(tile.I) * tile.B;
    } else if (t == 0) {
      tile.V = nullptr;
    }
    return tile;
  }

  __device__ void forward() const {
    int t = 0;
    if (F::PLAIN || !call.tile.prior) {
      sweep<Sweep::uniform>(call.tile);
      grid_barrier();
      vectors(t++);
      grid_barrier();
    }
#pragma unroll 1
    for (; t < call.vectors.T; ++t) {
      sweep<Sweep::softmax>(iteration(t));
      grid_barrier();
      vectors(t);
      if (t + 1 < call.vectors.T) grid_barrier();
    }
  }

  // dV of iterations T - 1 .. 1, ds of all.
  __device__ void backward() const {
    for (int64_t row = int64_t(blockIdx.x) * (kTileThreads / 32) + warp; row < call.vectors.B * call.vectors.J;
         row += int64_t(gridDim.x) * (kTileThreads / 32))
      earlier_outputs_of_row(call.vectors, row);
    vectors(call.vectors.T - 1);
#pragma unroll 1
    for (int t = call.vectors.T - 1; t > 0; --t) {
      grid_barrier();
      sweep<Sweep::softmax>(iteration(t));
      grid_barrier();
      vectors(t - 1);
    }
  }
};

// Block: (slice, group of batch tiles), the last running fastest, as in tile_sweep.
template <class F, class T, bool BACKWARD>
__global__ void __launch_bounds__(kTileThreads, BACKWARD ? 2 : 3) tile_persistent(PersistentCall call) {
  const Persistent<F, T, BACKWARD> routing{call};
  routing.load();
  if constexpr (BACKWARD)
    routing.backward();
  else
    routing.forward();
}

}  // namespace fastcaps::cuda
