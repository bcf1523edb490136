// Kernels by tensor cores, exact float32.
#define FASTCAPS_TILE_FORM float, false
#include "dynamic_routing_cuda_tile_launch.h"
