// Kernels by tensor cores, exact float32.
#define FASTCAPS_TILE_FORM float, false
#include "cuda/tiles_launch.h"
