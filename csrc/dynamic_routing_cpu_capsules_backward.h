// The backward with input capsules in the lanes; the same two parts as with samples in the lanes.
#include "dynamic_routing_cpu_capsules.h"

namespace fastcaps {
namespace FASTCAPS_ISA {

template <class Real>
struct CapsulesBackward : Capsules<Real> {
  using C = Capsules<Real>;
  using K = Kernel<Real>;
  using typename K::vec;
  using Chunk = typename C::Chunk;
  using Step = typename C::Step;
  using C::absorbed;
  using C::at;
  using C::blocks;
  using C::count;
  using C::D;
  using C::from_sum;
  using C::given;
  using C::in;
  using C::JD;
  using C::JDo;
  using C::kBlock;
  using C::L;
  using C::M;
  using C::pose_vectors;
  using C::rows;
  using C::shared;
  using C::to_query;
  using C::z;

  const Gradients<Real>& out;
  const int64_t t0, steps;         // the iterations that are differentiated: t0 .. T - 1
  const bool matrices;             // one of its own for every input capsule
  const bool keep_sums;            // r and p, for the gradient of shared matrices
  Scratch<Real> V, ds, rest;       // [T, B, J, D_out], [T, B, J, D_out]; [B, J, D_out]: dV_{t+1} + ... + dV_{T-1}
  Scratch<Real> y_own, g_own;      // [T, B, J, D_in] where absorbed: W^T V and W^T ds
  Scratch<Real> r, p;              // [T, B, J, D_in]: sum_i c x and sum_i db x
  const Real *const y, *const g;   // what votes or poses are multiplied with: [T, B, J, D]

  CapsulesBackward(const Routing<Real>& in, const Gradients<Real>& out)
      : C(in),
        out(out),
        t0(in.detach ? z.T - 1 : 0),
        steps(z.T - t0),
        matrices(in.weight && !absorbed),
        keep_sums(absorbed && out.d_weight),
        V(z.T * z.B * JDo, 1),
        ds(z.T * z.B * JDo, 3),
        rest(z.B * JDo, 5),
        y_own(absorbed ? z.T * z.B * JD : 1, 7),
        g_own(absorbed ? z.T * z.B * JD : 1, 9),
        r(keep_sums ? z.T * z.B * JD : 1, 11),
        p(keep_sums ? z.T * z.B * JD : 1, 13),
        y(absorbed ? y_own.data : V.data),
        g(absorbed ? g_own.data : ds.data) {}

  void run(Parallel parallel) {
    // Side by side, tasks sum the gradient of a shared prior into parts of their own.
    const bool sum_prior = out.d_prior && !in.prior_stride_b;
    const int64_t IJ = z.I * z.J, tasks = least(z.B, C::kTasks);
    const bool side_by_side =
        z.B >= C::kMany && !matrices && (!sum_prior || tasks * IJ * int64_t(sizeof(Real)) <= (2 << 20));
    Scratch<Real> parts(sum_prior && side_by_side ? tasks * IJ : 1);
    if (sum_prior) std::memset(side_by_side ? parts : out.d_prior, 0, (side_by_side ? tasks : 1) * IJ * sizeof(Real));
    C::for_samples(side_by_side, parallel, [&](Chunk& chunk, int64_t task) {
      sweeps(chunk);
      if (!side_by_side) return;
      Real* d_prior = sum_prior ? parts + task * IJ : out.d_prior;
      for (int64_t block = 0; block < blocks; ++block)
        final_block(block, chunk.b0, chunk.b0 + 1, chunk.kept(chunk.b0), chunk.fill, d_prior);
    });
    if (!side_by_side)
      parallel_for(parallel, blocks,
                   [&](int64_t block) { final_block(block, 0, z.B, nullptr, false, out.d_prior); });
    else if (sum_prior)
      for (int64_t n = 0; n < IJ; ++n) {
        Real total = 0;
        for (int64_t task = 0; task < tasks; ++task) total += parts[task * IJ + n];
        out.d_prior[n] = total;
      }
    if (keep_sums) shared_weight_gradient(parallel);
    if (!out.d_bias) return;
    for (int64_t n = 0; n < JDo; ++n) {
      double total = 0;
      for (int64_t tb = t0 * z.B; tb < z.T * z.B; ++tb) total += ds[tb * JDo + n];
      out.d_bias[n] = Real(total);
    }
  }

  int64_t index(int64_t t, int64_t b) const { return t * z.B + b; }
  const Real* sums(int64_t t, int64_t b) const { return out.sums + index(t, b) * JDo; }
  void set_query(const Real* from, Real* own, int64_t tb) const {
    if (absorbed) to_query(from + tb * JDo, own + tb * JD);
  }

  // ds_t for every t, V_t, and what is made of them.
  void sweeps(Chunk& chunk) {
    Scratch<Real> v(JDo), unused(JDo);
    const int64_t b0 = chunk.b0, b1 = b0 + chunk.samples;
    for (int64_t b = b0; b < b1; ++b) {
      for (int64_t n = 0; n < JDo; ++n) V[index(0, b) * JDo + n] = rest[b * JDo + n] = 0;
      for (int64_t t = 0; t + 1 < z.T; ++t) {
        C::squash(sums(t, b), v);
        for (int64_t n = 0; n < JDo; ++n) V[index(t + 1, b) * JDo + n] = V[index(t, b) * JDo + n] + v[n];
        set_query(V, y_own, index(t + 1, b));
      }
      widen(in.stored, out.grad, b * JDo, JDo, v.data);
      C::squash_backward(sums(z.T - 1, b), v, ds + index(z.T - 1, b) * JDo);
      set_query(ds, g_own, index(z.T - 1, b));
    }
    Real any;
    Real* const want_r = keep_sums ? &any : nullptr;
    for (int64_t t = z.T - 1; t >= t0; --t) {
      const bool moves = t > 0 && !in.detach, plain = t == 0 && !in.prior;
      if (!moves && !want_r) break;
      chunk.run(
          [&](int64_t b) {
            return Step{t ? y + index(t, b) * JD : nullptr, moves ? g + index(t, b) * JD : nullptr, plain, want_r,
                        moves ? &any : nullptr};
          },
          [&](int64_t b, const Real* r_t, const Real* p_t) {
            const int64_t tb = index(t, b);
            if (want_r)
              for (int64_t n = 0; n < JD; ++n) r[tb * JD + n] = plain ? r_t[n] * C::uniform() : r_t[n];
            if (want_r)
              for (int64_t n = 0; n < JD; ++n) p[tb * JD + n] = moves ? p_t[n] : 0;
            if (!moves) return;
            from_sum(p_t, v);
            Real* total = rest + b * JDo;
            for (int64_t n = 0; n < JDo; ++n) total[n] += v[n];
            C::squash_backward(sums(t - 1, b), total, ds + index(t - 1, b) * JDo);
            set_query(ds, g_own, index(t - 1, b));
          });
    }
  }

  // ----------------------------------------------------------------------------- gradients of a block of input capsules

  // Those of samples b0 .. b1 - 1: all of them where matrices have gradients, one of them otherwise.
  void final_block(int64_t block, int64_t b0, int64_t b1, vec* cache, bool fill, Real* d_prior) const {
    if (!matrices && b1 - b0 != 1) {
      for (int64_t b = b0; b < b1; ++b) final_block(block, b, b + 1, cache, fill, d_prior);
      return;
    }
    const int64_t size = steps * z.J * M, du_rows = shared ? D : C::at_once * D, V_x = pose_vectors();
    const int64_t samples = b1 - b0, wide = matrices ? most(1, samples) * kBlock : 1;  // poses of the block
    const int64_t here = least(kBlock, z.I - block * kBlock);
    const typename C::Buffers buffers(*this);
    Scratch<vec> local(cache ? 1 : du_rows * M, 1), c(samples * size, 3), db(samples * size, 5), du(du_rows * M, 7);
    Scratch<vec> x(wide * V_x, 9), dx(wide * V_x, 11);
    Scratch<Real> by_row(wide * C::stride(), 13);
    vec* kept = cache ? cache + block * rows * M : nullptr;
    for (int64_t b = 0; b < samples; ++b) {
      coefficients(b0 + b, block, kept, fill, local, buffers, d_prior != nullptr, c + b * size, db + b * size);
      if (d_prior) prior_gradient(b0 + b, block, db + b * size, d_prior);
      if (matrices)
        for (int64_t n = 0; n < here; ++n)
          C::load_pose(b0 + b, block * kBlock + n, x + (b * kBlock + n) * V_x);
    }
    if (!matrices && !out.d_poses) return;
    for (int64_t n = 0; n < wide * V_x; ++n) dx[n] = vec{};
    // With one vote for all output capsules, its gradient is the sum over all of them.
    const int64_t j_step = shared ? z.J : C::at_once;
    for (int64_t j0 = 0; j0 < z.J; j0 += j_step) {
      const int64_t j1 = least(z.J, j0 + j_step), row0 = shared ? 0 : j0 * D, total = shared ? D : (j1 - j0) * D;
      for (int64_t b = 0; b < samples; ++b) {
        vote_gradient(b0 + b, j0, j1, c + b * size, db + b * size, du);
        for (int m = 0; m < M; ++m) {
          const int64_t i0 = block * kBlock + m * L, n = count(block, m);
          if (!matrices) {
            C::clear_masked(b0, block, m, total, du);
            K::from_lanes(du + m, M, n, total, in.stored, out.d_poses, (b0 * z.I + i0) * rows + row0, rows);
            continue;
          }
          const int64_t first = (b * kBlock + m * L) * C::stride();
          K::from_lanes(du + m, M, n, total, Stored::real, by_row, first, C::stride());
          for (int64_t l = 0; l < n; ++l)  // whole vectors are read
            for (int64_t d = total; d % L; ++d) by_row[first + l * C::stride() + d] = 0;
        }
      }
      if (matrices)
        for (int64_t n = 0; n < here; ++n)
          C::transform_backward((block * kBlock + n) * in.stride_i + row0 * z.D_in, total, samples, x + n * V_x,
                                kBlock * V_x, by_row + n * C::stride(), kBlock * C::stride(), out.d_weight,
                                dx + n * V_x, buffers.matrix);
    }
    if (matrices && out.d_poses)
      for (int64_t b = 0; b < samples; ++b)
        for (int64_t n = 0; n < here; ++n)
          store_pose_gradient(b0 + b, block * kBlock + n, dx + (b * kBlock + n) * V_x);
  }

  // c_t and db_t, [steps, J, M]; db_0 only where the prior wants it.
  void coefficients(int64_t b, int64_t block, vec* kept, bool fill, vec* local, const typename C::Buffers& buffers,
                    bool prior, vec* c, vec* db) const {
    const int64_t JM = z.J * M;
    const auto wants_c = [&](int64_t t) { return t0 + t > 0; };
    const auto wants_db = [&](int64_t t) { return !in.detach && (t0 + t > 0 || prior); };
    for (int64_t t = 0; t < steps; ++t) C::load_prior(b, block, c + t * JM);
    for (int64_t n = 0; n < steps * JM; ++n) db[n] = vec{};
    if (steps > 1 || wants_c(0) || wants_db(0)) C::for_outputs([&](int64_t j0, int64_t j1) {
        vec* u = kept ? at(kept, j0) : local;
        if (kept ? fill : !shared || j0 == 0) C::source(b, block, j0, j1, u, buffers);
        for (int64_t t = 0; t < steps; ++t) {
          if (wants_c(t)) C::dots(j0, j1, u, y + index(t0 + t, b) * JD, c + t * JM);
          if (wants_db(t)) C::dots(j0, j1, u, g + index(t0 + t, b) * JD, db + t * JM);
        }
      });
    for (int64_t t = 0; t < steps; ++t) {
      K::template softmax<M>(c + t * JM, z.J, in.leaky);
      if (wants_db(t)) K::template softmax_backward<M>(c + t * JM, db + t * JM, z.J);
    }
  }

  // du = sum_t c_t ds_t + db_t V_t (with y and g where absorbed), [j1 - j0, D, M], or [D, M] summed over j.
  void vote_gradient(int64_t b, int64_t j0, int64_t j1, const vec* c, const vec* db, vec* du) const {
    const int64_t JM = z.J * M, total = (shared ? D : (j1 - j0) * D) * M;
    for (int64_t n = 0; n < total; ++n) du[n] = vec{};
    C::with_shared([&](auto one) FASTCAPS_LAMBDA {
      C::by_four(j0, j1, [&](int64_t j, auto G) FASTCAPS_LAMBDA {
        for (int64_t t = 0; t < steps; ++t) {
          vec ct[G * M], dbt[G * M];
          unroll<G * M>([&](auto n) FASTCAPS_LAMBDA {
            ct[n] = c[t * JM + j * M + n];
            dbt[n] = db[t * JM + j * M + n];
          });
          const int64_t first = index(t0 + t, b) * JD + j * D;
          const Real *yj = y + first, *gj = g + first;
          const bool moved = t0 + t > 0 && !in.detach;
          vec* to = one ? du : du + (j - j0) * D * M;
          for (int64_t d = 0; d < D; ++d) {
            vec sum[M];
            unroll<G>([&](auto n) FASTCAPS_LAMBDA {
              vec* row = to + ((one ? 0 : n * D) + d) * M;
              if (!one || n == 0) unroll<M>([&](auto m) FASTCAPS_LAMBDA { sum[m] = row[m]; });
              const vec gd = K::splat(gj[n * D + d]);
              unroll<M>([&](auto m) FASTCAPS_LAMBDA { sum[m] += ct[n * M + m] * gd; });
              if (moved) {
                const vec yd = K::splat(yj[n * D + d]);
                unroll<M>([&](auto m) FASTCAPS_LAMBDA { sum[m] += dbt[n * M + m] * yd; });
              }
              if (!one || n == G - 1) unroll<M>([&](auto m) FASTCAPS_LAMBDA { row[m] = sum[m]; });
            });
          }
        }
      });
    });
  }

  void store_pose_gradient(int64_t b, int64_t i, const vec* dx) const {
    Scratch<Real> sum(z.D_in);
    const bool masked = C::masked(b, i);
    const Real* parts = (const Real*)dx;
    for (int64_t k = 0; k < z.D_in; ++k) {
      sum[k] = 0;
      for (int64_t n = k; n < pose_vectors() * L && !masked; n += C::depth) sum[k] += parts[n];
    }
    narrow(in.stored, sum.data, z.D_in, out.d_poses, (b * z.I + i) * z.D_in);
  }

  void prior_gradient(int64_t b, int64_t block, vec* db, Real* d_prior) const {
    const int64_t JM = z.J * M;
    Scratch<vec> sum(JM);
    Scratch<Real> rows_of_block(kBlock * z.J);
    for (int64_t n = 0; n < JM; ++n) {
      sum[n] = db[n];
      for (int64_t t = 1; t < steps; ++t) sum[n] += db[t * JM + n];
    }
    for (int m = 0; m < M; ++m) {
      const int64_t n = count(block, m), first = (block * kBlock + m * L) * z.J;
      if (in.prior_stride_b) {
        K::from_lanes(sum + m, M, n, z.J, Stored::real, d_prior, b * in.prior_stride_b + first, z.J);
      } else {
        K::from_lanes(sum + m, M, n, z.J, Stored::real, rows_of_block, 0, z.J);
        for (int64_t e = 0; e < n * z.J; ++e) d_prior[first + e] += rows_of_block[e];
      }
    }
  }

  // d W_j = sum_t,b ds_t r_t^T + V_t p_t^T, a task for four rows of a matrix at a time.
  void shared_weight_gradient(Parallel parallel) const {
    constexpr int kRows = 4;
    const int64_t matrices = in.stride_j ? z.J : 1, blocks_of_rows = ceil_div(z.D_out, kRows);
    parallel_for(parallel, matrices * blocks_of_rows, [&](int64_t task) {
      const int64_t matrix = task / blocks_of_rows, d0 = task % blocks_of_rows * kRows;
      const int64_t j0 = in.stride_j ? matrix : 0, j1 = in.stride_j ? j0 + 1 : z.J, count = least(kRows, z.D_out - d0);
      Scratch<Real> sum(kRows * z.D_in), part(kRows * z.D_in);
      std::memset(sum, 0, kRows * z.D_in * sizeof(Real));
      for (int64_t first = t0 * z.B; first < z.T * z.B; first += 128) {  // in parts, as long sums lose digits
        std::memset(part, 0, kRows * z.D_in * sizeof(Real));
        for (int64_t tb = first; tb < least(first + 128, z.T * z.B); ++tb)
          for (int64_t j = j0; j < j1; ++j) {
            const int64_t from = tb * JDo + j * z.D_out + d0;
            Real s[kRows], v[kRows];
            unroll<kRows>([&](auto n) FASTCAPS_LAMBDA {  // not a loop, which becomes a call of memcpy
              s[n] = n < count ? ds[from + n] : 0;
              v[n] = n < count ? V[from + n] : 0;
            });
            add_rows(s, v, r + tb * JD + j * D, p + tb * JD + j * D, part);
          }
        for (int64_t n = 0; n < kRows * z.D_in; ++n) sum[n] += part[n];
      }
      narrow(in.stored, sum.data, count * z.D_in, out.d_weight, (matrix * z.D_out + d0) * z.D_in);
    });
  }
  // Row n of `to` [4, D_in] += s[n] r + v[n] p.
  void add_rows(const Real* s, const Real* v, const Real* rj, const Real* pj, Real* to) const {
    int64_t k = 0;
    for (; k + L <= z.D_in; k += L) {
      const vec rk = K::load(rj + k), pk = K::load(pj + k);
      unroll<4>([&](auto n) FASTCAPS_LAMBDA {
        Real* row = to + n * z.D_in + k;
        K::store(row, K::load(row) + (K::splat(s[n]) * rk + K::splat(v[n]) * pk));
      });
    }
    for (; k < z.D_in; ++k)
      for (int n = 0; n < 4; ++n) to[n * z.D_in + k] += s[n] * rj[k] + v[n] * pj[k];
  }
};

}  // namespace FASTCAPS_ISA
}  // namespace fastcaps
