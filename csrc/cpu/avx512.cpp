// The CPU kernels for one instruction set; `entry_points` (ops.cpp) chooses one for each call.
#ifdef __x86_64__
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")
#define FASTCAPS_ISA avx512
#define FASTCAPS_VECTOR_BYTES 64
#include "cpu/choose.h"
#endif
