// Products of the matrices of an input capsule with the poses of many samples, for large matrices: W x, and in the
// backward W^T du and du x^T.
//
// The entries of a pose fill the lanes as they lie in memory, so that matrices are read in order, once for all samples.
// Poses are copied into stacks [vectors, some samples]: vector v of all these samples, then vector v + 1. The last
// vector of a row that does not fill its vectors overlaps the one before, with 0 in the lanes that both have.
//
// Indices: b a sample, n a row of the matrices of an input capsule, v a vector of a row.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/scratch.h"
#include "cpu/simd.h"
#include "numbers.h"
#include "routing.h"

namespace fastcaps {
namespace FASTCAPS_ISA {

template <class Real>
struct Products : Simd<Real> {
  using SIMD = Simd<Real>;
  using typename SIMD::ivec;
  using typename SIMD::vec;
  static constexpr int L = SIMD::L;
  // Rows and samples whose products share the registers; rows whose gradients do.
  static constexpr int kVoteRows = 4, kVoteSamples = FASTCAPS_VECTOR_BYTES == 64 ? 6 : 3;
  static constexpr int kGradientRows = FASTCAPS_VECTOR_BYTES == 64 ? 12 : 6;
  static constexpr int64_t kLongSum = 120;  // rows whose products with du are added at a time: longer sums lose digits
  static constexpr int64_t kNearBytes = 64 << 10;  // of a stack of poses that is worked on
  static constexpr int64_t kNearRows = 32;         // whose votes are written together
  const Routing<Real>& in;
  const Sizes z;
  const int64_t matrices, rows, vectors;  // of an input capsule: its matrices and their rows; vectors of a row
  const ivec own_lanes;                   // all bits in the lanes that the last vector of a row does not share

  explicit Products(const Routing<Real>& in)
      : in(in),
        z(in.size),
        matrices(in.stride_j ? z.J : 1),
        rows(matrices * z.D_out),
        vectors(ceil_div(z.D_in, L)),
        own_lanes(lanes_from(vectors * L - z.D_in)) {}

  // Where vector v of a row begins.
  int64_t begin(int64_t v) const { return least(v * L, z.D_in - L); }
  static ivec lanes_from(int64_t shared) {
    ivec own;
    for (int l = 0; l < L; ++l) own[l] = l >= shared ? -1 : 0;
    return own;
  }
  static FASTCAPS_INLINE vec masked(vec x, ivec lanes) { return (vec)((ivec)x & lanes); }

  // f(first, N) with the first of `sizes` that still fits, over 0 .. count - 1; N a constant.
  template <int size, int... smaller, class F>
  static FASTCAPS_INLINE void in_blocks(int64_t first, int64_t count, const F& f) {
    for (; first + size <= count; first += size) f(first, std::integral_constant<int, size>{});
    if constexpr (sizeof...(smaller) > 0) in_blocks<smaller...>(first, count, f);
  }

  // Vectors v0 .. v1 - 1 of the poses of input capsule i -> a stack [v1 - v0, samples].
  void load_stack(int64_t i, int64_t b0, int64_t samples, int64_t v0, int64_t v1, vec* stack) const {
    with_stored<Real>(in.stored, [&](auto s) {
      for (int64_t b = 0; b < samples; ++b) {
        const int64_t at = (b0 + b) * z.I + i;
        const bool there = !in.mask || in.mask[at];
        // The poses of other samples are far from each other, which no processor expects.
        const int64_t entry = s.value == Stored::real ? sizeof(Real) : 2;
        if (b + 1 < samples)
          prefetch((const char*)in.poses + ((at + z.I) * z.D_in + v0 * L) * entry, (v1 - v0) * L * entry);
        for (int64_t v = v0; v < v1; ++v) {
          const vec x = there ? SIMD::template load_as<s.value>(in.poses, at * z.D_in + begin(v)) : vec{};
          stack[(v - v0) * samples + b] = v + 1 == vectors ? masked(x, own_lanes) : x;
        }
      }
    });
  }
  // And back, for the gradients of the poses.
  void store_stack(int64_t i, int64_t b0, int64_t samples, int64_t v0, int64_t v1, const vec* stack,
                   void* d_poses) const {
    with_stored<Real>(in.stored, [&](auto s) {
      for (int64_t b = 0; b < samples; ++b) {
        const int64_t at = (b0 + b) * z.I + i;
        const bool there = !in.mask || in.mask[at];
        for (int64_t v = v0; v < v1; ++v) {
          const vec dx = there ? stack[(v - v0) * samples + b] : vec{};
          if (v + 1 < vectors) {
            SIMD::template store_as<s.value>(d_poses, at * z.D_in + v * L, dx);
          } else {
            const Real* lanes = (const Real*)&dx;
            for (int64_t k = v * L; k < z.D_in; ++k) put<s.value, Real>(d_poses, at * z.D_in + k, lanes[k - begin(v)]);
          }
        }
      }
    });
  }
  // `count` rows from row n of input capsule i on; `buffer` is used where they must be widened.
  const Real* weight_rows(int64_t i, int64_t n, int64_t count, Real* buffer) const {
    const int64_t first = i * in.stride_i + n * z.D_in;
    if (in.stored == Stored::real) return (const Real*)in.weight + first;
    widen(in.stored, in.weight, first, count * z.D_in, buffer);
    return buffer;
  }
  int64_t buffer_size(int64_t count) const { return in.stored == Stored::real ? 1 : count * z.D_in; }

  // ------------------------------------------------------------------------------------------------------------ W x

  // f(b, S) for the stacks that votes are computed from: S samples from sample b on, S a constant.
  template <class F>
  static FASTCAPS_INLINE void in_stacks(int64_t b0, int64_t b1, const F& f) {
    in_blocks<kVoteSamples, 3, 2, 1>(b0, b1, f);
  }
  // The poses of `samples` samples -> stacks [vectors, S], that of sample b from x + b * vectors on.
  void load_stacks(int64_t i, int64_t b0, int64_t samples, vec* x) const {
    in_stacks(0, samples, [&](int64_t b, auto S) { load_stack(i, b0 + b, S, 0, vectors, x + b * vectors); });
  }
  // Where row n of an input capsule lies among rows of `row` entries for each output capsule.
  int64_t offset(int64_t n, int64_t row) const { return n / z.D_out * row + n % z.D_out; }
  // Votes of rows n0 .. n1 - 1 of input capsule i, as rows of `row` entries for each output capsule: to[b * stride].
  void votes(int64_t i, int64_t n0, int64_t n1, int64_t samples, const vec* x, Real* to, int64_t stride,
             int64_t row) const {
    Scratch<Real> buffer(buffer_size(kVoteRows)), some(samples * kNearRows, 5);  // [samples, kNearRows]
    for (int64_t first = n0; first < n1; first += kNearRows) {
      const int64_t last = least(n1, first + kNearRows);
      in_blocks<kVoteRows, 2, 1>(first, last, [&](int64_t n, auto R) FASTCAPS_LAMBDA {
        const Real* w = weight_rows(i, n, R, buffer);
        in_stacks(0, samples, [&](int64_t b, auto S) FASTCAPS_LAMBDA {
          dots<R, S>(w, x + b * vectors, some + b * kNearRows + n - first);
        });
      });
      for (int64_t b = 0; b < samples; ++b)
        for (int64_t n = first; n < last;) {
          const int64_t end = least(last, (n / z.D_out + 1) * z.D_out);
          std::memcpy(to + b * stride + offset(n, row), some + b * kNearRows + n - first, (end - n) * sizeof(Real));
          n = end;
        }
    }
  }
  // to[s, r] = <w[r], x[s]>, with w [R, D_in], a stack x [vectors, S] and to [S, kNearRows].
  template <int R, int S>
  FASTCAPS_INLINE void dots(const Real* w, const vec* x, Real* to) const {
    vec sum[R * S];
    unroll<R * S>([&](auto m) FASTCAPS_LAMBDA { sum[m] = vec{}; });
    const auto add = [&](const Real* wv, const vec* xv, auto last) FASTCAPS_LAMBDA {
      vec xs[S];
      unroll<S>([&](auto s) FASTCAPS_LAMBDA { xs[s] = xv[s]; });
      unroll<R>([&](auto r) FASTCAPS_LAMBDA {
        vec wr = SIMD::load(wv + r * z.D_in);
        if constexpr (last) wr = masked(wr, own_lanes);
        unroll<S>([&](auto s) FASTCAPS_LAMBDA { sum[s * R + r] += wr * xs[s]; });
      });
    };
    for (int64_t v = 0; v + 1 < vectors; ++v) add(w + v * L, x + v * S, std::false_type{});
    add(w + begin(vectors - 1), x + (vectors - 1) * S, std::true_type{});
    unroll<S>([&](auto s) FASTCAPS_LAMBDA { sums_of<R>(sum + s * R, to + s * kNearRows); });
  }
  template <int step>
  struct Ahead {
    static constexpr int of(int l) { return (l + step) % L; }
  };
  // total[r]: the sum of the lanes of v[r].
  template <int R>
  static FASTCAPS_INLINE void sums_of(vec* v, Real* total) {
    constexpr int P = R < L ? R : L;
    unroll<R / P>([&](auto m) FASTCAPS_LAMBDA {
      SIMD::template sum_runs<P>(v + m * P);
      const vec runs = sum_ahead<P>(v[m * P]);
      std::memcpy(total + m * P, &runs, P * sizeof(Real));
    });
  }
  template <int step>
  static FASTCAPS_INLINE vec sum_ahead(vec v) {
    if constexpr (step < L) return sum_ahead<2 * step>(v + SIMD::template permute<Ahead<step>>(v, v));
    return v;
  }

  // -------------------------------------------------------------------------------------------- W^T du and du x^T

  // Where the gradient of the matrices goes: [rows, D_in] of each input capsule, in its own type, or as Real to be
  // added to what is there.
  struct WeightGradient {
    void* to;
    Stored stored;
    bool add;
  };
  // Vector v of `count` rows from entry `first` of the weight on. Of the last vector only its own lanes: another task
  // may write the others.
  void store_gradients(const WeightGradient& out, int64_t first, int64_t v, int count, const vec* dw) const {
    with_stored<Real>(out.stored, [&](auto s) {
      int64_t at = first + begin(v);
      for (int r = 0; r < count; ++r, at += z.D_in) {
        const Real *lanes = (const Real*)&dw[r], *there = (const Real*)out.to + at;
        if (v + 1 < vectors)
          SIMD::template store_as<s.value>(out.to, at, out.add ? SIMD::load(there) + dw[r] : dw[r]);
        else
          for (int64_t l = vectors * L - z.D_in; l < L; ++l)
            put<s.value, Real>(out.to, at + l, out.add ? there[l] + lanes[l] : lanes[l]);
      }
    });
  }

  // f(n, R): R rows from row n on, R a constant.
  template <class F>
  static FASTCAPS_INLINE void in_rows(int64_t n0, int64_t n1, const F& f) {
    in_blocks<kGradientRows, 4, 2, 1>(n0, n1, f);
  }
  // Of input capsule i and vectors v0 .. v1 - 1 of a row: the gradients of the poses, a stack [v1 - v0, samples], and
  // those of the matrices. `du` are the gradients of the votes, rows of `row` entries for each output capsule, `stride`
  // entries from one sample to the next.
  template <bool kPoses, bool kWeight>
  void gradients(int64_t i, int64_t v0, int64_t v1, int64_t samples, const vec* x, const Real* du, int64_t stride,
                 int64_t row, vec* dx, const WeightGradient& out) const {
    Scratch<Real> buffer(buffer_size(kPoses ? least(rows, kLongSum) : 0)), factors(least(rows, kLongSum) * samples, 3);
    const int64_t step = most(1, kNearBytes / int64_t(samples * sizeof(vec)));  // vectors whose stacks stay near
    Scratch<vec> some(kPoses ? least(step, v1 - v0) * samples : 1, 5);          // W^T du of some rows
    for (int64_t n0 = 0; n0 < rows; n0 += kLongSum) {
      const int64_t n1 = least(rows, n0 + kLongSum);
      const Real* w = kPoses ? weight_rows(i, n0, n1 - n0, buffer) : nullptr;
      int64_t offsets[kLongSum];
      for (int64_t n = n0; n < n1; ++n) offsets[n - n0] = offset(n, row);
      for (int64_t b = 0; b < samples; ++b)  // -> [rows / R, samples, R]
        in_rows(n0, n1, [&](int64_t n, auto R) {
          const int64_t* from = offsets + (n - n0);
          Real* to = factors + (n - n0) * samples + b * R;
          if (from[R - 1] - from[0] == R - 1) return (void)std::memcpy(to, du + b * stride + from[0], R * sizeof(Real));
          for (int r = 0; r < R; ++r) to[r] = du[b * stride + from[r]];
        });
      for (int64_t first = v0; first < v1; first += step) {
        const int64_t last = least(v1, first + step), count = kPoses ? (last - first) * samples : 0;
        for (int64_t m = 0; m < count; ++m) some[m] = vec{};
        in_rows(n0, n1, [&](int64_t n, auto R) FASTCAPS_LAMBDA {
          const Real *wn = kPoses ? w + (n - n0) * z.D_in : w, *f = factors + (n - n0) * samples;
          for (int64_t v = first; v < last; ++v) {
            vec dw[R.value];
            add_products<kPoses, kWeight, R>(wn, v, samples, f, x + (kWeight ? (v - v0) * samples : 0),
                                             some + (kPoses ? (v - first) * samples : 0), dw);
            if constexpr (kWeight) store_gradients(out, i * in.stride_i + n * z.D_in, v, R, dw);
          }
        });
        vec* to = dx + (kPoses ? (first - v0) * samples : 0);
        for (int64_t m = 0; m < count; ++m) to[m] = n0 ? to[m] + some[m] : some[m];
      }
    }
  }
  // Of R rows and one vector v: dw[r] = sum_b f[b, r] x[b], and dx[b] += sum_r f[b, r] w[r].
  template <bool kPoses, bool kWeight, int R>
  FASTCAPS_INLINE void add_products(const Real* w, int64_t v, int64_t samples, const Real* f, const vec* x, vec* dx,
                                    vec* dw) const {
    vec wr[R];
    unroll<R>([&](auto r) FASTCAPS_LAMBDA {
      if constexpr (kPoses) wr[r] = SIMD::load(w + r * z.D_in + begin(v));
      dw[r] = vec{};
    });
    if (kPoses && v + 1 == vectors) {
      unroll<R>([&](auto r) FASTCAPS_LAMBDA { wr[r] = masked(wr[r], own_lanes); });
    }
    for (int64_t b = 0; b < samples; ++b, f += R) {
      const vec xb = kWeight ? x[b] : vec{};
      vec sum = kPoses ? dx[b] : vec{};
      unroll<R>([&](auto r) FASTCAPS_LAMBDA {
        const vec factor = SIMD::splat(f[r]);
        if constexpr (kWeight) dw[r] += factor * xb;
        if constexpr (kPoses) sum += factor * wr[r];
      });
      if constexpr (kPoses) dx[b] = sum;
    }
  }
};

}  // namespace FASTCAPS_ISA
}  // namespace fastcaps
