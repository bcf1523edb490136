// Kernels by tensor cores, bfloat16.
#define FASTCAPS_TILE_FORM bfloat16, false
#include "dynamic_routing_cuda_tile_launch.h"
