// The CPU kernels for one instruction set; `entry_points` (ops.cpp) chooses one for each call.
#define FASTCAPS_ISA baseline
#define FASTCAPS_VECTOR_BYTES 16
#include "cpu/choose.h"
