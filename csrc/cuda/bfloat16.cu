// Kernels by tensor cores, bfloat16.
#define FASTCAPS_TILE_FORM bfloat16, false
#include "cuda/tiles_launch.h"
