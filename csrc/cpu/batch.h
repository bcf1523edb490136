// Dynamic routing on the CPU: what forward and backward share, and the forward, for one instruction set. This header
// knows no torch type; each dynamic_routing_<isa>.cpp includes it once, with FASTCAPS_VECTOR_BYTES set and the compiler
// told what it may use.
//
// Samples lie in the lanes of the vectors: N vectors side by side are one group. Votes are computed again in every
// pass and live in the cache for a few input capsules at a time. Everything that crosses input capsules (the weighted
// sums, dV, and gradients of what is shared over I) is summed per slice of I, and the slices in a fixed order: slices
// depend on sizes only, so threads change no bit of the result.
#include "cpu/simd.h"
#include "routing.h"

namespace fastcaps {
namespace FASTCAPS_ISA {

template <class Task>
void parallel_for(Parallel parallel, int64_t n, const Task& task) {
  if (n <= 0) return;
  parallel(n, (void*)&task, [](void* context, int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) (*(const Task*)context)(n);
  });
}

// One call with N vectors of samples side by side. kPairs: poses and weight are bfloat16, taken as pairs of entries in
// 32 bits, which one instruction multiplies and sums.
template <class Real, int N, bool kPairs = false>
struct Pass : Kernel<Real> {
  using K = Kernel<Real>;
  using typename K::vec;
  static constexpr int L = K::L, kGroup = N * K::L;                            // samples in a group
  static constexpr int kRows = N == 1 || FASTCAPS_VECTOR_BYTES == 64 ? 8 : 4;  // whose votes share the registers
  static constexpr int kEntries = kPairs ? 2 : 1;    // of a pose, in what is loaded and multiplied as one
  static constexpr int64_t kVotesLimit = 400 << 10;  // bytes of votes that are kept until the sum is taken
  static constexpr int64_t kChunk = 256 << 10;       // bytes of the sums of some groups that are worked on together
  static constexpr int64_t kNear = 128 << 10;        // bytes of matrices that these groups meet one after the other
  const Routing<Real>& in;
  const Sizes z;
  const Parallel parallel;
  const int64_t JD, width;               // width: vectors of [J, D_out] of one group
  const int64_t groups, chunks, slices;  // of samples; of groups; of the input capsules
  const int64_t depth;                   // D_in, or pairs of them
  const Stored stored;

  Pass(const Routing<Real>& in, Parallel parallel)
      : in(in),
        z(in.size),
        parallel(parallel),
        JD(z.J * z.D_out),
        width(JD * N),
        groups(ceil_div(z.B, kGroup)),
        chunks(least(groups, ceil_div(groups * width * sizeof(vec), kChunk))),
        slices(count_slices()),
        depth(z.D_in / kEntries),
        stored(kPairs ? Stored::real : in.stored) {}

  // At least 16 tasks, so that eight threads are busy, even where their partial sums then take more than 1 MB.
  int64_t count_slices() const {
    if (!groups) return 1;
    const int64_t fit = (1 << 20) / (groups * width * int64_t(sizeof(vec)));
    return most(1, least(z.I / 4, most(ceil_div(16, chunks), least(ceil_div(32, chunks), fit))));
  }
  // Input capsules that all groups of a chunk meet before the next ones: their matrices then come from the L2 cache.
  int64_t met_together() const {
    if (!in.weight || !in.stride_i) return most(1, z.I);
    return most(1, kNear / int64_t(in.stride_i * sizeof(Real)) / K::kTogether) * K::kTogether;
  }

  // Samples of group g that are there, in all or in its vector n.
  int64_t samples(int64_t g) const { return least(kGroup, z.B - g * kGroup); }
  int64_t samples(int64_t g, int n) const { return most(0, least(L, z.B - g * kGroup - n * L)); }

  // Rows [count] of the samples of group g, `stride` apart, -> lanes [count, N]; the lanes that are not there are 0.
  void gather(int64_t g, Stored kind, const void* from, int64_t first, int64_t stride, int64_t count, vec* to) const {
    for (int n = 0; n < N; ++n)
      K::to_lanes(kind, from, first + (g * kGroup + n * L) * stride, stride, samples(g, n), count, to + n, N);
  }
  void scatter(int64_t g, const vec* from, int64_t count, Stored kind, void* to, int64_t first, int64_t stride) const {
    for (int n = 0; n < N; ++n)
      K::from_lanes(from + n, N, samples(g, n), count, kind, to, first + (g * kGroup + n * L) * stride, stride);
  }

  // f(d, R) with R rows at a time, R a constant.
  template <class F>
  static FASTCAPS_INLINE void for_rows(int64_t count, const F& f) {
    int64_t d = 0;
    for (; d + kRows <= count; d += kRows) f(d, std::integral_constant<int, kRows>{});
    if constexpr (kRows > 4)
      for (; d + 4 <= count; d += 4) f(d, std::integral_constant<int, 4>{});
    for (; d < count; ++d) f(d, std::integral_constant<int, 1>{});
  }

  // f(kDepth) with the pose size of the paper as a constant, 0 for any other, -1 where the votes are given: decided
  // once for many rows, as a test in every block of them costs a tenth of the time.
  static constexpr int kPaper = 8 / kEntries;
  template <class F>
  FASTCAPS_INLINE void with_depth(const F& f) const {
    if (!in.weight) return f(std::integral_constant<int, -1>{});
    if constexpr (sizeof(Real) == 4)
      if (depth == kPaper) return f(std::integral_constant<int, kPaper>{});
    f(std::integral_constant<int, 0>{});
  }
  // u[r] += sum_k w[r, k] x[k], for R rows: w [R, depth], x [depth, N].
  template <int kDepth, int R>
  FASTCAPS_INLINE void votes(const Real* w, const vec* x, vec* u) const {
    const auto add = [&](int64_t k, int64_t row) FASTCAPS_LAMBDA {
      vec xk[N];
      unroll<N>([&](auto n) FASTCAPS_LAMBDA { xk[n] = x[k * N + n]; });
      unroll<R>([&](auto r) FASTCAPS_LAMBDA {
        const vec wk = K::splat(w[r * row + k]);
        unroll<N>([&](auto n) FASTCAPS_LAMBDA { u[r * N + n] = K::template fma<kPairs>(wk, xk[n], u[r * N + n]); });
      });
    };
    if constexpr (kDepth > 0) return unroll<kDepth>([&](auto k) FASTCAPS_LAMBDA { add(k, kDepth); });
    int64_t k = 0;
    for (; k + 4 <= depth; k += 4) unroll<4>([&](auto n) FASTCAPS_LAMBDA { add(k + n, depth); });
    for (; k < depth; ++k) add(k, depth);
  }

  // What the votes of input capsules come from: their poses in lanes, [count, depth, N], or their votes,
  // [count, J or 1, D_out, N].
  int64_t source_rows() const { return in.weight ? depth : in.stride_j ? JD : z.D_out; }
  void load_source(int64_t g, int64_t i, int64_t count, vec* x) const {
    const int64_t rows = source_rows();
    gather(g, stored, in.poses, i * rows, z.I * rows, count * rows, x);
    clear_masked(g, i, count, rows, x);
    // The rows of other samples are far from each other, which no processor expects.
    const int64_t entry = stored == Stored::real ? sizeof(Real) : 2, row = rows * entry, b0 = (g + 1) * kGroup;
    for (int64_t b = b0; b < least(b0 + kGroup, z.B); ++b)
      prefetch((const char*)in.poses + (b * z.I + i) * row, count * row);
  }
  // What the mask leaves out of the rows [count, rows, N] of some input capsules becomes 0, whatever it is.
  void clear_masked(int64_t g, int64_t i, int64_t count, int64_t rows, vec* x) const {
    if (!in.mask) return;
    for (int64_t m = 0; m < count; ++m, x += rows * N)
      for (int n = 0; n < N; ++n) {
        const int64_t b = g * kGroup + n * L;
        const auto there = K::lanes_there(in.mask + b * z.I + i + m, z.I, samples(g, n));
        for (int64_t r = n; r < rows * N; r += N) x[r] = there ? x[r] : vec{};
      }
  }
  // Their matrices, [count, J or 1, D_out, depth]; `buffer` is used where they must be widened.
  int64_t together_widened(int64_t count) const {
    if (stored == Stored::real || !in.weight) return count;
    return most(1, least(count, (96 << 10) / int64_t(in.stride_i * sizeof(Real))));
  }
  int64_t matrices_size(int64_t count) const { return in.weight && stored != Stored::real ? count * in.stride_i : 1; }
  const Real* matrices(int64_t i, int64_t count, Real* buffer) const {
    if (!in.weight) return nullptr;
    if (stored == Stored::real) return (const Real*)in.weight + i * (in.stride_i / kEntries);
    widen(stored, in.weight, i * in.stride_i, count * in.stride_i, buffer);
    return buffer;
  }
  // Votes of rows d .. d + R - 1 of output capsule j: w the matrices of the input capsule, x its source.
  template <int kDepth, int R>
  FASTCAPS_INLINE void rows_of_votes(const Real* w, int64_t j, int64_t d, const vec* x, vec* u) const {
    if constexpr (kDepth < 0) {
      unroll<R * N>([&](auto r) FASTCAPS_LAMBDA { u[r] = x[(j * in.stride_j + d) * N + r]; });
    } else {
      unroll<R * N>([&](auto r) FASTCAPS_LAMBDA { u[r] = vec{}; });
      votes<kDepth, R>(w + j * (in.stride_j / kEntries) + d * (kDepth > 0 ? kDepth : depth), x, u);
    }
  }

  void load_prior(int64_t g, int64_t i, int64_t count, vec* logits) const {
    if (!in.prior) {
      for (int64_t r = 0; r < count * z.J * N; ++r) logits[r] = vec{};
    } else if (in.prior_stride_b) {
      gather(g, Stored::real, in.prior, i * z.J, in.prior_stride_b, count * z.J, logits);
    } else {
      for (int64_t r = 0; r < count * z.J; ++r)
        for (int n = 0; n < N; ++n) logits[r * N + n] = K::splat(in.prior[i * z.J + r]);
    }
  }

  void squash(const vec* s, vec* v) const {
    for (int64_t j = 0; j < z.J; ++j)
      for (int n = 0; n < N; ++n) {
        const int64_t first = j * z.D_out * N + n, end = first + z.D_out * N;
        vec q = {};
        for (int64_t r = first; r < end; r += N) q += s[r] * s[r];
        const vec scale = K::squash_scale(q, in.eps);
        for (int64_t r = first; r < end; r += N) v[r] = s[r] * scale;
      }
  }
  // ds = squash'(s)^T dv
  void squash_backward(const vec* s, const vec* dv, vec* ds) const {
    for (int64_t j = 0; j < z.J; ++j)
      for (int n = 0; n < N; ++n) {
        const int64_t first = j * z.D_out * N + n, end = first + z.D_out * N;
        vec q = {}, dot = {};
        for (int64_t r = first; r < end; r += N) {
          q += s[r] * s[r];
          dot += s[r] * dv[r];
        }
        const vec scale = K::squash_scale(q, in.eps);
        const vec factor = K::squash_factor(q, q == vec{} ? K::splat(1) : q, dot, in.eps);
        for (int64_t r = first; r < end; r += N) ds[r] = scale * dv[r] + factor * s[r];
      }
  }

  // ------------------------------------------------------------------------------------------ sums over input capsules

  // sum_i u over a slice: the first iteration without a prior, where every coupling coefficient is the same.
  void plain_sum(int64_t g, int64_t i0, int64_t i1, vec* sum) const {
    const int64_t rows = source_rows(), slab = most(1, least(together_widened(32), 2048 / rows));
    Scratch<vec> x(slab * rows * N, 3);
    Scratch<Real> buffer(matrices_size(slab));
    for (int64_t first = i0; first < i1; first += slab) {
      const int64_t count = least(slab, i1 - first), matrix = in.stride_i / kEntries;
      load_source(g, first, count, x);
      const Real* w = matrices(first, count, buffer);
      with_depth([&](auto kDepth) FASTCAPS_LAMBDA {
        for (int64_t j = 0; j < z.J; ++j)
          for_rows(z.D_out, [&](int64_t d, auto R) FASTCAPS_LAMBDA {
            vec u[R * N];
            unroll<R * N>([&](auto r) FASTCAPS_LAMBDA { u[r] = vec{}; });
            for (int64_t m = 0; m < count; ++m)
              if constexpr (kDepth < 0)
                unroll<R * N>([&](auto r) FASTCAPS_LAMBDA { u[r] += x[(m * rows + j * in.stride_j + d) * N + r]; });
              else
                votes<kDepth, R>(w + m * matrix + j * (in.stride_j / kEntries) + d * depth, x + m * rows * N, u);
            unroll<R * N>([&](auto r) FASTCAPS_LAMBDA { sum[(j * z.D_out + d) * N + r] += u[r]; });
          });
      });
    }
  }

  // Adds sum_i c u (forward, ds null) or sum_i db u (the sweep of the backward) over input capsules i0 .. i1 - 1; V
  // null: the logits are the prior.
  void routed_sum(int64_t g, int64_t i0, int64_t i1, const vec* V, const vec* ds, vec* sum) const {
    if (ds)
      routed_sum<true>(g, i0, i1, V, ds, sum);
    else
      routed_sum<false>(g, i0, i1, V, ds, sum);
  }
  template <bool kBackward>
  void routed_sum(int64_t g, int64_t i0, int64_t i1, const vec* V, const vec* ds, vec* sum) const {
    const int64_t rows = source_rows(), JN = z.J * N;
    const int64_t matrix = in.stride_i / kEntries, entries = in.stride_j / kEntries;
    const int64_t matrix_bytes = z.D_out * depth * sizeof(Real);
    const int64_t next = width | 1;  // from the votes of one capsule to the next: starts 4 KB apart hinder each other
    const bool keep = int64_t(width * sizeof(vec)) <= kVotesLimit;  // else the sum computes the votes again
    const int64_t together =
        keep ? together_widened(least(K::kTogether, kVotesLimit / int64_t(width * sizeof(vec)))) : 1;
    Scratch<vec> x(rows * N * together, 1), u(keep ? next * together : 1, 5), c(JN * together, 9),
        dc(JN * together, 13);
    Scratch<Real> buffer(matrices_size(together));
    for (int64_t first = i0; first < i1; first += together) {
      const int64_t count = least(together, i1 - first);
      load_source(g, first, count, x);
      load_prior(g, first, count, c);
      const Real* w = matrices(first, count, buffer);
      for (int64_t j = 0; j < z.J; ++j)
        for (int64_t m = 0; m < count; ++m) {
          const int64_t row = j * z.D_out * N;
          const vec* const dsj = kBackward ? ds + row : nullptr;
          // What this input capsule meets next; for the last output capsule, another one's first matrix.
          if (w) prefetch(w + (j + 1 < z.J ? m * matrix + (j + 1) * entries : (m + count) * matrix), matrix_bytes);
          vec dots[2 * N];
          unroll<2 * N>([&](auto n) FASTCAPS_LAMBDA { dots[n] = vec{}; });
          const Real* const wm = w ? w + m * matrix : w;
          const vec *const xm = x + m * rows * N, *const Vj = V ? V + row : V;
          with_depth([&](auto kDepth) FASTCAPS_LAMBDA {
            agreement<kDepth, kBackward>(wm, j, xm, Vj, dsj, keep ? u + m * next + row : nullptr, dots);
          });
          unroll<N>([&](auto n) FASTCAPS_LAMBDA {
            c[m * JN + j * N + n] += dots[n];
            dc[m * JN + j * N + n] = dots[N + n];
          });
        }
      for (int64_t m = 0; m < count; ++m) {
        K::template softmax<N>(c + m * JN, z.J, in.leaky);
        if (kBackward) K::template softmax_backward<N>(c + m * JN, dc + m * JN, z.J);
      }
      add_votes(kBackward ? dc : c, count, w, x, keep ? u.data : nullptr, next, sum);
    }
  }
  // dots += <u, V>, if there is a V, and in the backward <u, ds>, of one input and one output capsule; `u`, if any,
  // keeps the votes.
  template <int kDepth, bool kBackward>
  FASTCAPS_INLINE void agreement(const Real* w, int64_t j, const vec* x, const vec* V, const vec* ds, vec* u,
                                 vec* dots) const {
    for_rows(z.D_out, [&](int64_t d, auto R) FASTCAPS_LAMBDA {
      vec part[R * N];
      rows_of_votes<kDepth, R>(w, j, d, x, part);
      if (V) unroll<R * N>([&](auto r) FASTCAPS_LAMBDA { dots[r % N] += part[r] * V[d * N + r]; });
      if constexpr (kBackward)
        unroll<R * N>([&](auto r) FASTCAPS_LAMBDA { dots[N + r % N] += part[r] * ds[d * N + r]; });
      if (u) unroll<R * N>([&](auto r) FASTCAPS_LAMBDA { u[d * N + r] = part[r]; });
    });
  }
  // sum += f u over `count` input capsules, f [count, J, N]; their votes are kept in `u`, or computed again.
  void add_votes(const vec* f, int64_t count, const Real* w, const vec* x, const vec* u, int64_t next, vec* sum) const {
    const int64_t JN = z.J * N;
    for (int64_t j = 0; j < z.J; ++j) {
      const int64_t begin = j * z.D_out * N, end = begin + z.D_out * N;
      vec factor[K::kTogether * N];
      for (int64_t m = 0; m < count; ++m)
        for (int n = 0; n < N; ++n) factor[m * N + n] = f[m * JN + j * N + n];
      if (!u) {
        with_depth([&](auto kDepth) FASTCAPS_LAMBDA {
          for_rows(z.D_out, [&](int64_t d, auto R) FASTCAPS_LAMBDA {
            vec part[R * N];
            rows_of_votes<kDepth, R>(w, j, d, x, part);
            unroll<R * N>([&](auto r) FASTCAPS_LAMBDA { sum[begin + d * N + r] += factor[r % N] * part[r]; });
          });
        });
      } else if (count == 4) {
        for (int64_t r = begin; r < end; r += N)
          unroll<N>([&](auto n) FASTCAPS_LAMBDA {
            const vec* ur = u + r + n;
            sum[r + n] += (factor[n] * ur[0] + factor[N + n] * ur[next]) +
                          (factor[2 * N + n] * ur[2 * next] + factor[3 * N + n] * ur[3 * next]);
          });
      } else {
        for (int64_t m = 0; m < count; ++m)
          for (int64_t r = begin; r < end; r += N)
            unroll<N>([&](auto n) FASTCAPS_LAMBDA { sum[r + n] += factor[m * N + n] * u[m * next + r + n]; });
      }
    }
  }

  // `each(g, i0, i1, sum)` adds input capsules i0 .. i1 - 1 to the sum of group g; `done(g, sum)` gets it over all of
  // them, slice by slice in order.
  template <class Each, class Done>
  void over_slices(vec* partial, const Each& each, const Done& done) const {
    parallel_for(parallel, chunks * slices, [&](int64_t task) {
      const int64_t chunk = task / slices, s = task % slices, step = met_together();
      const int64_t g0 = groups * chunk / chunks, g1 = groups * (chunk + 1) / chunks;
      const int64_t i0 = z.I * s / slices, i1 = z.I * (s + 1) / slices;
      for (int64_t g = g0; g < g1; ++g)
        for (int64_t r = 0; r < width; ++r) partial[(g * slices + s) * width + r] = vec{};
      for (int64_t first = i0; first < i1; first += step)
        for (int64_t g = g0; g < g1; ++g) each(g, first, least(i1, first + step), partial + (g * slices + s) * width);
    });
    parallel_for(parallel, groups, [&](int64_t g) {
      vec* sum = partial + g * slices * width;
      for (int64_t s = 1; s < slices; ++s)
        for (int64_t r = 0; r < width; ++r) sum[r] += sum[s * width + r];
      done(g, sum);
    });
  }

  Real uniform() const { return Real(1) / (z.J + in.leaky); }

  void forward(void* out, Real* sums) const {
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
            scatter(g, s, JD, Stored::real, sums, t * z.B * JD, JD);
            squash(s, s);
            if (t == z.T - 1) scatter(g, s, JD, in.stored, out, 0, JD);
            for (int64_t r = 0; r < width; ++r) V[g * width + r] = t ? V[g * width + r] + s[r] : s[r];
          });
    }
  }
};

}  // namespace FASTCAPS_ISA
}  // namespace fastcaps
