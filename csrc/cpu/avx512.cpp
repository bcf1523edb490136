// The CPU kernels for one instruction set; `entry_points` (ops.cpp) chooses one for each call.
#ifdef __x86_64__
#include <immintrin.h>
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c")
#define FASTCAPS_ISA avx512
#define FASTCAPS_VECTOR_BYTES 64
#ifndef __clang__         // it has another pragma for the instruction set of a file
#define FASTCAPS_FLOAT16  // converted by an instruction
#endif
#include "cpu/choose.h"
#endif
