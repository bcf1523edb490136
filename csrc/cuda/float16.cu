// Kernels by tensor cores, float16.
#define FASTCAPS_TILE_FORM float16, false
#include "cuda/tiles_launch.h"
