// Vectors for one instruction set: as many lanes as FASTCAPS_VECTOR_BYTES hold, the exponential, sums over lanes,
// transposition from and to rows in memory, half types. Everything is in the namespace FASTCAPS_ISA, as the same header
// is compiled for several of them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "numbers.h"
#include "routing.h"

namespace fastcaps {
namespace FASTCAPS_ISA {

#ifdef FASTCAPS_CHECK  // sanitizers make so much of code put inline that it compiles for minutes
#define FASTCAPS_INLINE inline
#define FASTCAPS_LAMBDA
#else
#define FASTCAPS_INLINE inline __attribute__((always_inline))
#define FASTCAPS_LAMBDA __attribute__((always_inline))
#endif

// Into the L2 cache; with 3, into L1. GCC drops a call of it that is not put inline.
template <int kLocality = 2>
FASTCAPS_INLINE void prefetch(const void* from, int64_t bytes) {
  for (int64_t n = 0; n < bytes; n += 64) __builtin_prefetch((const char*)from + n, 0, kLocality);
}

// f(0), f(1), ... f(N - 1) with constants: GCC keeps an array in registers only where every index is one.
template <class F, int... n>
FASTCAPS_INLINE void unroll(const F& f, std::integer_sequence<int, n...>) {
  (f(std::integral_constant<int, n>{}), ...);
}
template <int N, class F>
FASTCAPS_INLINE void unroll(const F& f) {
  unroll(f, std::make_integer_sequence<int, N>{});
}

// Entries of a tensor as the kernel computes with them.
template <Stored kStored, class Real>
FASTCAPS_INLINE Real get(const void* from, int64_t index) {
  if constexpr (kStored == Stored::real) return ((const Real*)from)[index];
  if constexpr (kStored == Stored::bfloat16) return widen_bfloat16(((const uint16_t*)from)[index]);
  if constexpr (kStored == Stored::float16) return widen_float16(((const uint16_t*)from)[index]);
}
template <Stored kStored, class Real>
FASTCAPS_INLINE void put(void* to, int64_t index, Real x) {
  if constexpr (kStored == Stored::real) ((Real*)to)[index] = x;
  if constexpr (kStored == Stored::bfloat16) ((uint16_t*)to)[index] = narrow_bfloat16(x);
  if constexpr (kStored == Stored::float16) ((uint16_t*)to)[index] = narrow_float16(x);
}
template <Stored stored>
struct StoredAs {
  static constexpr Stored value = stored;
};
template <class Real, class F>
FASTCAPS_INLINE void with_stored(Stored stored, const F& f) {
  if constexpr (sizeof(Real) == 4) {  // half types are computed in float
    if (stored == Stored::bfloat16) return f(StoredAs<Stored::bfloat16>{});
    if (stored == Stored::float16) return f(StoredAs<Stored::float16>{});
  }
  f(StoredAs<Stored::real>{});
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
struct Simd {
  using vec = typename Lanes<Real>::vec;
  using ivec = typename Lanes<Real>::ivec;
  static constexpr int L = FASTCAPS_VECTOR_BYTES / sizeof(Real);  // lanes
  typedef uint16_t halves __attribute__((vector_size(2 * L)));

  static FASTCAPS_INLINE vec splat(Real x) { return x - vec{}; }
  // a b + c; of pairs: both products of each lane, added to c.
  template <bool kPairs = false>
  static FASTCAPS_INLINE vec fma(vec a, vec b, vec c) {
#ifdef FASTCAPS_PAIRS
    if constexpr (kPairs) return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
#endif
    return c + a * b;
  }
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
    const vec shifted = y * kLog2e<Real> + C::kMagic;  // its low bits are round(y / ln 2)
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

  // All bits in lane l < n where there[l * stride], or where there is no such array; no bit in the other lanes.
  static ivec lanes_there(const bool* there, int64_t stride, int64_t n) {
    ivec lanes;
    for (int l = 0; l < L; ++l) lanes[l] = l < n && (!there || there[l * stride]) ? -1 : 0;
    return lanes;
  }

  // The vector whose lane n is lane index[n] of a, or lane index[n] - L of b.
  template <int... index>
  static FASTCAPS_INLINE vec shuffle(vec a, vec b, std::integer_sequence<int, index...>) {
#ifdef __clang__
    return __builtin_shufflevector(a, b, index...);
#else
    return __builtin_shuffle(a, b, ivec{index...});
#endif
  }
  // f(n) for every lane n as a constant sequence, f a constexpr function.
  template <class F, int... n>
  static constexpr auto map_lanes(std::integer_sequence<int, n...>) {
    return std::integer_sequence<int, F::of(n)...>{};
  }
  template <class F>
  static FASTCAPS_INLINE vec permute(vec a, vec b) {
    return shuffle(a, b, decltype(map_lanes<F>(std::make_integer_sequence<int, L>{})){});
  }

  // Of vectors a and b, runs of `step` lanes by turns.
  template <int step>
  struct Own {
    static constexpr int of(int n) { return n & step ? n + L : n; }
  };
  template <int step>
  struct Other {
    static constexpr int of(int n) { return n & step ? (n ^ step) + L : n ^ step; }
  };
  // Sums over runs of P lanes in P vectors -> one vector: lane n + m P has the sum of run m of vector n.
  template <int P, int step = 1>
  static FASTCAPS_INLINE void sum_runs(vec* v) {
    if constexpr (step < P) {
      unroll<P / (2 * step)>([&](auto n) FASTCAPS_LAMBDA {
        const vec a = v[2 * n], b = v[2 * n + 1];
        v[n] = permute<Own<step>>(a, b) + permute<Other<step>>(a, b);
      });
      sum_runs<P, 2 * step>(v);
    }
  }
  // Lane n: the sum of the lanes of v[n], n < L.
  static FASTCAPS_INLINE vec sum_lanes(vec* v) {
    sum_runs<L>(v);
    return v[0];
  }

  template <int step>
  struct Low {
    static constexpr int of(int n) { return n & step ? n - step + L : n; }
  };
  template <int step>
  struct High {
    static constexpr int of(int n) { return n & step ? n + L : n + step; }
  };
  // Lane b of vector a and lane a of vector b change places.
  template <int step = 1>
  static FASTCAPS_INLINE void transpose(vec* v) {
    if constexpr (step < L) {
      unroll<L>([&](auto n) FASTCAPS_LAMBDA {
        if constexpr ((n & step) == 0) {
          const vec a = v[n], b = v[n + step];
          v[n] = permute<Low<step>>(a, b);
          v[n + step] = permute<High<step>>(a, b);
        }
      });
      transpose<2 * step>(v);
    }
  }

#ifdef FASTCAPS_FLOAT16
  static FASTCAPS_INLINE vec widen_float16s(const uint16_t* from) {
#if FASTCAPS_VECTOR_BYTES == 64
    return (vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#else
    return (vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#endif
  }
  static FASTCAPS_INLINE void narrow_float16s(uint16_t* to, vec x) {
#if FASTCAPS_VECTOR_BYTES == 64
    _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#else
    _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#endif
  }
#endif

  // L entries in a row.
  template <Stored kStored>
  static FASTCAPS_INLINE vec load_as(const void* from, int64_t index) {
    if constexpr (kStored == Stored::real) return load((const Real*)from + index);
    if constexpr (kStored == Stored::bfloat16) {
      halves bits;
      std::memcpy(&bits, (const uint16_t*)from + index, sizeof bits);
      return (vec)(__builtin_convertvector(bits, ivec) << 16);
    }
#ifdef FASTCAPS_FLOAT16
    if constexpr (kStored == Stored::float16) return widen_float16s((const uint16_t*)from + index);
#endif
    Real row[L];
    for (int l = 0; l < L; ++l) row[l] = get<kStored, Real>(from, index + l);
    return load(row);
  }
  template <Stored kStored>
  static FASTCAPS_INLINE void store_as(void* to, int64_t index, vec v) {
    if constexpr (kStored == Stored::real) return store((Real*)to + index, v);
    if constexpr (kStored == Stored::bfloat16) {
      const ivec bits = (ivec)v, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
      const halves found = __builtin_convertvector(v == v ? rounded : ivec{} + 0x7fc0, halves);
      return (void)std::memcpy((uint16_t*)to + index, &found, sizeof found);
    }
#ifdef FASTCAPS_FLOAT16
    if constexpr (kStored == Stored::float16) return narrow_float16s((uint16_t*)to + index, v);
#endif
    Real row[L];
    store(row, v);
    for (int l = 0; l < L; ++l) put<kStored, Real>(to, index + l, row[l]);
  }

  // Rows [n, count] in memory, n <= L, to count vectors `step` apart: row l in lane l, lanes from n on 0.
  static void to_lanes(Stored stored, const void* from, int64_t first, int64_t stride, int64_t n, int64_t count,
                       vec* to, int64_t step) {
    with_stored<Real>(stored, [&](auto s) {
      if (count < L) {
        for (int64_t c = 0; c < count; ++c) to[c * step] = vec{};
        for (int64_t l = 0; l < n; ++l)
          for (int64_t c = 0; c < count; ++c)
            ((Real*)(to + c * step))[l] = get<s.value, Real>(from, first + l * stride + c);
        return;
      }
      const auto squares = [&](auto all) FASTCAPS_LAMBDA {  // all: whether every lane has a row
        for (int64_t square = 0; square < count; square += L) {
          const int64_t c = least(square, count - L);  // the last one may overlap the one before
          vec v[L];
          unroll<L>([&](auto l) FASTCAPS_LAMBDA {
            v[l] = all || l < n ? load_as<s.value>(from, first + l * stride + c) : vec{};
          });
          transpose(v);
          unroll<L>([&](auto l) FASTCAPS_LAMBDA { to[(c + l) * step] = v[l]; });
        }
      };
      n == L ? squares(std::true_type{}) : squares(std::false_type{});
    });
  }
  // And back.
  static void from_lanes(const vec* from, int64_t step, int64_t n, int64_t count, Stored stored, void* to,
                         int64_t first, int64_t stride) {
    with_stored<Real>(stored, [&](auto s) {
      if (count < L) {
        for (int64_t l = 0; l < n; ++l)
          for (int64_t c = 0; c < count; ++c)
            put<s.value, Real>(to, first + l * stride + c, ((const Real*)(from + c * step))[l]);
        return;
      }
      const auto squares = [&](auto all) FASTCAPS_LAMBDA {
        for (int64_t square = 0; square < count; square += L) {
          const int64_t c = least(square, count - L);
          vec v[L];
          unroll<L>([&](auto l) FASTCAPS_LAMBDA { v[l] = from[(c + l) * step]; });
          transpose(v);
          unroll<L>([&](auto l) FASTCAPS_LAMBDA {
            if (all || l < n) store_as<s.value>(to, first + l * stride + c, v[l]);
          });
        }
      };
      n == L ? squares(std::true_type{}) : squares(std::false_type{});
    });
  }

  // sum a b; in the lanes first, so that no addition waits for the one before.
  static Real dot(const Real* a, const Real* b, int64_t count) {
    vec even = {}, odd = {};
    int64_t n = 0;
    for (; n + 2 * L <= count; n += 2 * L) {
      even += load(a + n) * load(b + n);
      odd += load(a + n + L) * load(b + n + L);
    }
    Real rest = 0;
    for (; n < count; ++n) rest += a[n] * b[n];
    even += odd;
    for (int l = 0; l < L; ++l) rest += even[l];
    return rest;
  }

  static FASTCAPS_INLINE Real sqrt(Real q) { return std::sqrt(q); }
  static FASTCAPS_INLINE vec sqrt(vec q) {
    vec r;
    for (int l = 0; l < L; ++l) r[l] = std::sqrt(q[l]);
    return r;
  }
  // squash(s) = scale s, of q = |s|^2; X is a number or a vector of them.
  template <class X>
  static FASTCAPS_INLINE X squash_scale(X q, Real eps) {
    return eps > 0 ? q / (Real(1) + q) / sqrt(q + eps) : sqrt(q) / (Real(1) + q);
  }
  // squash'(s)^T dv = scale dv + factor s, of q and dot = <s, dv>. In terms of the direction of s nothing overflows
  // before q does; `nonzero` is q with 1 instead of 0.
  template <class X>
  static FASTCAPS_INLINE X squash_factor(X q, X nonzero, X dot, Real eps) {
    const X inverse = Real(1) / sqrt(nonzero);
    const X along = eps > 0 ? Real(2) / (Real(1) + q) - q / (q + eps) : (Real(1) - q) / (Real(1) + q);
    return squash_scale(q, eps) * along * (dot * inverse) * inverse;
  }

  // Logits [J, N] to coupling coefficients, in place.
  template <int N>
  static void softmax(vec* c, int64_t J, bool leaky) {
    const vec least = splat(leaky ? Real(0) : kLeastLogit<Real>);
    for (int n = 0; n < N; ++n) {
      vec top = least;
      for (int64_t j = 0; j < J; ++j) top = bigger(c[j * N + n], top);
      vec total = leaky ? exp(-top) : splat(kLeastShare<Real>);
      for (int64_t j = 0; j < J; ++j) total += c[j * N + n] = exp(c[j * N + n] - top);
      const vec scale = Real(1) / total;
      for (int64_t j = 0; j < J; ++j) c[j * N + n] *= scale;
    }
  }
  // dc [J, N] to db = c (dc - sum_j c dc), in place.
  template <int N>
  static void softmax_backward(const vec* c, vec* dc, int64_t J) {
    for (int n = 0; n < N; ++n) {
      vec q = {};
      for (int64_t j = 0; j < J; ++j) q += c[j * N + n] * dc[j * N + n];
      for (int64_t j = 0; j < J; ++j) dc[j * N + n] = c[j * N + n] * (dc[j * N + n] - q);
    }
  }
};

// `count` entries as they are stored -> Real, and back.
template <class Real>
void widen(Stored stored, const void* from, int64_t first, int64_t count, Real* to) {
  using SIMD = Simd<Real>;
  with_stored<Real>(stored, [&](auto s) {
    int64_t n = 0;
    for (; n + SIMD::L <= count; n += SIMD::L) SIMD::store(to + n, SIMD::template load_as<s.value>(from, first + n));
    for (; n < count; ++n) to[n] = get<s.value, Real>(from, first + n);
  });
}
template <class Real>
void narrow(Stored stored, const Real* from, int64_t count, void* to, int64_t first) {
  using SIMD = Simd<Real>;
  with_stored<Real>(stored, [&](auto s) {
    int64_t n = 0;
    for (; n + SIMD::L <= count; n += SIMD::L) SIMD::template store_as<s.value>(to, first + n, SIMD::load(from + n));
    for (; n < count; ++n) put<s.value, Real>(to, first + n, from[n]);
  });
}

}  // namespace FASTCAPS_ISA
}  // namespace fastcaps
