// Dynamic routing on the CPU: what forward and backward share, and the forward, for one instruction set. This header
// knows no torch type; each dynamic_routing_<isa>.cpp includes it once, with FASTCAPS_VECTOR_BYTES set and the compiler
// told what it may use.
//
// Samples lie in the lanes of the vectors: kTiles vectors side by side are one group. Votes are computed again in every
// pass and live in the cache for a few input capsules at a time. Everything that crosses input capsules (the weighted
// sums, dV, and gradients of what is shared over I) is summed per slice of I, and the slices in a fixed order: slices
// depend on sizes only, so threads change no bit of the result.
#include "dynamic_routing.h"
#include "vector.h"

namespace fastcaps {
namespace FASTCAPS_ISA {

template <class Task>
void parallel_for(Parallel parallel, int64_t n, const Task& task) {
  if (n <= 0) return;
  parallel(n, (void*)&task, [](void* context, int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) (*(const Task*)context)(n);
  });
}

// One call with N vectors of samples side by side.
template <class Real, int N>
struct Pass : Kernel<Real> {
  using K = Kernel<Real>;
  using typename K::vec;
  static constexpr int L = K::L, kGroup = N * K::L;  // samples in a group
  const Routing<Real>& in;
  const Sizes z;
  const Parallel parallel;
  const int64_t JD, groups, slices, width;  // width: vectors of [J, D_out] of one group

  Pass(const Routing<Real>& in, Parallel parallel)
      : in(in),
        z(in.size),
        parallel(parallel),
        JD(z.J * z.D_out),
        groups(ceil_div(z.B, kGroup)),
        slices(count_slices()),
        width(JD * N) {}

  // At least 16 tasks, so that eight threads are busy; 32 while their partial sums stay below 1 MB.
  int64_t count_slices() const {
    if (!groups) return 1;
    const int64_t bytes = groups * z.J * z.D_out * kGroup * sizeof(Real);
    int64_t n = ceil_div(32, groups);
    if (n * bytes > (1 << 20)) n = most(ceil_div(16, groups), (1 << 20) / bytes);
    return most(1, least(n, z.I / 4));
  }

  int64_t samples(int64_t g) const { return least(kGroup, z.B - g * kGroup); }

  // rows [count][stride of b] -> lanes; the lanes that are not there are 0.
  void gather(const Real* from, int64_t stride_b, int64_t count, int64_t n, vec* to_) const {
    if (n < kGroup)
      for (int64_t r = 0; r < count * N; ++r) to_[r] = vec{};
    Real* to = (Real*)to_;
    for (int64_t l = 0; l < n; ++l)
      for (int64_t r = 0; r < count; ++r) to[r * kGroup + l] = from[l * stride_b + r];
  }
  void scatter(const vec* from_, int64_t stride_b, int64_t count, int64_t n, Real* to) const {
    const Real* from = (const Real*)from_;
    for (int64_t l = 0; l < n; ++l)
      for (int64_t r = 0; r < count; ++r) to[l * stride_b + r] = from[r * kGroup + l];
  }

  // f(d, R) with R rows at a time, R a constant.
  template <class F>
  static FASTCAPS_INLINE void for_rows(int64_t count, const F& f) {
    int64_t d = 0;
    for (; d + K::kRows <= count; d += K::kRows) f(d, std::integral_constant<int, K::kRows>{});
    if constexpr (K::kRows > 4)
      for (; d + 4 <= count; d += 4) f(d, std::integral_constant<int, 4>{});
    for (; d < count; ++d) f(d, std::integral_constant<int, 1>{});
  }

  // u[r] += sum_k w[r, k] x[k], for R rows: w [R, D_in], x [D_in, N].
  template <int R>
  FASTCAPS_INLINE void votes(const Real* w, const vec* x, vec* u) const {
    for (int64_t k = 0; k < z.D_in; ++k) {
      vec xk[N];
      unroll<N>([&](auto n) FASTCAPS_LAMBDA { xk[n] = x[k * N + n]; });
      unroll<R>([&](auto r) FASTCAPS_LAMBDA {
        const vec wk = K::splat(w[r * z.D_in + k]);
        unroll<N>([&](auto n) FASTCAPS_LAMBDA { u[r * N + n] += wk * xk[n]; });
      });
    }
  }

  // What the votes of input capsule i come from: its poses in lanes, [D_in, N], or its votes, [J or 1, D_out, N].
  int64_t source_rows() const { return in.weight ? z.D_in : in.stride_j ? JD : z.D_out; }
  void load_source(int64_t g, int64_t i, vec* x) const {
    const int64_t rows = source_rows();
    gather(in.poses + (g * kGroup * z.I + i) * rows, z.I * rows, rows, samples(g), x);
  }
  template <int R>
  FASTCAPS_INLINE void rows_of_votes(int64_t i, int64_t j, int64_t d, const vec* x, vec* u) const {
    if (in.weight) {
      unroll<R * N>([&](auto r) FASTCAPS_LAMBDA { u[r] = vec{}; });
      votes<R>(in.weight + i * in.stride_i + j * in.stride_j + d * z.D_in, x, u);
    } else {
      unroll<R * N>([&](auto r) FASTCAPS_LAMBDA { u[r] = x[(j * in.stride_j + d) * N + r]; });
    }
  }

  void load_prior(int64_t g, int64_t i, vec* logits) const {
    if (!in.prior) {
      for (int64_t r = 0; r < z.J * N; ++r) logits[r] = vec{};
    } else if (in.prior_stride_b) {
      gather(in.prior + g * kGroup * in.prior_stride_b + i * z.J, in.prior_stride_b, z.J, samples(g), logits);
    } else {
      for (int64_t j = 0; j < z.J; ++j)
        for (int n = 0; n < N; ++n) logits[j * N + n] = K::splat(in.prior[i * z.J + j]);
    }
  }

  // Logits [J, N] to coupling coefficients, in place.
  void softmax(vec* c) const {
    const vec lowest = K::splat(in.leaky ? Real(0) : -__builtin_inf());
    for (int n = 0; n < N; ++n) {
      vec top = lowest;
      for (int64_t j = 0; j < z.J; ++j) top = K::bigger(c[j * N + n], top);
      vec total = in.leaky ? K::exp(-top) : vec{};
      for (int64_t j = 0; j < z.J; ++j) total += c[j * N + n] = K::exp(c[j * N + n] - top);
      const vec scale = Real(1) / total;
      for (int64_t j = 0; j < z.J; ++j) c[j * N + n] *= scale;
    }
  }

  // dc [J, N] to db = c (dc - sum_j c dc), in place.
  void softmax_backward(const vec* c, vec* dc) const {
    for (int n = 0; n < N; ++n) {
      vec q = {};
      for (int64_t j = 0; j < z.J; ++j) q += c[j * N + n] * dc[j * N + n];
      for (int64_t j = 0; j < z.J; ++j) dc[j * N + n] = c[j * N + n] * (dc[j * N + n] - q);
    }
  }

  vec squash_scale(vec q) const {
    const vec one = K::splat(1);
    return in.eps > 0 ? q / (one + q) / sqrt(q + in.eps) : sqrt(q) / (one + q);
  }
  static FASTCAPS_INLINE vec sqrt(vec q) {
    vec r;
    for (int l = 0; l < L; ++l) r[l] = std::sqrt(q[l]);
    return r;
  }
  void squash(const vec* s, vec* v) const {
    for (int64_t j = 0; j < z.J; ++j)
      for (int n = 0; n < N; ++n) {
        const int64_t first = j * z.D_out * N + n, end = first + z.D_out * N;
        vec q = {};
        for (int64_t r = first; r < end; r += N) q += s[r] * s[r];
        const vec scale = squash_scale(q);
        for (int64_t r = first; r < end; r += N) v[r] = s[r] * scale;
      }
  }
  // ds = squash'(s)^T dv
  void squash_backward(const vec* s, const vec* dv, vec* ds) const {
    const vec one = K::splat(1);
    for (int64_t j = 0; j < z.J; ++j)
      for (int n = 0; n < N; ++n) {
        const int64_t first = j * z.D_out * N + n, end = first + z.D_out * N;
        vec q = {}, dot = {};
        for (int64_t r = first; r < end; r += N) {
          q += s[r] * s[r];
          dot += s[r] * dv[r];
        }
        // dv plus a multiple of its part along s; in terms of the direction nothing overflows before q does.
        const vec root = sqrt(q), inverse = Real(1) / (q == vec{} ? one : root), scale = squash_scale(q);
        const vec along = in.eps > 0 ? Real(2) / (one + q) - q / (q + in.eps) : (one - q) / (one + q);
        const vec factor = along * (dot * inverse) * inverse;
        for (int64_t r = first; r < end; r += N) ds[r] = scale * (dv[r] + factor * s[r]);
      }
  }

  // ------------------------------------------------------------------------------------------ sums over input capsules

  // sum_i u over a slice: the first iteration without a prior, where every coupling coefficient is the same.
  void plain_sum(int64_t g, int64_t i0, int64_t i1, vec* sum) const {
    const int64_t rows = source_rows(), slab = most(1, least(32, 2048 / rows));
    Scratch<vec> x(slab * rows * N, 3);
    for (int64_t r = 0; r < width; ++r) sum[r] = vec{};
    for (int64_t first = i0; first < i1; first += slab) {
      const int64_t last = least(i1, first + slab);
      for (int64_t i = first; i < last; ++i) load_source(g, i, x + (i - first) * rows * N);
      for (int64_t j = 0; j < z.J; ++j)
        for_rows(z.D_out, [&](int64_t d, auto R) FASTCAPS_LAMBDA {
          vec u[R * N];
          unroll<R * N>([&](auto r) FASTCAPS_LAMBDA { u[r] = vec{}; });
          if (in.weight) {
            for (int64_t i = first; i < last; ++i)
              votes<R>(in.weight + i * in.stride_i + j * in.stride_j + d * z.D_in, x + (i - first) * rows * N, u);
          } else {
            for (int64_t i = first; i < last; ++i)
              unroll<R * N>([&](auto r)
                                FASTCAPS_LAMBDA { u[r] += x[((i - first) * rows + j * in.stride_j + d) * N + r]; });
          }
          unroll<R * N>([&](auto r) FASTCAPS_LAMBDA { sum[(j * z.D_out + d) * N + r] += u[r]; });
        });
    }
  }

  // sum_i c u (forward, ds null) or sum_i db u (the sweep of the backward) over a slice; V null: logits are the prior.
  void routed_sum(int64_t g, int64_t i0, int64_t i1, const vec* V, const vec* ds, vec* sum) const {
    const int64_t rows = source_rows(), JN = z.J * N;
    const int64_t together = most(1, least(K::kTogether, (400 << 10) / (int64_t)(width * sizeof(vec))));
    Scratch<vec> x(rows * N * together, 1), u(width * together, 5), c(JN * together, 9), dc(JN * together, 13);
    for (int64_t r = 0; r < width; ++r) sum[r] = vec{};
    for (int64_t first = i0; first < i1; first += together) {
      const int64_t count = least(together, i1 - first);
      for (int64_t m = 0; m < count; ++m) {
        load_source(g, first + m, x + m * rows * N);
        load_prior(g, first + m, c + m * JN);
      }
      if (ds)
        for (int64_t r = 0; r < JN * count; ++r) dc[r] = vec{};
      for (int64_t j = 0; j < z.J; ++j)
        for (int64_t m = 0; m < count; ++m) {
          vec logit[N], agreement[N] = {};
          unroll<N>([&](auto n) FASTCAPS_LAMBDA { logit[n] = vec{}; });
          for_rows(z.D_out, [&](int64_t d, auto R) FASTCAPS_LAMBDA {
            const int64_t row = (j * z.D_out + d) * N;
            vec part[R * N];
            rows_of_votes<R>(first + m, j, d, x + m * rows * N, part);
            if (V) unroll<R * N>([&](auto r) FASTCAPS_LAMBDA { logit[r % N] += part[r] * V[row + r]; });
            if (ds) unroll<R * N>([&](auto r) FASTCAPS_LAMBDA { agreement[r % N] += part[r] * ds[row + r]; });
            unroll<R * N>([&](auto r) FASTCAPS_LAMBDA { u[m * width + row + r] = part[r]; });
          });
          unroll<N>([&](auto n) FASTCAPS_LAMBDA {
            c[m * JN + j * N + n] += logit[n];
            if (ds) dc[m * JN + j * N + n] = agreement[n];
          });
        }
      for (int64_t m = 0; m < count; ++m) {
        softmax(c + m * JN);
        if (ds) softmax_backward(c + m * JN, dc + m * JN);
      }
      const vec* factor = ds ? dc : c;
      for (int64_t j = 0; j < z.J; ++j) {
        vec f[K::kTogether * N];
        for (int64_t m = 0; m < count; ++m)
          for (int n = 0; n < N; ++n) f[m * N + n] = factor[m * JN + j * N + n];
        const int64_t end = (j + 1) * z.D_out * N;
        if (count == 4) {
          for (int64_t r = j * z.D_out * N; r < end; r += N)
            unroll<N>([&](auto n) FASTCAPS_LAMBDA {
              sum[r + n] += (f[n] * u[r + n] + f[N + n] * u[width + r + n]) +
                            (f[2 * N + n] * u[2 * width + r + n] + f[3 * N + n] * u[3 * width + r + n]);
            });
        } else {
          for (int64_t m = 0; m < count; ++m)
            for (int64_t r = j * z.D_out * N; r < end; r += N)
              unroll<N>([&](auto n) FASTCAPS_LAMBDA { sum[r + n] += f[m * N + n] * u[m * width + r + n]; });
        }
      }
    }
  }

  // `each(g, i0, i1, sum)` for every slice of every group, then `done(g, sum)` with the sum over the slices in order.
  template <class Each, class Done>
  void over_slices(vec* partial, const Each& each, const Done& done) const {
    parallel_for(parallel, groups * slices, [&](int64_t task) {
      const int64_t g = task / slices, s = task % slices;
      each(g, z.I * s / slices, z.I * (s + 1) / slices, partial + task * width);
    });
    parallel_for(parallel, groups, [&](int64_t g) {
      vec* sum = partial + g * slices * width;
      for (int64_t s = 1; s < slices; ++s)
        for (int64_t r = 0; r < width; ++r) sum[r] += sum[s * width + r];
      done(g, sum);
    });
  }

  Real uniform() const { return Real(1) / (z.J + in.leaky); }

  void forward(Real* out, Real* sums) const {
    Scratch<vec> partial(groups * slices * width), V(groups * width, 7);
    for (int64_t t = 0; t < z.T; ++t) {
      const bool plain = t == 0 && !in.prior;
      over_slices(
          partial,
          [&](int64_t g, int64_t i0, int64_t i1, vec* sum) {
            if (plain)
              plain_sum(g, i0, i1, sum);
            else
              routed_sum(g, i0, i1, t ? V + g * width : nullptr, nullptr, sum);
          },
          [&](int64_t g, vec* s) {
            for (int64_t r = 0; r < JD; ++r)
              for (int n = 0; n < N; ++n) {
                if (plain) s[r * N + n] *= uniform();
                if (in.bias) s[r * N + n] += in.bias[r];
              }
            const int64_t first = g * kGroup * JD;
            scatter(s, JD, JD, samples(g), sums + t * z.B * JD + first);
            squash(s, s);
            if (t == z.T - 1) scatter(s, JD, JD, samples(g), out + first);
            for (int64_t r = 0; r < width; ++r) V[g * width + r] = t ? V[g * width + r] + s[r] : s[r];
          });
    }
  }
};

}  // namespace FASTCAPS_ISA
}  // namespace fastcaps
