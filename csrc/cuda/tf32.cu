// Kernels by tensor cores, float32 rounded to tf32.
#define FASTCAPS_TILE_FORM float, true
#include "cuda/tiles_launch.h"
