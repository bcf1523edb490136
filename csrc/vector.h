// Vectors for one instruction set: as many lanes as FASTCAPS_VECTOR_BYTES hold, the exponential, sums over lanes,
// scratch memory. Everything is in the namespace FASTCAPS_ISA, as the same header is compiled for several of them.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

namespace fastcaps {
namespace FASTCAPS_ISA {

#define FASTCAPS_INLINE inline __attribute__((always_inline))
#define FASTCAPS_LAMBDA __attribute__((always_inline))

// f(0), f(1), ... f(N - 1) with constants: GCC keeps an array in registers only where every index is one.
template <class F, int... n>
FASTCAPS_INLINE void unroll(const F& f, std::integer_sequence<int, n...>) {
  (f(std::integral_constant<int, n>{}), ...);
}
template <int N, class F>
FASTCAPS_INLINE void unroll(const F& f) {
  unroll(f, std::make_integer_sequence<int, N>{});
}

template <class Real>
struct Lanes;
template <>
struct Lanes<float> {
  typedef float vec __attribute__((vector_size(FASTCAPS_VECTOR_BYTES)));
  typedef int32_t ivec __attribute__((vector_size(FASTCAPS_VECTOR_BYTES)));
  static constexpr int kMantissa = 23, kBias = 127, kTerms = 7;
  static constexpr float kLowest = -104.0f, kHighest = 89.0f, kMagic = 12582912.0f;
  static constexpr float kLn2High = 0.693145751953125f, kLn2Low = 1.428606765330187e-06f;
};
template <>
struct Lanes<double> {
  typedef double vec __attribute__((vector_size(FASTCAPS_VECTOR_BYTES)));
  typedef int64_t ivec __attribute__((vector_size(FASTCAPS_VECTOR_BYTES)));
  static constexpr int kMantissa = 52, kBias = 1023, kTerms = 13;
  static constexpr double kLowest = -746.0, kHighest = 710.0, kMagic = 6755399441055744.0;
  static constexpr double kLn2High = 6.93147180369123816490e-01, kLn2Low = 1.90821492927058770002e-10;
};

template <class Real>
struct Kernel {
  using vec = typename Lanes<Real>::vec;
  using ivec = typename Lanes<Real>::ivec;
  static constexpr int L = FASTCAPS_VECTOR_BYTES / sizeof(Real);
  static constexpr int kRows = FASTCAPS_VECTOR_BYTES == 64 ? 8 : 4;  // rows of a matrix whose votes share the registers
  static constexpr int kTogether = 4;                                // input capsules whose votes are kept at a time

  static FASTCAPS_INLINE vec splat(Real x) { return x - vec{}; }
  static FASTCAPS_INLINE vec load(const Real* p) {
    vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static FASTCAPS_INLINE void store(Real* p, vec v) { std::memcpy(p, &v, sizeof v); }
  static FASTCAPS_INLINE vec bigger(vec a, vec b) { return a > b ? a : b; }  // b where a is NaN

  // Within 2 ulp of e^x, subnormal results included; NaN stays NaN.
  static FASTCAPS_INLINE vec exp(vec x) {
    using C = Lanes<Real>;
    vec y = x > splat(C::kLowest) ? x : splat(C::kLowest);
    y = y < splat(C::kHighest) ? y : splat(C::kHighest);
    const vec shifted = y * Real(1.44269504088896340736) + C::kMagic;  // its low bits are round(y / ln 2)
    const vec n = shifted - C::kMagic;
    vec r = y - n * C::kLn2High;
    r = r - n * C::kLn2Low;
    vec p = splat(Real(1));
    unroll<C::kTerms>([&](auto term) FASTCAPS_LAMBDA { p = p * (r * Real(1.0 / (C::kTerms - term))) + Real(1); });
    const ivec k = (ivec)shifted - (ivec)splat(C::kMagic);
    const ivec half = k >> 1, rest = k - half;  // in two steps, as 2^k alone may be subnormal or overflow
    p = p * (vec)((half + C::kBias) << C::kMantissa) * (vec)((rest + C::kBias) << C::kMantissa);
    return x == x ? p : x;
  }
  // Sums of the lanes of L vectors, as the lanes of one.
  static FASTCAPS_INLINE vec sum_lanes(vec* v) {
    halve<L / 2>(v, std::make_integer_sequence<int, L>{});
    return v[0];
  }
  template <int n, int... l>
  static FASTCAPS_INLINE void halve(vec* v, std::integer_sequence<int, l...> lanes) {
    unroll<n>([&](auto m) FASTCAPS_LAMBDA {
      const vec a = v[2 * m], b = v[2 * m + 1];
#ifdef __clang__
      v[m] = __builtin_shufflevector(a, b, (2 * l)...) + __builtin_shufflevector(a, b, (2 * l + 1)...);
#else
      v[m] = __builtin_shuffle(a, b, ivec{(2 * l)...}) + __builtin_shuffle(a, b, ivec{(2 * l + 1)...});
#endif
    });
    if constexpr (n > 1) halve<n / 2>(v, lanes);
  }
};

// Scratch memory, not initialised; its start is moved by an odd number of cache lines so that arrays that are used
// together do not fall on the same lines of a set (4 KB aliasing).
template <class T>
struct Scratch {
  explicit Scratch(int64_t count, int line = 0)
      : raw(std::aligned_alloc(64, (count * sizeof(T) + 64 * line + 127) / 64 * 64)),
        data((T*)((char*)raw + 64 * line)) {}
  ~Scratch() { std::free(raw); }
  Scratch(const Scratch&) = delete;
  operator T*() const { return data; }
  void* raw;
  T* data;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace FASTCAPS_ISA
}  // namespace fastcaps
