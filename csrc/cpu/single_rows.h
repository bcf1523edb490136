// What is routed one sample at a time: a row of numbers for an input capsule (and an output capsule), its vote. Where
// one matrix serves all input capsules it is the pose itself, since with y_j = W_j^T V_j
//     <W_j x_i, V_j> = <x_i, y_j>   and   sum_i c_ij W_j x_i = W_j sum_i c_ij x_i,
// so that no vote exists at all. Rows lie in the lanes as they lie in memory, padded to whole vectors. Logits and
// coefficients, one number for an input capsule, fill the lanes with a chunk of L input capsules.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/matrices.h"
#include "cpu/scratch.h"
#include "cpu/simd.h"
#include "numbers.h"
#include "routing.h"

namespace fastcaps {
namespace FASTCAPS_ISA {

enum class Routed {
  given_votes,     // rows are the caller's votes
  computed_votes,  // rows are votes: each input capsule has matrices of its own
  poses,           // rows are poses: one matrix serves all input capsules
};

template <class Real>
struct SingleRows : Matrices<Real> {
  using SIMD = Simd<Real>;
  using Base = Matrices<Real>;
  using Base::depth;
  using Base::in;
  using Base::L;
  using Base::pose_vectors;
  using Base::repeat;
  using Base::transform;
  using Base::whole;
  using Base::z;
  using typename SIMD::vec;
  static constexpr int kWide = FASTCAPS_VECTOR_BYTES == 64 ? 4 : 2;  // vectors of a row that are worked on together
  static constexpr int kBandSamples = 4;           // samples that go together, as they meet the shared matrices
  static constexpr int64_t kLocalBytes = 1 << 20;  // of the rows of one chunk, or kept by one thread alone
  const Routed routed;
  const bool in_place;               // rows can be read where they lie
  const int64_t D, row, out_row;     // entries of what is routed; of its row; of a row of [J, D_out]
  const int64_t J_row, J_out;        // J * row, J * out_row
  const int64_t capsule_size;        // entries of the rows of an input capsule: row, or J_row
  const int64_t chunks;              // of L input capsules
  const bool keep_prior;             // all samples have the same, which lies in lanes once
  Scratch<Real> padded_weight;       // the shared matrices [J or 1, D_out, row], where they do not lie so
  Scratch<vec> transposed;           // and [J or 1, D_in, out_row]
  Scratch<Real> zeros, padded_bias;  // [capsule_size]; [J, out_row]
  Scratch<vec> prior_lanes;          // [chunks, J]
  const Real* const weight_rows;

  explicit SingleRows(const Routing<Real>& in)
      : Base(in),
        routed(!in.weight    ? Routed::given_votes
               : in.stride_i ? Routed::computed_votes
                             : Routed::poses),
        in_place(routed != Routed::computed_votes && in.stored == Stored::real &&
                 (routed == Routed::poses ? z.D_in : z.D_out) % L == 0),
        D(routed == Routed::poses ? z.D_in : z.D_out),
        row(whole(D)),
        out_row(whole(z.D_out)),
        J_row(z.J * row),
        J_out(z.J * out_row),
        capsule_size(one_row() ? row : J_row),
        chunks(ceil_div(z.I, L)),
        keep_prior(in.prior && !in.prior_stride_b && z.B > 1 && chunks * z.J * int64_t(sizeof(vec)) <= kLocalBytes),
        padded_weight(routed == Routed::poses && !in_place ? shared_matrices() * z.D_out * row : 1),
        transposed(routed == Routed::poses ? shared_matrices() * z.D_in * out_row / L : 1),
        zeros(capsule_size),
        padded_bias(J_out),
        prior_lanes(keep_prior ? chunks * z.J : 1),
        weight_rows(in_place ? (const Real*)in.weight : padded_weight.data) {
    std::memset(zeros, 0, capsule_size * sizeof(Real));
    std::memset(padded_bias, 0, J_out * sizeof(Real));
    if (in.bias) pad(Stored::real, in.bias, 0, z.J, z.D_out, padded_bias);
    for (int64_t chunk = 0; keep_prior && chunk < chunks; ++chunk) prior_to_lanes(0, chunk, prior_lanes + chunk * z.J);
    if (routed != Routed::poses) return;
    if (!in_place) pad(in.stored, in.weight, 0, shared_matrices() * z.D_out, z.D_in, padded_weight);
    for (int64_t n = 0; n < shared_matrices(); ++n)
      for (int64_t d = 0; d < z.D_out; d += L)
        SIMD::to_lanes(in.stored, in.weight, (n * z.D_out + d) * z.D_in, z.D_in, least(L, z.D_out - d), z.D_in,
                       transposed + (n * z.D_in * out_row + d) / L, out_row / L);
  }
  bool one_row() const { return routed == Routed::poses || !in.stride_j; }  // one row serves all output capsules
  int64_t shared_matrices() const { return in.stride_j ? z.J : 1; }
  bool masked(int64_t b, int64_t i) const { return in.mask && !in.mask[b * z.I + i]; }
  int64_t count(int64_t chunk) const { return least(L, z.I - chunk * L); }  // input capsules of a chunk

  // `count` rows of D entries in memory -> rows of whole vectors, and back.
  static void pad(Stored stored, const void* from, int64_t first, int64_t count, int64_t D, Real* to) {
    const int64_t row = whole(D);
    for (int64_t n = 0; n < count; ++n, to += row) {
      widen(stored, from, first + n * D, D, to);
      for (int64_t d = D; d < row; ++d) to[d] = 0;
    }
  }
  static void trim(const Real* from, int64_t count, int64_t D, Stored stored, void* to, int64_t first) {
    for (int64_t n = 0; n < count; ++n) narrow(stored, from + n * whole(D), D, to, first + n * D);
  }

  // --------------------------------------------------------------------------- [samples, J, ...]: V to y, r to s

  // What rows are multiplied with: y_j = W_j^T V_j, or V itself.
  void to_query(int64_t samples, const Real* V, Real* y) const {
    for (int64_t j = 0; j < z.J; ++j)
      multiply(samples, weight_rows + (in.stride_j ? j : 0) * z.D_out * row, z.D_out, row, V + j * out_row, J_out,
               y + j * row, J_row);
  }
  // s_j = W_j r_j, or r itself.
  void from_sum(int64_t samples, const Real* r, Real* s) const {
    if (routed != Routed::poses) return (void)std::memcpy(s, r, samples * J_out * sizeof(Real));
    for (int64_t j = 0; j < z.J; ++j)
      multiply(samples, (const Real*)transposed.data + (in.stride_j ? j : 0) * z.D_in * out_row, z.D_in, out_row,
               r + j * row, J_row, s + j * out_row, J_out);
  }
  // to[b] = sum_n x[b, n] w[n], with w [count, width].
  static void multiply(int64_t samples, const Real* w, int64_t count, int64_t width, const Real* x, int64_t stride_x,
                       Real* to, int64_t stride_to) {
    const auto some = [&](auto S, auto W, int64_t b, int64_t k) FASTCAPS_LAMBDA {
      vec sum[S * W];
      unroll<S * W>([&](auto n) FASTCAPS_LAMBDA { sum[n] = vec{}; });
      for (int64_t n = 0; n < count; ++n)
        unroll<W>([&](auto v) FASTCAPS_LAMBDA {
          const vec wn = SIMD::load(w + n * width + k + v * L);
          unroll<S>([&](auto s) FASTCAPS_LAMBDA { sum[s * W + v] += wn * SIMD::splat(x[(b + s) * stride_x + n]); });
        });
      unroll<S * W>([&](auto n) FASTCAPS_LAMBDA { SIMD::store(to + (b + n / W) * stride_to + k + n % W * L, sum[n]); });
    };
    const auto all = [&](auto S, int64_t b) FASTCAPS_LAMBDA {
      for_vectors(width / L, [&](int64_t v, auto W) FASTCAPS_LAMBDA { some(S, W, b, v * L); });
    };
    int64_t b = 0;
    for (; b + kBandSamples <= samples; b += kBandSamples) all(std::integral_constant<int, kBandSamples>{}, b);
    for (; b < samples; ++b) all(std::integral_constant<int, 1>{}, b);
  }
  void squash(const Real* s, Real* v) const {
    for (int64_t j = 0; j < z.J; ++j, s += out_row, v += out_row) {
      const Real scale = SIMD::squash_scale(SIMD::dot(s, s, out_row), in.eps);
      for (int64_t d = 0; d < out_row; ++d) v[d] = s[d] * scale;
    }
  }
  void squash_backward(const Real* s, const Real* dv, Real* ds) const {
    for (int64_t j = 0; j < z.J; ++j, s += out_row, dv += out_row, ds += out_row) {
      const Real q = SIMD::dot(s, s, out_row), scale = SIMD::squash_scale(q, in.eps);
      const Real factor = SIMD::squash_factor(q, q == 0 ? Real(1) : q, SIMD::dot(s, dv, out_row), in.eps);
      for (int64_t d = 0; d < out_row; ++d) ds[d] = scale * dv[d] + factor * s[d];
    }
  }

  // --------------------------------------------------------------------------------------------- chunks of capsules

  // f(v, W) with W of the vectors of a row at a time, W a constant.
  template <class F>
  static FASTCAPS_INLINE void for_vectors(int64_t count, const F& f) {
    int64_t v = 0;
    for (; v + kWide <= count; v += kWide) f(v, std::integral_constant<int, kWide>{});
    for (; v < count; ++v) f(v, std::integral_constant<int, 1>{});
  }
  // f(j, G) with G output capsules at a time, so that sums do not wait for each other; G a constant.
  template <class F>
  static FASTCAPS_INLINE void by_four(int64_t J, const F& f) {
    int64_t j = 0;
    for (; j + 4 <= J; j += 4) f(j, std::integral_constant<int, 4>{});
    for (; j < J; ++j) f(j, std::integral_constant<int, 1>{});
  }
  template <class F>
  FASTCAPS_INLINE void with_shared(const F& f) const {
    if (one_row())
      f(std::true_type{});
    else
      f(std::false_type{});
  }

  struct Buffers {
    Buffers(const SingleRows& in, int64_t samples)
        : x(samples * in.pose_vectors()),
          matrix(2 * L * in.depth),
          packed(in.routed == Routed::computed_votes && in.D != in.row ? samples * in.packed() : 1) {}
    Scratch<vec> x;        // [samples, pose_vectors]
    Scratch<Real> matrix;  // a chunk of rows, and of their gradients
    Scratch<Real> packed;  // [samples, packed]: votes of an input capsule, or their gradients, one after the other
  };
  int64_t packed() const { return whole((one_row() ? 1 : z.J) * D); }
  // Rows that cannot be used where they lie, of a chunk of input capsules: [samples, L, capsule_size].
  void fill(int64_t b0, int64_t samples, int64_t chunk, Real* to, const Buffers& buffers) const {
    const int64_t J = one_row() ? 1 : z.J, stride_b = L * capsule_size;
    for (int64_t l = 0; l < count(chunk); ++l, to += capsule_size) {
      const int64_t i = chunk * L + l;
      if (routed != Routed::computed_votes) {
        for (int64_t b = 0; b < samples; ++b)
          if (!masked(b0 + b, i)) pad(in.stored, in.poses, ((b0 + b) * z.I + i) * J * D, J, D, to + b * stride_b);
        continue;
      }
      for (int64_t b = 0; b < samples; ++b) load_pose(b0 + b, i, buffers.x + b * pose_vectors());
      const bool direct = D == row;
      transform(i * in.stride_i, J * D, samples, buffers.x, direct ? to : buffers.packed.data,
                direct ? stride_b : packed(), buffers.matrix);
      for (int64_t b = 0; b < samples && !direct; ++b)
        pad(Stored::real, buffers.packed, b * packed(), J, D, to + b * stride_b);
    }
  }
  // The rows of the input capsules of a chunk; `filled` holds them where they cannot be used where they lie.
  struct Rows {
    const Real* of[L];
  };
  Rows rows_of(int64_t b, int64_t chunk, const Real* filled) const {
    const Real* first = in_place ? (const Real*)in.poses + (b * z.I + chunk * L) * capsule_size : filled;
    if (in_place) prefetch<3>(first + L * capsule_size, least(L * capsule_size * sizeof(Real), 4 << 10));
    const bool* there = in.mask && routed != Routed::computed_votes ? in.mask + b * z.I + chunk * L : nullptr;
    Rows found;
    const int64_t n = count(chunk);
    for (int64_t l = 0; l < n; ++l) found.of[l] = first + l * capsule_size;
    for (int64_t l = 0; there && l < n; ++l) found.of[l] = there[l] ? found.of[l] : zeros.data;
    for (int64_t l = n; l < L; ++l) found.of[l] = zeros;
    return found;
  }
  void load_pose(int64_t b, int64_t i, vec* x) const {
    const int64_t first = (b * z.I + i) * z.D_in;
    if (masked(b, i)) {
      for (int64_t n = 0; n < pose_vectors(); ++n) x[n] = vec{};
      return;
    }
    if (in.stored == Stored::real) return repeat((const Real*)in.poses + first, x);
    Scratch<Real> wide(z.D_in);
    widen(in.stored, in.poses, first, z.D_in, wide.data);
    repeat(wide, x);
  }
  void load_prior(int64_t b, int64_t chunk, vec* logits) const {
    if (!in.prior) {
      for (int64_t j = 0; j < z.J; ++j) logits[j] = vec{};
      return;
    }
    if (keep_prior)
      std::memcpy(logits, prior_lanes + chunk * z.J, z.J * sizeof(vec));
    else
      prior_to_lanes(b, chunk, logits);
    clear_masked(b, chunk, logits);
  }
  // What the mask leaves out of [J], a lane for each input capsule of a chunk, becomes 0, whatever it is.
  void clear_masked(int64_t b, int64_t chunk, vec* x) const {
    if (!in.mask) return;
    const auto there = SIMD::lanes_there(in.mask + b * z.I + chunk * L, 1, count(chunk));
    for (int64_t j = 0; j < z.J; ++j) x[j] = there ? x[j] : vec{};
  }
  void prior_to_lanes(int64_t b, int64_t chunk, vec* logits) const {
    SIMD::to_lanes(Stored::real, in.prior, b * in.prior_stride_b + chunk * L * z.J, z.J, count(chunk), z.J, logits, 1);
  }

  // sum[j] += <u_j, q_j>, a lane for each input capsule
  void dots(const Rows& u, const Real* q, vec* sum) const {
    const int64_t stride_j = one_row() ? 0 : row;
    for (int64_t j = 0; j < z.J; ++j) {
      const int64_t first = j * stride_j;
      vec products[L];
      unroll<L>([&](auto l) FASTCAPS_LAMBDA { products[l] = vec{}; });
      for_vectors(row / L, [&](int64_t v, auto W) FASTCAPS_LAMBDA {
        vec factor[W];
        unroll<W>([&](auto n) FASTCAPS_LAMBDA { factor[n] = SIMD::load(q + j * row + (v + n) * L); });
        unroll<L>([&](auto l) FASTCAPS_LAMBDA {
          const Real* ul = u.of[l] + first + v * L;
          unroll<W>([&](auto n) FASTCAPS_LAMBDA { products[l] += SIMD::load(ul + n * L) * factor[n]; });
        });
      });
      sum[j] += SIMD::sum_lanes(products);
    }
  }
  // sum[j] += sum over `n` input capsules of f_j u_j, for the first J output capsules
  void add_routed(const Rows& u, int64_t n, int64_t J, const vec* f, Real* sum) const {
    const Real* factor = (const Real*)f;
    with_shared([&](auto one) FASTCAPS_LAMBDA {
      by_four(J, [&](int64_t j, auto G) FASTCAPS_LAMBDA {
        for_vectors(row / L, [&](int64_t v, auto W) FASTCAPS_LAMBDA {
          Real* to = sum + j * row + v * L;
          const int64_t first = (one ? 0 : j * row) + v * L;
          vec s[G * W];
          unroll<G * W>([&](auto m) FASTCAPS_LAMBDA { s[m] = SIMD::load(to + m / W * row + m % W * L); });
          for (int64_t l = 0; l < n; ++l) {
            const Real* ul = u.of[l] + first;
            unroll<G>([&](auto g) FASTCAPS_LAMBDA {
              const vec fl = SIMD::splat(factor[(j + g) * L + l]);
              unroll<W>([&](auto m)
                            FASTCAPS_LAMBDA { s[g * W + m] += fl * SIMD::load(ul + (one ? 0 : g * row) + m * L); });
            });
          }
          unroll<G * W>([&](auto m) FASTCAPS_LAMBDA { SIMD::store(to + m / W * row + m % W * L, s[m]); });
        });
      });
    });
  }
};

}  // namespace FASTCAPS_ISA
}  // namespace fastcaps
