// The backward with samples in the lanes, from the weighted sums alone: a sweep over the input capsules for every
// iteration but the first, then one over all iterations at once that writes the gradients.
//
//   run
//     start                        V_t and ds_{T-1} from the sums
//     over_slices                  t = T-1 .. 1
//       routed_sum                   sum_i db u, which is dV_t
//     squash_backward              dV_t -> ds_{t-1}
//     bias_gradient                d_bias
//     last_sweep                   a task: a slice of the input capsules; a chunk of them and a band of tiles at a time
//       coefficients                 c_t and db_t of all iterations
//       vote_gradient                du = sum_t c_t ds_t + db_t V_t
//       add_source_gradient          d_poses (or votes)
//       add_weight_gradient          d_weight
//       prior_gradient               d_prior
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/batch.h"
#include "cpu/entry_points.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/simd.h"
#include "numbers.h"
#include "routing.h"

namespace fastcaps {
namespace FASTCAPS_ISA {

template <class Real, int N, bool kPairs>
struct BatchBackward : BatchForward<Real, N> {
  using Forward = BatchForward<Real, N>;
  using SIMD = Simd<Real>;
  using Forward::for_rows;
  using Forward::gather;
  using Forward::in;
  using Forward::JD;
  using Forward::JDN;
  using Forward::kTileSamples;
  using Forward::L;
  using Forward::load_prior;
  using Forward::load_source;
  using Forward::matrices;
  using Forward::matrices_size;
  using Forward::over_slices;
  using Forward::parallel;
  using Forward::samples;
  using Forward::scatter;
  using Forward::slices;
  using Forward::source_rows;
  using Forward::squash;
  using Forward::squash_backward;
  using Forward::stored;
  using Forward::tiles;
  using Forward::with_depth;
  using Forward::z;
  using typename SIMD::vec;
  // Of the last sweep: its tasks, the most input capsules and samples that it takes at a time, and what they may take
  // up of the L2 cache. Chunks of 4 to 16, and smaller bands, made no difference.
  static constexpr int64_t kLastTasks = 64, kLastChunk = 8, kLastBandSamples = 256, kLastNearBytes = 600 << 10;
  // Its sweeps multiply pairs where there is an instruction for it; gradients are products of single entries.
  const BatchForward<Real, N, kPairs> sweeping;

  BatchBackward(const Routing<Real>& in, Parallel parallel) : Forward(in, parallel), sweeping(in, parallel) {}

  void run(const Gradients<Real>& out) const {
    const int64_t stride_t = tiles * JDN;
    Scratch<vec> V(z.T * stride_t, 3), ds(z.T * stride_t, 5), dv(stride_t, 7),
        partial(in.detach || z.T == 1 ? 1 : tiles * slices * JDN, 9);
    parallel_for(parallel, tiles, [&](int64_t tile) { start(out, tile, V, ds, dv); });
    if (!in.detach)
      for (int64_t t = z.T - 1; t > 0; --t)
        over_slices(
            partial,
            [&](int64_t tile, int64_t i0, int64_t i1, vec* sum) {
              sweeping.routed_sum(tile, i0, i1, V + t * stride_t + tile * JDN, ds + t * stride_t + tile * JDN, sum);
            },
            [&](int64_t tile, const vec* dV) {
              vec *total = dv + tile * JDN, *s = ds + (t - 1) * stride_t + tile * JDN;
              for (int64_t r = 0; r < JDN; ++r) total[r] += dV[r];
              squash_backward(s, total, s);
            });
    const int64_t t0 = in.detach ? z.T - 1 : 0;
    if (out.d_bias) bias_gradient(ds, t0, out.d_bias);
    if (out.d_prior && !z.B && !in.prior_stride_b) std::memset(out.d_prior, 0, z.I * z.J * sizeof(Real));
    if (out.d_poses || out.d_weight || out.d_prior) last_sweep(out, V, ds, t0);
  }

  // Of a batch tile: V[t] = v_0 + ... + v_{t-1}; ds_{T-1}, while ds[t] holds s_t until its turn comes; and dv, which
  // from here on is dV_{t+1} + ... + dV_{T-1}.
  void start(const Gradients<Real>& out, int64_t tile, vec* V, vec* ds, vec* dv) const {
    const int64_t stride_t = tiles * JDN;
    V += tile * JDN, ds += tile * JDN, dv += tile * JDN;
    for (int64_t r = 0; r < JDN; ++r) V[r] = vec{};
    for (int64_t t = 0; t < z.T; ++t) {
      vec* s = ds + t * stride_t;
      gather(tile, Stored::real, out.sums, t * z.B * JD, JD, JD, s);
      if (t + 1 == z.T) continue;
      vec* next = V + (t + 1) * stride_t;
      squash(s, next);
      for (int64_t r = 0; r < JDN; ++r) next[r] += V[t * stride_t + r];
    }
    gather(tile, stored, out.grad, 0, JD, JD, dv);
    vec* s = ds + (z.T - 1) * stride_t;
    squash_backward(s, dv, s);
    for (int64_t r = 0; r < JDN; ++r) dv[r] = vec{};
  }

  void bias_gradient(const vec* ds, int64_t t0, Real* d_bias) const {
    for (int64_t r = 0; r < JD; ++r) {
      double total = 0;
      for (int64_t t = t0; t < z.T; ++t)
        for (int64_t tile = 0; tile < tiles; ++tile)
          for (int n = 0; n < N; ++n) {
            const vec lanes = ds[(t * tiles + tile) * JDN + r * N + n];
            for (int l = 0; l < L; ++l) total += lanes[l];
          }
      d_bias[r] = Real(total);
    }
  }

  // The gradients of poses, weight and prior: a task owns a slice of I and loops over all samples and output capsules.
  void last_sweep(const Gradients<Real>& out, const vec* V, const vec* ds, int64_t t0) const {
    const int64_t tasks = most(1, least(kLastTasks, z.I / Forward::kChunk));
    parallel_for(parallel, tasks, [&](int64_t task) {
      gradients_of_slice(out, V, ds, t0, z.I * task / tasks, z.I * (task + 1) / tasks);
    });
  }

  void gradients_of_slice(const Gradients<Real>& out, const vec* V, const vec* ds, int64_t t0, int64_t i0,
                          int64_t i1) const {
    // c_t, db_t, poses (or votes) and the gradients of these, of a chunk of input capsules and a band of tiles.
    const int64_t rows = source_rows(), x_size = rows * N, matrix = in.stride_i;
    const int64_t steps = z.T - t0, JN = z.J * N, tile_bytes = (2 * steps * JN + 2 * x_size) * sizeof(vec);
    const int64_t wanted = most(1, least(tiles, most(kLastBandSamples / kTileSamples, 1)));
    const int64_t affordable = kLastNearBytes / (tile_bytes * wanted);  // input capsules beside so many tiles
    const int64_t chunk = Forward::widened_chunk(most(1, least(kLastChunk, affordable)));
    const int64_t band = affordable ? wanted : most(1, kLastNearBytes / tile_bytes);
    const bool with_weight = out.d_weight && in.weight;
    Scratch<vec> x(chunk * band * x_size, 1), dx(chunk * band * x_size, 5);
    Scratch<vec> c(chunk * band * steps * JN, 9), db(chunk * band * steps * JN, 13), du(z.D_out * N * band, 17);
    Scratch<Real> w_buffer(matrices_size(chunk)), dw_buffer(matrices_size(chunk));
    for (int64_t first = i0; first < i1; first += chunk) {
      const int64_t count = least(chunk, i1 - first);
      const Real* w = matrices(first, count, w_buffer);
      Real* dw = stored == Stored::real ? (Real*)out.d_weight + first * matrix : dw_buffer;
      if (with_weight)
        for (int64_t r = 0; r < count * matrix; ++r) dw[r] = 0;
      for (int64_t tile0 = 0; tile0 < tiles; tile0 += band) {
        const int64_t tile1 = least(tiles, tile0 + band);
        for (int64_t tile = tile0; tile < tile1; ++tile) {
          const int64_t at = (tile - tile0) * chunk;
          load_source(tile, first, count, x + at * x_size);
          coefficients(tile, first, count, w, V, ds, t0, x + at * x_size, c + at * steps * JN, db + at * steps * JN,
                       out.d_prior != nullptr);
        }
        for (int64_t r = 0; r < chunk * band * x_size; ++r) dx[r] = vec{};
        for (int64_t j = 0; j < z.J; ++j)
          for (int64_t m = 0; m < count; ++m) {
            const Real* wj = w ? w + m * matrix + j * in.stride_j : w;
            for (int64_t tile = tile0; tile < tile1; ++tile) {
              const int64_t at = (tile - tile0) * chunk + m;
              vote_gradient(tile, j, V, ds, t0, c + at * steps * JN, db + at * steps * JN,
                            du + (tile - tile0) * z.D_out * N);
              if (out.d_poses) add_source_gradient(wj, j, du + (tile - tile0) * z.D_out * N, dx + at * x_size);
            }
            if (with_weight)
              add_weight_gradient(x + m * x_size, chunk * x_size, du, tile1 - tile0, dw + m * matrix + j * in.stride_j);
          }
        for (int64_t tile = tile0; tile < tile1; ++tile) {
          const int64_t at = (tile - tile0) * chunk;
          if (out.d_poses) Forward::clear_masked(tile, first, count, rows, dx + at * x_size);
          if (out.d_poses) scatter(tile, dx + at * x_size, count * rows, stored, out.d_poses, first * rows, z.I * rows);
          if (!out.d_prior) continue;
          Forward::clear_masked(tile, first, count, steps * z.J, db + at * steps * JN);
          for (int64_t m = 0; m < count; ++m)
            prior_gradient(tile, tile == 0, first + m, steps, db + (at + m) * steps * JN, out.d_prior);
        }
      }
      if (with_weight && stored != Stored::real) narrow(stored, dw, count * matrix, out.d_weight, first * matrix);
    }
  }

  // c_t and db_t [steps, J, N] of `count` input capsules; db_0 only where the prior wants it.
  void coefficients(int64_t tile, int64_t first, int64_t count, const Real* w, const vec* V, const vec* ds, int64_t t0,
                    const vec* x, vec* c, vec* db, bool prior) const {
    const int64_t steps = z.T - t0, JN = z.J * N, stride_t = tiles * JDN;
    for (int64_t m = 0; m < count; ++m)
      for (int64_t t = 0; t < steps; ++t) {
        load_prior(tile, first + m, 1, c + (m * steps + t) * JN);
        for (int64_t r = 0; r < JN; ++r) db[(m * steps + t) * JN + r] = vec{};
      }
    const int64_t first_dot = in.detach ? steps : t0 == 0 && !prior ? 1 : 0;  // from which step on dots are needed
    const int64_t first_V = t0 == 0 ? 1 : 0;                                  // the step from which on there is a V
    const auto row = [&](const vec* of, int64_t t) { return of + (t0 + t) * stride_t + tile * JDN; };
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
        SIMD::template softmax<N>(ct, z.J, in.leaky);
        if (t >= first_dot) SIMD::template softmax_backward<N>(ct, dbt, z.J);
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
            this->template vote_rows<kDepth, R>(w ? w + m * in.stride_i : w, j, d, x + m * x_size, u);
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
  void vote_gradient(int64_t tile, int64_t j, const vec* V, const vec* ds, int64_t t0, const vec* c, const vec* db,
                     vec* du) const {
    const int64_t steps = z.T - t0, stride_t = tiles * JDN, JN = z.J * N, first = tile * JDN + j * z.D_out * N;
    for_rows(z.D_out, [&](int64_t d, auto R) FASTCAPS_LAMBDA {
      vec sum[R * N];
      unroll<R * N>([&](auto r) FASTCAPS_LAMBDA { sum[r] = vec{}; });
      for (int64_t t = 0; t < steps; ++t) {
        const auto add = [&](const vec* factor, const vec* with) FASTCAPS_LAMBDA {
          vec f[N];
          unroll<N>([&](auto n) FASTCAPS_LAMBDA { f[n] = factor[t * JN + j * N + n]; });
          with += (t0 + t) * stride_t + first + d * N;
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
          const vec wk = SIMD::splat(w[d * z.D_in + k + r]);
          unroll<N>([&](auto n) FASTCAPS_LAMBDA { sum[r * N + n] += wk * u[n]; });
        });
      }
      unroll<R * N>([&](auto r) FASTCAPS_LAMBDA { dx[k * N + r] = sum[r]; });
    });
  }

  // add_weight_gradient in rectangles of kWide entries of x and as many rows of du as share their loads: 25 -> 21 ms.
  template <int kWide>
  void add_weight_rectangles(const vec* x, int64_t stride_tile, const vec* du, int64_t count, Real* d_weight) const {
    constexpr int kHigh = L / kWide;
    for (int64_t d = 0; d < z.D_out; d += kHigh)
      for (int64_t k = 0; k < z.D_in; k += kWide) {
        vec sum[L];
        unroll<L>([&](auto p) FASTCAPS_LAMBDA { sum[p] = vec{}; });
        for (int64_t tile = 0; tile < count; ++tile)
          for (int n = 0; n < N; ++n) {
            const vec *left = du + (tile * z.D_out + d) * N + n, *right = x + tile * stride_tile + k * N + n;
            vec rows[kHigh];
            unroll<kHigh>([&](auto r) FASTCAPS_LAMBDA { rows[r] = left[r * N]; });
            unroll<kWide>([&](auto q) FASTCAPS_LAMBDA {
              const vec xq = right[q * N];
              unroll<kHigh>([&](auto r) FASTCAPS_LAMBDA { sum[r * kWide + q] += rows[r] * xq; });
            });
          }
        const vec total = SIMD::sum_lanes(sum);
        for (int r = 0; r < kHigh; ++r)
          for (int q = 0; q < kWide; ++q) d_weight[(d + r) * z.D_in + k + q] += total[r * kWide + q];
      }
  }
  // d_weight[d, k] += sum_b du[b, d] x[b, k]: L entries at a time in the lanes of as many vectors, summed at the end.
  void add_weight_gradient(const vec* x, int64_t stride_tile, const vec* du, int64_t count, Real* d_weight) const {
    constexpr int kWide = L < 8 ? L : 8, kSquare = L < 16 ? L / 2 : 4;
    if (z.D_in % kWide == 0 && z.D_out % (L / kWide) == 0)
      return add_weight_rectangles<kWide>(x, stride_tile, du, count, d_weight);
    if (z.D_in % kSquare == 0 && z.D_out % (L / kSquare) == 0)
      return add_weight_rectangles<kSquare>(x, stride_tile, du, count, d_weight);
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
      for (int64_t tile = 0; tile < count; ++tile)
        for (int n = 0; n < N; ++n)
          unroll<L>([&](auto p) FASTCAPS_LAMBDA {
            sum[p] += left[p][tile * z.D_out * N + n] * right[p][tile * stride_tile + n];
          });
      const vec total = SIMD::sum_lanes(sum);
      for (int p = 0; p < L && first + p < entries; ++p) d_weight[first + p] += total[p];
    }
  }

  void prior_gradient(int64_t tile, bool starts, int64_t i, int64_t steps, const vec* db, Real* d_prior) const {
    const int64_t JN = z.J * N, n_samples = samples(tile);
    for (int64_t j = 0; j < z.J; ++j) {
      Real over_batch = 0;
      for (int64_t b = 0; b < n_samples; ++b) {
        Real sum = 0;
        for (int64_t t = 0; t < steps; ++t) sum += db[t * JN + j * N + b / L][b % L];
        if (in.prior_stride_b) d_prior[(tile * kTileSamples + b) * in.prior_stride_b + i * z.J + j] = sum;
        over_batch += sum;
      }
      if (!in.prior_stride_b) d_prior[i * z.J + j] = (starts ? Real(0) : d_prior[i * z.J + j]) + over_batch;
    }
  }
};

}  // namespace FASTCAPS_ISA
}  // namespace fastcaps
