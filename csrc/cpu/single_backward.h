// The backward one sample at a time: as with samples in the lanes, sweeps and a last sweep.
//
//   run
//     for_samples
//       sweeps                       V_t; for t = T-1 .. 1 sum_i db u, which is dV_t, and ds_{t-1}
//         Band::run                    one sweep (cpu/single.h)
//     last_sweep                     a chunk of L input capsules: the gradients from all iterations at once
//       coefficients                   c_t and db_t
//       row_gradients                  du = sum_t c_t ds_t + db_t V_t
//       transform_backward             d_weight and d_poses, where each input capsule has matrices
//     shared_weight_gradient         where one matrix serves all: from sum_i c x and sum_i db x
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/entry_points.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/simd.h"
#include "cpu/single.h"
#include "numbers.h"
#include "routing.h"

namespace fastcaps {
namespace FASTCAPS_ISA {

template <class Real>
struct SingleBackward : SingleForward<Real> {
  using Forward = SingleForward<Real>;
  using SIMD = Simd<Real>;
  using typename SIMD::vec;
  using Band = typename Forward::Band;
  using Rows = typename Forward::Rows;
  using Forward::capsule_size;
  using Forward::chunks;
  using Forward::count;
  using Forward::D;
  using Forward::for_vectors;
  using Forward::in;
  using Forward::in_place;
  using Forward::J_out;
  using Forward::J_row;
  using Forward::L;
  using Forward::one_row;
  using Forward::out_row;
  using Forward::pose_vectors;
  using Forward::routed;
  using Forward::row;
  using Forward::z;

  static constexpr int kRows = L < 4 ? L : 4;        // that are worked on together
  static constexpr int64_t kPartialBytes = 2 << 20;  // of the gradients of a shared prior that tasks sum up
  static constexpr int64_t kLongSum = 128;           // terms that are added at a time: longer sums lose digits
  const Gradients<Real>& out;
  const int64_t t0, steps;         // the iterations that are differentiated: t0 .. T - 1
  const bool keep_sums;            // r and p, for the gradient of shared matrices
  Scratch<Real> s, V, ds, rest;    // [T, B, J, out_row]; rest [B, J, out_row]: dV_{t+1} + ... + dV_{T-1}
  Scratch<Real> y_poses, g_poses;  // [T, B, J, row] where poses are routed: W^T V and W^T ds
  Scratch<Real> r, p;              // [T, B, J, row]: sum_i c x and sum_i db x
  const Real *const y, *const g;   // what rows are multiplied with: [T, B, J, row]

  SingleBackward(const Routing<Real>& in, const Gradients<Real>& out)
      : Forward(in),
        out(out),
        t0(in.detach ? z.T - 1 : 0),
        steps(z.T - t0),
        keep_sums(routed == Routed::poses && out.d_weight),
        s(z.T * z.B * J_out),
        V(z.T * z.B * J_out, 1),
        ds(z.T * z.B * J_out, 3),
        rest(z.B * J_out, 5),
        y_poses(routed == Routed::poses ? z.T * z.B * J_row : 1, 7),
        g_poses(routed == Routed::poses ? z.T * z.B * J_row : 1, 9),
        r(keep_sums ? z.T * z.B * J_row : 1, 11),
        p(keep_sums ? z.T * z.B * J_row : 1, 13),
        y(routed == Routed::poses ? y_poses.data : V.data),
        g(routed == Routed::poses ? g_poses.data : ds.data) {}

  void run(Parallel parallel) {
    // Side by side, tasks sum the gradient of a prior that all samples have into partial sums of their own.
    const bool computed = routed == Routed::computed_votes, sum_prior = out.d_prior && !in.prior_stride_b;
    const int64_t IJ = z.I * z.J, tasks = least(z.B, Forward::kTasks);
    const bool side_by_side = z.B >= Forward::kManySamples && !computed &&
                              (!sum_prior || tasks * IJ * int64_t(sizeof(Real)) <= kPartialBytes);
    Scratch<Real> partial(sum_prior && side_by_side ? tasks * IJ : 1);
    if (sum_prior) std::memset(side_by_side ? partial : out.d_prior, 0, (side_by_side ? tasks : 1) * IJ * sizeof(Real));
    const bool by_chunk = out.d_poses || out.d_prior || (computed && out.d_weight);
    bool done = !by_chunk;
    Forward::for_samples(side_by_side, true, parallel, [&](Band& band, int64_t task) {
      sweeps(band);
      if (!by_chunk) return;
      if (side_by_side) {
        Real* d_prior = sum_prior ? partial + task * IJ : out.d_prior;
        for (int64_t chunk = 0; chunk < chunks; ++chunk)
          last_sweep(chunk, band.b0, band.samples, band.kept(), band.fresh, d_prior);
      } else if (band.keeps_rows && band.samples == z.B) {
        parallel_for(parallel, chunks,
                     [&](int64_t chunk) { last_sweep(chunk, 0, z.B, band.kept(), band.fresh, out.d_prior); });
        done = true;
      }
    });
    if (!side_by_side && !done) last_sweep_in_bands(parallel);
    if (side_by_side && sum_prior)
      for (int64_t n = 0; n < IJ; ++n) {
        Real total = 0;
        for (int64_t task = 0; task < tasks; ++task) total += partial[task * IJ + n];
        out.d_prior[n] = total;
      }
    if (keep_sums) shared_weight_gradient(parallel);
    if (out.d_bias) bias_gradient();
  }
  // The last sweep where the rows of all samples are not kept.
  void last_sweep_in_bands(Parallel parallel) {
    const int64_t local = most(1, Forward::kLocalBytes / int64_t(L * capsule_size * sizeof(Real)));
    const int64_t few = in_place ? Forward::kBandSamples : least(Forward::kBandSamples, local);
    const int64_t together = routed == Routed::computed_votes ? most(1, z.B) : few;
    parallel_for(parallel, chunks, [&](int64_t chunk) {
      for (int64_t b = 0; b < most(1, z.B); b += together)
        last_sweep(chunk, b, least(together, z.B - b), nullptr, true, out.d_prior);
    });
  }
  void bias_gradient() const {
    for (int64_t j = 0; j < z.J; ++j)
      for (int64_t d = 0; d < z.D_out; ++d) {
        double total = 0;
        for (int64_t tb = t0 * z.B; tb < z.T * z.B; ++tb) total += ds[tb * J_out + j * out_row + d];
        out.d_bias[j * z.D_out + d] = Real(total);
      }
  }

  int64_t index(int64_t t, int64_t b) const { return t * z.B + b; }
  void set_query(int64_t samples, const Real* from, Real* query, int64_t tb) const {
    if (routed == Routed::poses) Forward::to_query(samples, from + tb * J_out, query + tb * J_row);
  }

  // ds_t for every t, V_t, and what is made of them.
  void sweeps(Band& band) {
    const int64_t b0 = band.b0, samples = band.samples, b1 = b0 + samples, JD = z.J * z.D_out;
    Scratch<Real> v(samples * J_out);
    for (int64_t t = 0; t < z.T; ++t)
      for (int64_t b = b0; b < b1; ++b) {
        const int64_t tb = index(t, b) * J_out;
        Forward::pad(Stored::real, out.sums, index(t, b) * JD, z.J, z.D_out, s + tb);
        if (t == 0)
          for (int64_t n = 0; n < J_out; ++n) V[tb + n] = rest[b * J_out + n] = 0;
        if (t + 1 == z.T) continue;
        const int64_t next = index(t + 1, b) * J_out;
        Forward::squash(s + tb, V + next);
        for (int64_t n = 0; n < J_out; ++n) V[next + n] += V[tb + n];
      }
    for (int64_t t = 1; t < z.T; ++t) set_query(samples, V, y_poses, index(t, b0));
    for (int64_t b = b0; b < b1; ++b) {
      Forward::pad(in.stored, out.grad, b * JD, z.J, z.D_out, v);
      Forward::squash_backward(s + index(z.T - 1, b) * J_out, v, ds + index(z.T - 1, b) * J_out);
    }
    set_query(samples, ds, g_poses, index(z.T - 1, b0));
    for (int64_t t = z.T - 1; t >= t0; --t) {
      const bool moves = t > 0 && !in.detach, uniform = t == 0 && !in.prior;
      if (!moves && !keep_sums) break;
      const int64_t tb = index(t, b0);
      band.run({t ? y + tb * J_row : nullptr, moves ? g + tb * J_row : nullptr, uniform, keep_sums, moves},
               [&](const Real* r_t, const Real* p_t) {
                 for (int64_t n = 0; n < samples * J_row && keep_sums; ++n) {
                   r[tb * J_row + n] = uniform ? r_t[n] * Forward::uniform_coupling() : r_t[n];
                   p[tb * J_row + n] = moves ? p_t[n] : 0;
                 }
                 if (!moves) return;
                 Forward::from_sum(samples, p_t, v);
                 const int64_t before = index(t - 1, b0);
                 for (int64_t n = 0; n < samples * J_out; ++n) rest[b0 * J_out + n] += v[n];
                 for (int64_t b = 0; b < samples; ++b)
                   Forward::squash_backward(s + (before + b) * J_out, rest + (b0 + b) * J_out,
                                            ds + (before + b) * J_out);
                 set_query(samples, ds, g_poses, before);
               });
    }
  }

  // ---------------------------------------------------------------------------- gradients of a chunk of capsules

  // Those of some samples: all of them where each input capsule has matrices of its own.
  void last_sweep(int64_t chunk, int64_t b0, int64_t samples, Real* cache, bool fresh, Real* d_prior) const {
    const int64_t size = steps * z.J, n = count(chunk), X = pose_vectors(), chunk_size = samples * L * capsule_size;
    const bool computed = routed == Routed::computed_votes;
    const int64_t here = computed ? samples : 1;  // samples whose gradients are worked on together
    const typename Forward::Buffers buffers(*this, samples);
    Scratch<Real> local(cache || in_place ? 1 : chunk_size, 1), du(here * L * capsule_size, 7);
    Scratch<vec> c(size, 3), db(size, 5);
    Scratch<vec> x(computed ? L * samples * X : 1, 9), dx(computed ? L * samples * X : 1, 11);
    Real* filled = cache ? cache + chunk * chunk_size : local.data;
    if (!in_place && (!cache || fresh)) Forward::fill(b0, samples, chunk, filled, buffers);
    for (int64_t b = 0; b < samples; ++b) {
      coefficients(b0 + b, chunk, Forward::rows_of(b0 + b, chunk, filled + b * L * capsule_size), d_prior != nullptr, c,
                   db);
      if (d_prior) prior_gradient(b0 + b, chunk, db, d_prior);
      const int64_t J = one_row() ? 1 : z.J;
      const bool direct = !computed && in.stored == Stored::real && D == row && n % kRows == 0;
      Real* const grads = (Real*)out.d_poses + ((b0 + b) * z.I + chunk * L) * capsule_size;
      Real* const to = direct ? grads : du + (computed ? b * L * capsule_size : 0);
      if (out.d_poses || (computed && out.d_weight)) row_gradients(b0 + b, n, c, db, to);
      for (int64_t l = 0; l < n; ++l) {
        const int64_t i = chunk * L + l;
        if (computed) Forward::load_pose(b0 + b, i, x + (l * samples + b) * X);
        if (computed || !out.d_poses) continue;
        if (Forward::masked(b0 + b, i)) std::memset(to + l * capsule_size, 0, capsule_size * sizeof(Real));
        if (!direct) Forward::trim(to + l * capsule_size, J, D, in.stored, out.d_poses, ((b0 + b) * z.I + i) * J * D);
      }
    }
    if (!computed || !(out.d_poses || out.d_weight)) return;
    for (int64_t m = 0; m < L * samples * X; ++m) dx[m] = vec{};
    for (int64_t l = 0; l < n; ++l) {
      const int64_t i = chunk * L + l, J = one_row() ? 1 : z.J, packed = Forward::packed();
      const bool direct = D == row;
      for (int64_t b = 0; b < samples && !direct; ++b) {
        std::memset(buffers.packed + (b + 1) * packed - L, 0, L * sizeof(Real));  // whole vectors are read
        Forward::trim(du + (b * L + l) * capsule_size, J, D, Stored::real, buffers.packed, b * packed);
      }
      vec *xl = x + l * samples * X, *dxl = dx + l * samples * X;
      Forward::transform_backward(i * in.stride_i, J * D, samples, xl,
                                  direct ? du + l * capsule_size : buffers.packed.data,
                                  direct ? L * capsule_size : packed, out.d_weight, dxl, buffers.matrix);
      for (int64_t b = 0; b < samples && out.d_poses; ++b) store_pose_gradient(b0 + b, i, dxl + b * X);
    }
  }

  // c_t and db_t, [steps, J], a lane for each input capsule; db_0 only where the prior wants it.
  void coefficients(int64_t b, int64_t chunk, const Rows& u, bool prior, vec* c, vec* db) const {
    const auto wants_db = [&](int64_t t) { return !in.detach && (t0 + t > 0 || prior); };
    for (int64_t t = 0; t < steps; ++t) {
      const int64_t at = index(t0 + t, b) * J_row;
      Forward::load_prior(b, chunk, c + t * z.J);
      for (int64_t j = 0; j < z.J; ++j) db[t * z.J + j] = vec{};
      if (t0 + t > 0) Forward::dots(u, y + at, c + t * z.J);
      if (wants_db(t)) Forward::dots(u, g + at, db + t * z.J);
    }
    for (int64_t t = 0; t < steps; ++t) {
      SIMD::template softmax<1>(c + t * z.J, z.J, in.leaky);
      if (wants_db(t)) SIMD::template softmax_backward<1>(c + t * z.J, db + t * z.J, z.J);
    }
  }

  // du = sum_t c_t ds_t + db_t V_t (with y and g where poses are routed) of `n` input capsules: [n, J, row], or [n,
  // row] summed over j. Four input capsules share what they are multiplied with.
  void row_gradients(int64_t b, int64_t n, const vec* c, const vec* db, Real* du) const {
    constexpr int R = kRows;
    const bool over_j = one_row();
    const Real *ct = (const Real*)c, *dbt = (const Real*)db;
    for (int64_t j = 0; j < z.J; j += over_j ? z.J : 1)
      for_vectors(row / L, [&](int64_t v, auto W) FASTCAPS_LAMBDA {
        for (int64_t l = 0; l < n; l += R) {
          vec sum[R * W];
          unroll<R * W>([&](auto m) FASTCAPS_LAMBDA { sum[m] = vec{}; });
          for (int64_t t = 0; t < steps; ++t)
            for (int64_t k = j; k < (over_j ? z.J : j + 1); ++k) {
              const int64_t at = index(t0 + t, b) * J_row + k * row + v * L, lanes = (t * z.J + k) * L + l;
              add_outer<R, W>(ct + lanes, g + at, sum);
              if (t > 0) add_outer<R, W>(dbt + lanes, y + at, sum);
            }
          unroll<R * W>([&](auto m) FASTCAPS_LAMBDA {
            SIMD::store(du + (l + m / W) * capsule_size + (over_j ? 0 : j * row) + (v + m % W) * L, sum[m]);
          });
        }
      });
  }
  // sum[q, m] += factor[q] w[m], for W vectors w and R factors
  template <int R, int W>
  static FASTCAPS_INLINE void add_outer(const Real* factor, const Real* w, vec* sum) {
    vec wm[W];
    unroll<W>([&](auto m) FASTCAPS_LAMBDA { wm[m] = SIMD::load(w + m * L); });
    unroll<R>([&](auto q) FASTCAPS_LAMBDA {
      const vec f = SIMD::splat(factor[q]);
      unroll<W>([&](auto m) FASTCAPS_LAMBDA { sum[q * W + m] += f * wm[m]; });
    });
  }

  void store_pose_gradient(int64_t b, int64_t i, const vec* dx) const {
    Scratch<Real> sum(z.D_in);
    const bool masked = Forward::masked(b, i);
    const Real* lanes = (const Real*)dx;
    for (int64_t k = 0; k < z.D_in; ++k) {
      sum[k] = 0;
      for (int64_t n = k; n < pose_vectors() * L && !masked; n += Forward::depth) sum[k] += lanes[n];
    }
    narrow(in.stored, sum.data, z.D_in, out.d_poses, (b * z.I + i) * z.D_in);
  }

  void prior_gradient(int64_t b, int64_t chunk, const vec* db, Real* d_prior) const {
    Scratch<vec> sum(z.J);
    Scratch<Real> rows_of_chunk(L * z.J);
    for (int64_t j = 0; j < z.J; ++j) {
      sum[j] = db[j];
      for (int64_t t = 1; t < steps; ++t) sum[j] += db[t * z.J + j];
    }
    Forward::clear_masked(b, chunk, sum);
    const int64_t n = count(chunk), first = chunk * L * z.J;
    if (in.prior_stride_b)
      return SIMD::from_lanes(sum, 1, n, z.J, Stored::real, d_prior, b * in.prior_stride_b + first, z.J);
    SIMD::from_lanes(sum, 1, n, z.J, Stored::real, rows_of_chunk, 0, z.J);
    for (int64_t e = 0; e < n * z.J; ++e) d_prior[first + e] += rows_of_chunk[e];
  }

  // d W_j = sum_t,b ds_t r_t^T + V_t p_t^T, a task for some rows of a matrix at a time.
  void shared_weight_gradient(Parallel parallel) const {
    constexpr int R = kRows;
    const int64_t strips = ceil_div(z.D_out, R);
    parallel_for(parallel, Forward::shared_matrices() * strips, [&](int64_t task) {
      const int64_t matrix = task / strips, d = task % strips * R;
      const int64_t j0 = in.stride_j ? matrix : 0, j1 = in.stride_j ? j0 + 1 : z.J;
      Scratch<Real> sum(R * row);
      std::memset(sum, 0, R * row * sizeof(Real));
      for (int64_t first = t0 * z.B; first < z.T * z.B; first += kLongSum)
        for_vectors(row / L, [&](int64_t v, auto W) FASTCAPS_LAMBDA {
          vec some[R * W];
          unroll<R * W>([&](auto n) FASTCAPS_LAMBDA { some[n] = vec{}; });
          for (int64_t tb = first; tb < least(first + kLongSum, z.T * z.B); ++tb)
            for (int64_t j = j0; j < j1; ++j) {
              const int64_t from = tb * J_out + j * out_row + d, at = tb * J_row + j * row + v * L;
              add_outer<R, W>(ds + from, r + at, some);
              add_outer<R, W>(V + from, p + at, some);
            }
          unroll<R * W>([&](auto n) FASTCAPS_LAMBDA {
            Real* to = sum + n / W * row + (v + n % W) * L;
            SIMD::store(to, SIMD::load(to) + some[n]);
          });
        });
      Forward::trim(sum, least(R, z.D_out - d), z.D_in, in.stored, out.d_weight, (matrix * z.D_out + d) * z.D_in);
    });
  }
};

}  // namespace FASTCAPS_ISA
}  // namespace fastcaps
