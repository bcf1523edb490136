// Kernels by tensor cores, float16.
#define FASTCAPS_TILE_FORM float16, false
#include "dynamic_routing_cuda_tile_launch.h"
