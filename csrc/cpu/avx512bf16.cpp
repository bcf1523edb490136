// The CPU kernels for bfloat16 where the processor multiplies pairs of them; chosen as the others are (ops.cpp).
#if defined(__x86_64__) && !defined(__clang__)
#include <immintrin.h>
#pragma GCC target("avx512bf16,avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c")
#define FASTCAPS_ISA avx512bf16
#define FASTCAPS_VECTOR_BYTES 64
#define FASTCAPS_PAIRS    // of bfloat16, multiplied as one
#define FASTCAPS_FLOAT16  // converted by an instruction
#include "cpu/choose.h"
#endif
