// The CPU kernels for one instruction set; `entry_points` (ops.cpp) chooses one for each call.
#ifdef __x86_64__
#include <immintrin.h>
#pragma GCC target("avx2,fma,f16c")
#define FASTCAPS_ISA avx2
#define FASTCAPS_VECTOR_BYTES 32
#ifndef __clang__         // it has another pragma for the instruction set of a file
#define FASTCAPS_FLOAT16  // converted by an instruction
#endif
#include "cpu/choose.h"
#endif
