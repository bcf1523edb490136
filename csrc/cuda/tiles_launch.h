// The kernels of cuda/tiles.h behind one function for each form; a source file compiles one form.
#pragma once

#include "cuda/tiles.h"
#include "cuda/tiles_backward.h"
#include "cuda/tiles_together.h"

namespace fastcaps::cuda {

template <class In, bool TF32>
void launch_tile_sweep(TileKind kind, Sweep sweep, bool plain, Grid grid, cudaStream_t stream, const TileCall& call);
template <class In, bool TF32>
void launch_tile_gradients(TileKind kind, bool plain, Grid grid, cudaStream_t stream, const TileCall& call);
// All iterations of a forward or (but for the first one's sweep) backward; false if they do not fit the GPU at once.
template <class In, bool TF32>
bool launch_tile_persistent(TileKind kind, bool backward, bool plain, int64_t blocks, cudaStream_t stream,
                            PersistentCall call);

#ifdef FASTCAPS_TILE_FORM
template <class In, bool TF32>
void launch_tile_sweep(TileKind kind, Sweep sweep, bool plain, Grid grid, cudaStream_t stream, const TileCall& call) {
  const auto go = [&](void (*kernel)(TileCall)) { launch(kernel, grid, stream, call, "tile_sweep", call); };
  with_tile(kind, [&]<class T>() {
    using Plain = Form<In, TF32, true>;
    using General = Form<In, TF32, false>;
    if (sweep == Sweep::uniform)
      return go(plain ? tile_sweep<Plain, T, Sweep::uniform, false> : tile_sweep<General, T, Sweep::uniform, false>);
    if (sweep == Sweep::softmax && call.ds)
      return go(plain ? tile_sweep<Plain, T, Sweep::softmax, true> : tile_sweep<General, T, Sweep::softmax, true>);
    if (sweep == Sweep::softmax)
      return go(plain ? tile_sweep<Plain, T, Sweep::softmax, false> : tile_sweep<General, T, Sweep::softmax, false>);
    if (sweep == Sweep::with_stats)
      return go(call.ds ? tile_sweep<General, T, Sweep::with_stats, true>
                        : tile_sweep<General, T, Sweep::with_stats, false>);
    go(call.ds ? tile_sweep<General, T, Sweep::stats_only, true> : tile_sweep<General, T, Sweep::stats_only, false>);
  });
}

template <class In, bool TF32>
void launch_tile_gradients(TileKind kind, bool plain, Grid grid, cudaStream_t stream, const TileCall& call) {
  with_tile(kind, [&]<class T>() {
    void (*kernel)(TileCall) = tile_gradients<Form<In, TF32, false>, T>;
    if (plain) kernel = tile_gradients<Form<In, TF32, true>, T>;
    launch(kernel, grid, stream, call, "tile_gradients", call);
  });
}

template <class In, bool TF32>
bool launch_tile_persistent(TileKind kind, bool backward, bool plain, int64_t blocks, cudaStream_t stream,
                            PersistentCall call) {
  return with_tile(kind, [&]<class T>() {
    using Plain = Form<In, TF32, true>;
    using General = Form<In, TF32, false>;
    void (*kernel)(PersistentCall) = backward ? tile_persistent<General, T, true> : tile_persistent<General, T, false>;
    if (plain) kernel = backward ? tile_persistent<Plain, T, true> : tile_persistent<Plain, T, false>;
    call.memory = persistent_memory<T>(call.tile, kind);
    const Grid grid{blocks, kTileThreads, call.memory.size};
    return launch_together(kernel, grid, stream, call, "tile_persistent", call.tile);
  });
}
#define FASTCAPS_INSTANTIATE(...)                                                                           \
  template void launch_tile_sweep<__VA_ARGS__>(TileKind, Sweep, bool, Grid, cudaStream_t, const TileCall&); \
  template void launch_tile_gradients<__VA_ARGS__>(TileKind, bool, Grid, cudaStream_t, const TileCall&);    \
  template bool launch_tile_persistent<__VA_ARGS__>(TileKind, bool, bool, int64_t, cudaStream_t, PersistentCall);
FASTCAPS_INSTANTIATE(FASTCAPS_TILE_FORM)
#endif

}  // namespace fastcaps::cuda
