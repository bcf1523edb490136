// The CPU kernels for one instruction set; which one runs is chosen when the extension loads (ops.cpp).
#ifdef __x86_64__
#pragma GCC target("avx2,fma")
#define FASTCAPS_ISA avx2
#define FASTCAPS_VECTOR_BYTES 32
#include "cpu/choose.h"
#endif
