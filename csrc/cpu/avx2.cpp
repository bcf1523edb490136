// The CPU kernels for one instruction set; `entry_points` (ops.cpp) chooses one for each call.
#ifdef __x86_64__
#pragma GCC target("avx2,fma")
#define FASTCAPS_ISA avx2
#define FASTCAPS_VECTOR_BYTES 32
#include "cpu/choose.h"
#endif
