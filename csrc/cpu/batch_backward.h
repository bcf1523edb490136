// The backward on the CPU, from the weighted sums alone: a sweep over the input capsules for every iteration but the
// first, then one over all iterations at once that writes the gradients.
#include "cpu/batch.h"

namespace fastcaps {
namespace FASTCAPS_ISA {

template <class Real, int N, bool kPairs>
struct Backward : Pass<Real, N> {
  using P = Pass<Real, N>;
  using K = Kernel<Real>;
  using P::for_rows;
  using P::gather;
  using P::groups;
  using P::in;
  using P::JD;
  using P::kGroup;
  using P::L;
  using P::load_prior;
  using P::load_source;
  using P::matrices;
  using P::matrices_size;
  using P::over_slices;
  using P::parallel;
  using P::samples;
  using P::scatter;
  using P::slices;
  using P::source_rows;
  using P::squash;
  using P::squash_backward;
  using P::stored;
  using P::width;
  using P::with_depth;
  using P::z;
  using typename K::vec;
  const Pass<Real, N, kPairs> sweeping;  // the sweeps need no gradients, which are products of single entries

  Backward(const Routing<Real>& in, Parallel parallel) : P(in, parallel), sweeping(in, parallel) {}

  void run(const Gradients<Real>& out) const {
    const int64_t all = groups * width;
    Scratch<vec> V(z.T * all, 3), ds(z.T * all, 5), dv(all, 7),
        partial(in.detach || z.T == 1 ? 1 : groups * slices * width, 9);
    // V[t] = v_0 + ... + v_{t-1}; ds[t] holds s_t until its turn comes.
    parallel_for(parallel, groups, [&](int64_t g) {
      vec* V0 = V + g * width;
      for (int64_t r = 0; r < width; ++r) V0[r] = vec{};
      for (int64_t t = 0; t < z.T; ++t) {
        vec* s = ds + t * all + g * width;
        gather(g, Stored::real, out.sums, t * z.B * JD, JD, JD, s);
        if (t + 1 == z.T) continue;
        vec* next = V0 + (t + 1) * all;
        squash(s, next);
        for (int64_t r = 0; r < width; ++r) next[r] += V0[t * all + r];
      }
      gather(g, stored, out.grad, 0, JD, JD, dv + g * width);
      vec* s = ds + (z.T - 1) * all + g * width;
      squash_backward(s, dv + g * width, s);
      for (int64_t r = 0; r < width; ++r) dv[g * width + r] = vec{};  // from here on dV_{t+1} + ... + dV_{T-1}
    });
    if (!in.detach)
      for (int64_t t = z.T - 1; t > 0; --t)
        over_slices(
            partial,
            [&](int64_t g, int64_t i0, int64_t i1, vec* sum) {
              sweeping.routed_sum(g, i0, i1, V + t * all + g * width, ds + t * all + g * width, sum);
            },
            [&](int64_t g, const vec* dV) {
              vec *total = dv + g * width, *s = ds + (t - 1) * all + g * width;
              for (int64_t r = 0; r < width; ++r) total[r] += dV[r];
              squash_backward(s, total, s);
            });
    const int64_t t0 = in.detach ? z.T - 1 : 0;
    if (out.d_bias)
      for (int64_t r = 0; r < JD; ++r) {
        double total = 0;
        for (int64_t t = t0; t < z.T; ++t)
          for (int64_t g = 0; g < groups; ++g)
            for (int n = 0; n < N; ++n) {
              const vec lanes = ds[t * all + g * width + r * N + n];
              for (int l = 0; l < L; ++l) total += lanes[l];
            }
        out.d_bias[r] = Real(total);
      }
    if (out.d_prior && !z.B && !in.prior_stride_b) std::memset(out.d_prior, 0, z.I * z.J * sizeof(Real));
    if (out.d_poses || out.d_weight || out.d_prior) final_sweep(out, V, ds, t0);
  }

  // The gradients of poses, weight and prior: a task owns a slice of I and loops over all samples and output capsules.
  void final_sweep(const Gradients<Real>& out, const vec* V, const vec* ds, int64_t t0) const {
    const int64_t tasks = most(1, least(64, z.I / 4));
    parallel_for(parallel, tasks, [&](int64_t task) {
      gradients_of_slice(out, V, ds, t0, z.I * task / tasks, z.I * (task + 1) / tasks);
    });
  }

  void gradients_of_slice(const Gradients<Real>& out, const vec* V, const vec* ds, int64_t t0, int64_t i0,
                          int64_t i1) const {
    // Coefficients c_t and db_t of some input capsules and some groups of samples, their poses (or votes) and the
    // gradients of these, within about 600 KB.
    const int64_t rows = source_rows(), x_size = rows * N, matrix = in.stride_i;
    const int64_t steps = z.T - t0, JN = z.J * N, per_group = (2 * steps * JN + 2 * x_size) * sizeof(vec);
    const int64_t limit = 600 << 10;
    const int64_t chunk = most(1, least(groups, most(256 / kGroup, 1))), fit = limit / (per_group * chunk);
    const int64_t together = P::together_widened(most(1, least(8, fit)));
    const int64_t at_once = fit ? chunk : most(1, limit / per_group);
    const bool with_weight = out.d_weight && in.weight;
    Scratch<vec> x(together * at_once * x_size, 1), dx(together * at_once * x_size, 5);
    Scratch<vec> c(together * at_once * steps * JN, 9), db(together * at_once * steps * JN, 13),
        du(z.D_out * N * at_once, 17);
    Scratch<Real> w_buffer(matrices_size(together)), dw_buffer(matrices_size(together));
    for (int64_t first = i0; first < i1; first += together) {
      const int64_t count = least(together, i1 - first);
      const Real* w = matrices(first, count, w_buffer);
      Real* dw = stored == Stored::real ? (Real*)out.d_weight + first * matrix : dw_buffer;
      if (with_weight)
        for (int64_t r = 0; r < count * matrix; ++r) dw[r] = 0;
      for (int64_t g0 = 0; g0 < groups; g0 += at_once) {
        const int64_t g1 = least(groups, g0 + at_once);
        for (int64_t g = g0; g < g1; ++g) {
          const int64_t where = (g - g0) * together;
          load_source(g, first, count, x + where * x_size);
          coefficients(g, first, count, w, V, ds, t0, x + where * x_size, c + where * steps * JN,
                       db + where * steps * JN, out.d_prior != nullptr);
        }
        for (int64_t r = 0; r < together * at_once * x_size; ++r) dx[r] = vec{};
        for (int64_t j = 0; j < z.J; ++j)
          for (int64_t m = 0; m < count; ++m) {
            const Real* wj = w ? w + m * matrix + j * in.stride_j : w;
            for (int64_t g = g0; g < g1; ++g) {
              const int64_t where = (g - g0) * together + m;
              vote_gradient(g, j, V, ds, t0, c + where * steps * JN, db + where * steps * JN,
                            du + (g - g0) * z.D_out * N);
              if (out.d_poses) add_source_gradient(wj, j, du + (g - g0) * z.D_out * N, dx + where * x_size);
            }
            if (with_weight)
              add_weight_gradient(x + m * x_size, together * x_size, du, g1 - g0, dw + m * matrix + j * in.stride_j);
          }
        for (int64_t g = g0; g < g1; ++g) {
          const int64_t where = (g - g0) * together;
          if (out.d_poses) P::clear_masked(g, first, count, rows, dx + where * x_size);
          if (out.d_poses) scatter(g, dx + where * x_size, count * rows, stored, out.d_poses, first * rows, z.I * rows);
          if (out.d_prior)
            for (int64_t m = 0; m < count; ++m)
              prior_gradient(g, g == 0, first + m, steps, db + (where + m) * steps * JN, out.d_prior);
        }
      }
      if (with_weight && stored != Stored::real) narrow(stored, dw, count * matrix, out.d_weight, first * matrix);
    }
  }

  // c_t and db_t [steps, J, N] of `count` input capsules; db_0 only where the prior wants it.
  void coefficients(int64_t g, int64_t first, int64_t count, const Real* w, const vec* V, const vec* ds, int64_t t0,
                    const vec* x, vec* c, vec* db, bool prior) const {
    const int64_t steps = z.T - t0, JN = z.J * N, all = groups * width;
    for (int64_t m = 0; m < count; ++m)
      for (int64_t t = 0; t < steps; ++t) {
        load_prior(g, first + m, 1, c + (m * steps + t) * JN);
        for (int64_t r = 0; r < JN; ++r) db[(m * steps + t) * JN + r] = vec{};
      }
    const int64_t first_dot = in.detach ? steps : t0 == 0 && !prior ? 1 : 0;  // from which step on dots are needed
    const int64_t first_V = t0 == 0 ? 1 : 0;                                  // the step from which on there is a V
    const auto row = [&](const vec* of, int64_t t) { return of + (t0 + t) * all + g * width; };
    if (steps == 3 && first_V == 1 && first_dot == 1)  // three iterations, no gradient of a prior
      dots_of<4>(count, w, x, {row(V, 1), row(V, 2), row(ds, 1), row(ds, 2)},
                 {c + JN, c + 2 * JN, db + JN, db + 2 * JN}, steps * JN);
    else
      for (int64_t t = 0; t < steps; ++t) {
        if (t >= first_V && t >= first_dot)
          dots_of<2>(count, w, x, {row(V, t), row(ds, t)}, {c + t * JN, db + t * JN}, steps * JN);
        else if (t >= first_V || t >= first_dot)
          dots_of<1>(count, w, x, {row(t >= first_V ? V : ds, t)}, {(t >= first_V ? c : db) + t * JN}, steps * JN);
      }
    for (int64_t m = 0; m < count; ++m)
      for (int64_t t = 0; t < steps; ++t) {
        vec *ct = c + (m * steps + t) * JN, *dbt = db + (m * steps + t) * JN;
        K::template softmax<N>(ct, z.J, in.leaky);
        if (t >= first_dot) K::template softmax_backward<N>(ct, dbt, z.J);
      }
  }

  // to[n][j] += <u_j, with[n][j]> for `count` input capsules, `next` vectors from one to the next in `to`.
  template <int M>
  void dots_of(int64_t count, const Real* w, const vec* x, const vec* const (&with)[M], vec* const (&to)[M],
               int64_t next) const {
    const int64_t x_size = source_rows() * N;
    with_depth([&](auto kDepth) FASTCAPS_LAMBDA {
      for (int64_t j = 0; j < z.J; ++j)
        for (int64_t m = 0; m < count; ++m) {
          vec sum[M * N];
          unroll<M * N>([&](auto n) FASTCAPS_LAMBDA { sum[n] = vec{}; });
          for_rows(z.D_out, [&](int64_t d, auto R) FASTCAPS_LAMBDA {
            vec u[R * N];
            this->template rows_of_votes<kDepth, R>(w ? w + m * in.stride_i : w, j, d, x + m * x_size, u);
            unroll<M>([&](auto k) FASTCAPS_LAMBDA {
              const vec* row = with[k] + (j * z.D_out + d) * N;
              unroll<R * N>([&](auto r) FASTCAPS_LAMBDA { sum[k * N + r % N] += u[r] * row[r]; });
            });
          });
          unroll<M * N>([&](auto n) FASTCAPS_LAMBDA { to[n / N][m * next + j * N + n % N] += sum[n]; });
        }
    });
  }

  // du = sum_t c_t ds_t + db_t V_t, [D_out, N].
  void vote_gradient(int64_t g, int64_t j, const vec* V, const vec* ds, int64_t t0, const vec* c, const vec* db,
                     vec* du) const {
    const int64_t steps = z.T - t0, all = groups * width, JN = z.J * N, first = g * width + j * z.D_out * N;
    for_rows(z.D_out, [&](int64_t d, auto R) FASTCAPS_LAMBDA {
      vec sum[R * N];
      unroll<R * N>([&](auto r) FASTCAPS_LAMBDA { sum[r] = vec{}; });
      for (int64_t t = 0; t < steps; ++t) {
        const auto add = [&](const vec* factor, const vec* with) FASTCAPS_LAMBDA {
          vec f[N];
          unroll<N>([&](auto n) FASTCAPS_LAMBDA { f[n] = factor[t * JN + j * N + n]; });
          with += (t0 + t) * all + first + d * N;
          unroll<R * N>([&](auto r) FASTCAPS_LAMBDA { sum[r] += f[r % N] * with[r]; });
        };
        add(c, ds);
        if (t > 0) add(db, V);  // V_0 is 0, and with detach there is one step
      }
      unroll<R * N>([&](auto r) FASTCAPS_LAMBDA { du[d * N + r] = sum[r]; });
    });
  }

  // dx[k] += sum_d w[d, k] du[d]; without a weight the source is the votes themselves.
  void add_source_gradient(const Real* w, int64_t j, const vec* du, vec* dx) const {
    if (!w) {
      for (int64_t r = 0; r < z.D_out * N; ++r) dx[j * in.stride_j * N + r] += du[r];
      return;
    }
    for_rows(z.D_in, [&](int64_t k, auto R) FASTCAPS_LAMBDA {
      vec sum[R * N];
      unroll<R * N>([&](auto r) FASTCAPS_LAMBDA { sum[r] = dx[k * N + r]; });
      for (int64_t d = 0; d < z.D_out; ++d) {
        vec u[N];
        unroll<N>([&](auto n) FASTCAPS_LAMBDA { u[n] = du[d * N + n]; });
        unroll<R>([&](auto r) FASTCAPS_LAMBDA {
          const vec wk = K::splat(w[d * z.D_in + k + r]);
          unroll<N>([&](auto n) FASTCAPS_LAMBDA { sum[r * N + n] += wk * u[n]; });
        });
      }
      unroll<R * N>([&](auto r) FASTCAPS_LAMBDA { dx[k * N + r] = sum[r]; });
    });
  }

  // add_weight_gradient in blocks of kWide entries of x and as many rows of du as share their loads.
  template <int kWide>
  void add_weight_blocks(const vec* x, int64_t stride_g, const vec* du, int64_t count, Real* d_weight) const {
    constexpr int kHigh = L / kWide;
    for (int64_t d = 0; d < z.D_out; d += kHigh)
      for (int64_t k = 0; k < z.D_in; k += kWide) {
        vec sum[L];
        unroll<L>([&](auto p) FASTCAPS_LAMBDA { sum[p] = vec{}; });
        for (int64_t g = 0; g < count; ++g)
          for (int n = 0; n < N; ++n) {
            const vec *left = du + (g * z.D_out + d) * N + n, *right = x + g * stride_g + k * N + n;
            vec rows[kHigh];
            unroll<kHigh>([&](auto r) FASTCAPS_LAMBDA { rows[r] = left[r * N]; });
            unroll<kWide>([&](auto q) FASTCAPS_LAMBDA {
              const vec xq = right[q * N];
              unroll<kHigh>([&](auto r) FASTCAPS_LAMBDA { sum[r * kWide + q] += rows[r] * xq; });
            });
          }
        const vec total = K::sum_lanes(sum);
        for (int r = 0; r < kHigh; ++r)
          for (int q = 0; q < kWide; ++q) d_weight[(d + r) * z.D_in + k + q] += total[r * kWide + q];
      }
  }
  // d_weight[d, k] += sum_b du[b, d] x[b, k]: L entries at a time in the lanes of as many vectors, summed at the end.
  void add_weight_gradient(const vec* x, int64_t stride_g, const vec* du, int64_t count, Real* d_weight) const {
    constexpr int kWide = L < 8 ? L : 8, kSquare = L < 16 ? L / 2 : 4;
    if (z.D_in % kWide == 0 && z.D_out % (L / kWide) == 0)
      return add_weight_blocks<kWide>(x, stride_g, du, count, d_weight);
    if (z.D_in % kSquare == 0 && z.D_out % (L / kSquare) == 0)
      return add_weight_blocks<kSquare>(x, stride_g, du, count, d_weight);
    const int64_t entries = z.D_out * z.D_in;
    for (int64_t first = 0; first < entries; first += L) {
      const vec *left[L], *right[L];
      for (int p = 0; p < L; ++p) {
        const int64_t e = least(first + p, entries - 1);
        left[p] = du + e / z.D_in * N;
        right[p] = x + e % z.D_in * N;
      }
      vec sum[L];
      unroll<L>([&](auto p) FASTCAPS_LAMBDA { sum[p] = vec{}; });
      for (int64_t g = 0; g < count; ++g)
        for (int n = 0; n < N; ++n)
          unroll<L>([&](auto p)
                        FASTCAPS_LAMBDA { sum[p] += left[p][g * z.D_out * N + n] * right[p][g * stride_g + n]; });
      const vec total = K::sum_lanes(sum);
      for (int p = 0; p < L && first + p < entries; ++p) d_weight[first + p] += total[p];
    }
  }

  void prior_gradient(int64_t g, bool starts, int64_t i, int64_t steps, const vec* db, Real* d_prior) const {
    const int64_t JN = z.J * N, n_samples = samples(g);
    for (int64_t j = 0; j < z.J; ++j) {
      Real over_batch = 0;
      for (int64_t b = 0; b < n_samples; ++b) {
        Real sum = 0;
        for (int64_t t = 0; t < steps; ++t) sum += db[t * JN + j * N + b / L][b % L];
        if (in.prior_stride_b) d_prior[(g * kGroup + b) * in.prior_stride_b + i * z.J + j] = sum;
        over_batch += sum;
      }
      if (!in.prior_stride_b) d_prior[i * z.J + j] = (starts ? Real(0) : d_prior[i * z.J + j]) + over_batch;
    }
  }
};

}  // namespace FASTCAPS_ISA
}  // namespace fastcaps
