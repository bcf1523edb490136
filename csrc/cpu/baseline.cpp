// The CPU kernels for one instruction set; which one runs is chosen when the extension loads (ops.cpp).
#define FASTCAPS_ISA baseline
#define FASTCAPS_VECTOR_BYTES 16
#include "cpu/choose.h"
