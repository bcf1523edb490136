// Numbers that all kernels need: constants, sizes, half types as bits.
//
// Functions are static. The sources that include this are compiled for different instruction sets; of a function that
// they shared the linker would keep one copy, which not every processor can run.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FASTCAPS_INDEX __host__ __device__ constexpr
#else
#define FASTCAPS_INDEX constexpr
#endif

namespace fastcaps {

template <class Real>
constexpr Real kLog2e = Real(1.4426950408889634074L);
template <class Real>
constexpr Real kLn2 = Real(0.6931471805599453094L);

// Where a largest logit and a sum of shares start. An input capsule whose routes are all closed, by logits of -inf,
// gets shares of 0 that way, not 0 / 0; beside a logit that is finite, whose share is 1 at least, neither changes a
// bit.
template <class Real>
constexpr Real kLeastLogit = sizeof(Real) == 4 ? Real(-0x1.fffffep127L) : Real(-0x1.fffffffffffffp1023L);
template <class Real>
constexpr Real kLeastShare = sizeof(Real) == 4 ? Real(0x1p-126L) : Real(0x1p-1022L);

static FASTCAPS_INDEX int64_t ceil_div(int64_t n, int64_t size) { return (n + size - 1) / size; }
static FASTCAPS_INDEX int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static FASTCAPS_INDEX int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Half types as bits, with 8 + 7 and 5 + 10 bits for exponent and fraction: to float, and back to the nearest, ties to
// even. Loops over these are vectorised.
static inline float widen_bfloat16(uint16_t h) { return __builtin_bit_cast(float, uint32_t(h) << 16); }
static inline uint16_t narrow_bfloat16(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
static inline float widen_float16(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, bits = uint32_t(h & 0x7fff) << 13;
  // Subnormal: its bits as an integer, times the smallest step, 2^-24.
  const float value = (h & 0x7c00)
                          ? __builtin_bit_cast(float, bits + ((h & 0x7c00) == 0x7c00 ? 0x70000000 : 0x38000000))
                          : int32_t(h & 0x3ff) * 0x1p-24f;
  return __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, value) | sign);
}
static inline uint16_t narrow_float16(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  // Normal: move the exponent and round. Subnormal: adding 0.5 leaves the rounded integer in the lowest bits.
  const uint32_t normal = (size + 0xfff + (size >> 13 & 1) - 0x38000000) >> 13;
  const uint32_t tiny = __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, size) + 0.5f) - 0x3f000000;
  const uint32_t rounded = size > 0x7f800000 ? 0x7e00 : size >= 0x477ff000 ? 0x7c00 : size < 0x38800000 ? tiny : normal;
  return uint16_t(rounded | sign);
}

}  // namespace fastcaps
