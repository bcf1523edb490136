// The kernels of cuda/tiles.h behind one function for each form; a source file compiles one form.
#pragma once

#include <cstdint>

#include "cuda/platform.h"
#include "cuda/tiles.h"
#include "cuda/tiles_backward.h"
#include "cuda/tiles_persistent.h"
#include "cuda/tiles_ring.h"
#include "cuda/tiles_sweep.h"
#include "cuda/vectors.h"

namespace fastcaps::cuda {

template <class In, bool TF32>
void launch_tile_sweep(TileKind kind, Sweep sweep, bool plain, Grid grid, cudaStream_t stream,
                       const TileArguments& args);
// A sweep through a ring; `blocks` of one band of batch tiles, which is what a block of the ring has.
template <class In, bool TF32>
void launch_tile_ring(TileKind kind, Sweep sweep, int64_t blocks, cudaStream_t stream, const TileArguments& args);
template <class In, bool TF32>
void launch_tile_gradients(TileKind kind, bool plain, Grid grid, cudaStream_t stream, const TileArguments& args);
// All iterations of a forward or (but for the first one's sweep) backward; false if they do not fit the GPU at once.
template <class In, bool TF32>
bool launch_tile_persistent(TileKind kind, bool backward, bool plain, int64_t blocks, cudaStream_t stream,
                            PersistentArguments args);

#ifdef FASTCAPS_TILE_FORM
template <class In, bool TF32>
void launch_tile_sweep(TileKind kind, Sweep sweep, bool plain, Grid grid, cudaStream_t stream,
                       const TileArguments& args) {
  const auto go = [&](void (*kernel)(TileArguments)) { launch(kernel, grid, stream, args, "tile_sweep", args); };
  with_tile(kind, [&]<class T>() {
    using Plain = Form<In, TF32, true>;
    using General = Form<In, TF32, false>;
    if (sweep == Sweep::uniform)
      return go(plain ? tile_sweep<Plain, T, Sweep::uniform, false> : tile_sweep<General, T, Sweep::uniform, false>);
    if (sweep == Sweep::softmax && args.ds)
      return go(plain ? tile_sweep<Plain, T, Sweep::softmax, true> : tile_sweep<General, T, Sweep::softmax, true>);
    if (sweep == Sweep::softmax)
      return go(plain ? tile_sweep<Plain, T, Sweep::softmax, false> : tile_sweep<General, T, Sweep::softmax, false>);
    if (sweep == Sweep::with_stats)
      return go(args.ds ? tile_sweep<General, T, Sweep::with_stats, true>
                        : tile_sweep<General, T, Sweep::with_stats, false>);
    go(args.ds ? tile_sweep<General, T, Sweep::stats_only, true> : tile_sweep<General, T, Sweep::stats_only, false>);
  });
}

template <class In, bool TF32>
void launch_tile_ring(TileKind kind, Sweep sweep, int64_t blocks, cudaStream_t stream, const TileArguments& args) {
  if constexpr (sizeof(In) == 4)
    with_tile(kind, [&]<class T>() {
      using Plain = Form<In, TF32, true>;
      void (*kernel)(TileArguments) = tile_ring_sweep<Plain, T, Sweep::uniform, false>;
      if (sweep == Sweep::softmax)
        kernel = args.ds ? tile_ring_sweep<Plain, T, Sweep::softmax, true>
                         : tile_ring_sweep<Plain, T, Sweep::softmax, false>;
      const int warps = ring_warps(args.ds);
      const int64_t bytes = args.ds ? kRingBytes<T, kBackwardRingWarps> : kRingBytes<T, kForwardRingWarps>;
      launch(kernel, {blocks, 32 * warps, bytes}, stream, args, "tile_ring_sweep", args);
    });
}

template <class In, bool TF32>
void launch_tile_gradients(TileKind kind, bool plain, Grid grid, cudaStream_t stream, const TileArguments& args) {
  with_tile(kind, [&]<class T>() {
    void (*kernel)(TileArguments) = tile_gradients<Form<In, TF32, false>, T>;
    if (plain) kernel = tile_gradients<Form<In, TF32, true>, T>;
    launch(kernel, grid, stream, args, "tile_gradients", args);
  });
}

template <class In, bool TF32>
bool launch_tile_persistent(TileKind kind, bool backward, bool plain, int64_t blocks, cudaStream_t stream,
                            PersistentArguments args) {
  return with_tile(kind, [&]<class T>() {
    using Plain = Form<In, TF32, true>;
    using General = Form<In, TF32, false>;
    void (*kernel)(PersistentArguments) =
        backward ? tile_persistent<General, T, true> : tile_persistent<General, T, false>;
    if (plain) kernel = backward ? tile_persistent<Plain, T, true> : tile_persistent<Plain, T, false>;
    args.memory = persistent_memory<T>(args.tile, kind);
    const Grid grid{blocks, kTileThreads, args.memory.size};
    return launch_cooperative(kernel, grid, stream, args, "tile_persistent", args.tile);
  });
}
#define FASTCAPS_INSTANTIATE(...)                                                                                \
  template void launch_tile_sweep<__VA_ARGS__>(TileKind, Sweep, bool, Grid, cudaStream_t, const TileArguments&); \
  template void launch_tile_ring<__VA_ARGS__>(TileKind, Sweep, int64_t, cudaStream_t, const TileArguments&);     \
  template void launch_tile_gradients<__VA_ARGS__>(TileKind, bool, Grid, cudaStream_t, const TileArguments&);    \
  template bool launch_tile_persistent<__VA_ARGS__>(TileKind, bool, bool, int64_t, cudaStream_t, PersistentArguments);
FASTCAPS_INSTANTIATE(FASTCAPS_TILE_FORM)
#endif

}  // namespace fastcaps::cuda
