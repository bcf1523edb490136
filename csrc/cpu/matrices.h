// Products with the matrices of input capsules one row after the other, the entries of a row in the lanes: what a few
// samples need, whose poses do not fill the lanes. L rows at a time, a lane for each product, are a strip.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/simd.h"
#include "numbers.h"
#include "routing.h"

namespace fastcaps {
namespace FASTCAPS_ISA {

template <class Real>
struct Matrices : Simd<Real> {
  using SIMD = Simd<Real>;
  using typename SIMD::vec;
  static constexpr int L = SIMD::L;
  const Routing<Real>& in;
  const Sizes z;
  const int64_t depth;  // of a row: D_in, padded to a power of two or to whole vectors

  explicit Matrices(const Routing<Real>& in) : in(in), z(in.size), depth(padded(z.D_in)) {}
  static int64_t whole(int64_t n) { return ceil_div(n, L) * L; }  // entries, in whole vectors
  static int64_t padded(int64_t n) {
    if (n >= L) return whole(n);
    int64_t power = 1;
    while (power < n) power *= 2;
    return power;
  }

  static constexpr int kWholeVectors = 0;
  // f(P) with P entries of a row per vector as a constant, or kWholeVectors where a row has more than one.
  template <class F>
  FASTCAPS_INLINE void with_depth(const F& f) const {
    if (depth > L) return f(std::integral_constant<int, kWholeVectors>{});
    if constexpr (L >= 16)
      if (depth == 16) return f(std::integral_constant<int, 16>{});
    if constexpr (L >= 8)
      if (depth == 8) return f(std::integral_constant<int, 8>{});
    if constexpr (L >= 4)
      if (depth == 4) return f(std::integral_constant<int, 4>{});
    if (depth == 2) return f(std::integral_constant<int, 2>{});
    f(std::integral_constant<int, 1>{});
  }
  int64_t pose_vectors() const { return most(1, depth / L); }
  // A pose as the rows meet it: repeated to fill a vector, or padded to whole vectors.
  void repeat(const Real* x, vec* to_) const {
    Real* to = (Real*)to_;
    const int64_t total = pose_vectors() * L;
    for (int64_t first = 0; first < total; first += depth)
      for (int64_t k = 0; k < depth; ++k) to[first + k] = k < z.D_in ? x[k] : 0;
  }
  // Whether L rows, from one that starts at `count` rows before the end, can be used where they lie.
  bool lies_as_used(int64_t count) const { return in.stored == Stored::real && depth == z.D_in && count >= L; }
  const Real* strip(int64_t first, int64_t count, Real* buffer) const {
    if (lies_as_used(count)) return (const Real*)in.weight + first;
    const int64_t there = least(L, count);
    std::memset(buffer, 0, L * depth * sizeof(Real));
    if (depth == z.D_in)
      widen(in.stored, in.weight, first, there * depth, buffer);
    else
      for (int64_t r = 0; r < there; ++r) widen(in.stored, in.weight, first + r * z.D_in, z.D_in, buffer + r * depth);
    return buffer;
  }
  // out[b, r] = <row r, x[b]> for `count` rows of the weight from entry `first` on and some samples; x [samples,
  // pose_vectors] repeated, out [samples, stride]. Writes whole vectors.
  void transform(int64_t first, int64_t count, int64_t samples, const vec* x, Real* out, int64_t stride,
                 Real* buffer) const {
    const int64_t vectors = pose_vectors();
    const bool direct = lies_as_used(count);
    with_depth([&](auto P) FASTCAPS_LAMBDA {
      const auto one_strip = [&](const Real* w, int64_t r) FASTCAPS_LAMBDA {
        for (int64_t b = 0; b < samples; ++b) SIMD::store(out + b * stride + r, products<P>(w, x + b * vectors));
      };
      int64_t r = 0;
      if (direct)
        for (const Real* w = (const Real*)in.weight + first; r + L <= count; r += L, w += L * depth) one_strip(w, r);
      for (; r < count; r += L) one_strip(strip(first + r * z.D_in, count - r, buffer), r);
    });
  }
  // <row, x> for the L rows of a strip, as the lanes of one vector.
  template <int P>
  FASTCAPS_INLINE vec products(const Real* w, const vec* x) const {
    if constexpr (P != kWholeVectors) {
      vec product[P];
      unroll<P>([&](auto n) FASTCAPS_LAMBDA { product[n] = SIMD::load(w + n * L) * x[0]; });
      SIMD::template sum_runs<P>(product);
      return SIMD::template permute<LaneOf<P>>(product[0], product[0]);
    } else {
      vec product[L];
      unroll<L>([&](auto n) FASTCAPS_LAMBDA { product[n] = vec{}; });
      for (int64_t k = 0; k < depth; k += L)
        unroll<L>([&](auto n) FASTCAPS_LAMBDA { product[n] += SIMD::load(w + n * depth + k) * x[k / L]; });
      return SIMD::sum_lanes(product);
    }
  }
  // Where sum_runs leaves row r.
  template <int P>
  struct LaneOf {
    static constexpr int of(int r) { return r % (L / P) * P + r / (L / P); }
  };

  // Lane l of vector n: the row that entry n * L + l of a strip belongs to, P entries a row.
  template <int P, int n>
  struct RowOf {
    static constexpr int of(int l) { return n * (L / P) + l / P; }
  };
  // For `count` rows from entry `first` on, with x repeated [samples, pose_vectors] and du [samples, stride_du]:
  // d_weight = sum_b du x^T, and dx [samples, pose_vectors] += w^T du, still to be summed where the pose was repeated.
  void transform_backward(int64_t first, int64_t count, int64_t samples, const vec* x, const Real* du,
                          int64_t stride_du, void* d_weight, vec* dx, Real* buffer) const {
    const int64_t vectors = pose_vectors();
    with_depth([&](auto P) FASTCAPS_LAMBDA {
      for (int64_t r = 0; r < count; r += L) {
        const int64_t entry = first + r * z.D_in;
        const bool direct = lies_as_used(count - r);
        const Real* w = strip(entry, count - r, buffer);
        Real* dw = direct ? (Real*)d_weight + entry : buffer + L * depth;
        if constexpr (P != kWholeVectors) {
          vec sum[P];
          unroll<P>([&](auto n) FASTCAPS_LAMBDA { sum[n] = vec{}; });
          for (int64_t b = 0; b < samples; ++b) {
            const vec d = SIMD::load(du + b * stride_du + r), xb = x[b * vectors];
            vec products = {};
            unroll<P>([&](auto n) FASTCAPS_LAMBDA {
              const vec dn = SIMD::template permute<RowOf<P, n>>(d, d);
              sum[n] += dn * xb;
              products += dn * SIMD::load(w + n * L);
            });
            dx[b * vectors] += products;
          }
          if (d_weight) unroll<P>([&](auto n) FASTCAPS_LAMBDA { SIMD::store(dw + n * L, sum[n]); });
        } else {
          for (int64_t n = 0; n < least(L, count - r); ++n)
            for (int64_t v = 0; v < vectors; ++v) {
              const vec wn = SIMD::load(w + n * depth + v * L);
              vec sum = {};
              for (int64_t b = 0; b < samples; ++b) {
                const vec dn = SIMD::splat(du[b * stride_du + r + n]);
                sum += dn * x[b * vectors + v];
                dx[b * vectors + v] += dn * wn;
              }
              if (d_weight) SIMD::store(dw + n * depth + v * L, sum);
            }
        }
        if (!d_weight || direct) continue;
        for (int64_t n = 0; n < least(L, count - r); ++n)
          narrow(in.stored, dw + n * depth, z.D_in, d_weight, entry + n * z.D_in);
      }
    });
  }
};

}  // namespace FASTCAPS_ISA
}  // namespace fastcaps
