// The backward one sample at a time; the same two parts as with samples in the lanes.
#include "cpu/single.h"

namespace fastcaps {
namespace FASTCAPS_ISA {

template <class Real>
struct CapsulesBackward : Capsules<Real> {
  using C = Capsules<Real>;
  using K = Kernel<Real>;
  using typename K::vec;
  using Chunk = typename C::Chunk;
  using Rows = typename C::Rows;
  using C::absorbed;
  using C::blocks;
  using C::count;
  using C::D;
  using C::for_vectors;
  using C::in;
  using C::in_place;
  using C::JD;
  using C::JO;
  using C::L;
  using C::out_row;
  using C::own;
  using C::pose_vectors;
  using C::row;
  using C::rows;
  using C::shared;
  using C::z;

  static constexpr int kRows = L < 4 ? L : 4;  // that are worked on together
  const Gradients<Real>& out;
  const int64_t t0, steps;        // the iterations that are differentiated: t0 .. T - 1
  const bool keep_sums;           // r and p, for the gradient of shared matrices
  Scratch<Real> s, V, ds, rest;   // [T, B, J, out_row]; rest [B, J, out_row]: dV_{t+1} + ... + dV_{T-1}
  Scratch<Real> y_own, g_own;     // [T, B, J, row] where absorbed: W^T V and W^T ds
  Scratch<Real> r, p;             // [T, B, J, row]: sum_i c x and sum_i db x
  const Real *const y, *const g;  // what rows are multiplied with: [T, B, J, row]

  CapsulesBackward(const Routing<Real>& in, const Gradients<Real>& out)
      : C(in),
        out(out),
        t0(in.detach ? z.T - 1 : 0),
        steps(z.T - t0),
        keep_sums(absorbed && out.d_weight),
        s(z.T * z.B * JO),
        V(z.T * z.B * JO, 1),
        ds(z.T * z.B * JO, 3),
        rest(z.B * JO, 5),
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
        z.B >= C::kMany && !own && (!sum_prior || tasks * IJ * int64_t(sizeof(Real)) <= (2 << 20));
    Scratch<Real> parts(sum_prior && side_by_side ? tasks * IJ : 1);
    if (sum_prior) std::memset(side_by_side ? parts : out.d_prior, 0, (side_by_side ? tasks : 1) * IJ * sizeof(Real));
    const bool by_block = out.d_poses || out.d_prior || (own && out.d_weight);
    bool done = !by_block;
    C::for_samples(side_by_side, true, parallel, [&](Chunk& chunk, int64_t task) {
      sweeps(chunk);
      if (!by_block) return;
      if (side_by_side) {
        Real* d_prior = sum_prior ? parts + task * IJ : out.d_prior;
        for (int64_t block = 0; block < blocks; ++block)
          final_block(block, chunk.b0, chunk.samples, chunk.kept(), chunk.fresh, d_prior);
      } else if (chunk.keep && chunk.samples == z.B) {
        parallel_for(parallel, blocks,
                     [&](int64_t block) { final_block(block, 0, z.B, chunk.kept(), chunk.fresh, out.d_prior); });
        done = true;
      }
    });
    const int64_t local = most(1, C::kLocal / int64_t(L * rows * sizeof(Real)));
    const int64_t together = own ? most(1, z.B) : in_place ? C::kSamples : least(C::kSamples, local);
    if (!side_by_side && !done)
      parallel_for(parallel, blocks, [&](int64_t block) {
        for (int64_t b = 0; b < most(1, z.B); b += together)
          final_block(block, b, least(together, z.B - b), nullptr, true, out.d_prior);
      });
    if (side_by_side && sum_prior)
      for (int64_t n = 0; n < IJ; ++n) {
        Real total = 0;
        for (int64_t task = 0; task < tasks; ++task) total += parts[task * IJ + n];
        out.d_prior[n] = total;
      }
    if (keep_sums) shared_weight_gradient(parallel);
    if (!out.d_bias) return;
    for (int64_t j = 0; j < z.J; ++j)
      for (int64_t d = 0; d < z.D_out; ++d) {
        double total = 0;
        for (int64_t tb = t0 * z.B; tb < z.T * z.B; ++tb) total += ds[tb * JO + j * out_row + d];
        out.d_bias[j * z.D_out + d] = Real(total);
      }
  }

  int64_t index(int64_t t, int64_t b) const { return t * z.B + b; }
  void set_query(int64_t samples, const Real* from, Real* query, int64_t tb) const {
    if (absorbed) C::to_query(samples, from + tb * JO, query + tb * JD);
  }

  // ds_t for every t, V_t, and what is made of them.
  void sweeps(Chunk& chunk) {
    const int64_t b0 = chunk.b0, samples = chunk.samples, b1 = b0 + samples, JDo = z.J * z.D_out;
    Scratch<Real> v(samples * JO);
    for (int64_t t = 0; t < z.T; ++t)
      for (int64_t b = b0; b < b1; ++b) {
        const int64_t tb = index(t, b) * JO;
        C::pad(Stored::real, out.sums, index(t, b) * JDo, z.J, z.D_out, s + tb);
        if (t == 0)
          for (int64_t n = 0; n < JO; ++n) V[tb + n] = rest[b * JO + n] = 0;
        if (t + 1 == z.T) continue;
        const int64_t next = index(t + 1, b) * JO;
        C::squash(s + tb, V + next);
        for (int64_t n = 0; n < JO; ++n) V[next + n] += V[tb + n];
      }
    for (int64_t t = 1; t < z.T; ++t) set_query(samples, V, y_own, index(t, b0));
    for (int64_t b = b0; b < b1; ++b) {
      C::pad(in.stored, out.grad, b * JDo, z.J, z.D_out, v);
      C::squash_backward(s + index(z.T - 1, b) * JO, v, ds + index(z.T - 1, b) * JO);
    }
    set_query(samples, ds, g_own, index(z.T - 1, b0));
    for (int64_t t = z.T - 1; t >= t0; --t) {
      const bool moves = t > 0 && !in.detach, plain = t == 0 && !in.prior;
      if (!moves && !keep_sums) break;
      const int64_t tb = index(t, b0);
      chunk.run({t ? y + tb * JD : nullptr, moves ? g + tb * JD : nullptr, plain, keep_sums, moves},
                [&](const Real* r_t, const Real* p_t) {
                  for (int64_t n = 0; n < samples * JD && keep_sums; ++n) {
                    r[tb * JD + n] = plain ? r_t[n] * C::uniform() : r_t[n];
                    p[tb * JD + n] = moves ? p_t[n] : 0;
                  }
                  if (!moves) return;
                  C::from_sum(samples, p_t, v);
                  const int64_t before = index(t - 1, b0);
                  for (int64_t n = 0; n < samples * JO; ++n) rest[b0 * JO + n] += v[n];
                  for (int64_t b = 0; b < samples; ++b)
                    C::squash_backward(s + (before + b) * JO, rest + (b0 + b) * JO, ds + (before + b) * JO);
                  set_query(samples, ds, g_own, before);
                });
    }
  }

  // ----------------------------------------------------------------------------- gradients of a block of capsules

  // Those of some samples: all of them where each input capsule has matrices of its own.
  void final_block(int64_t block, int64_t b0, int64_t samples, Real* cache, bool fresh, Real* d_prior) const {
    const int64_t size = steps * z.J, n = count(block), X = pose_vectors(), block_size = samples * L * rows;
    const int64_t here = own ? samples : 1;  // samples whose gradients are worked on together
    const typename C::Buffers buffers(*this, samples);
    Scratch<Real> local(cache || in_place ? 1 : block_size, 1), du(here * L * rows, 7);
    Scratch<vec> c(size, 3), db(size, 5);
    Scratch<vec> x(own ? L * samples * X : 1, 9), dx(own ? L * samples * X : 1, 11);
    Real* filled = cache ? cache + block * block_size : local.data;
    if (!in_place && (!cache || fresh)) C::fill(b0, samples, block, filled, buffers);
    for (int64_t b = 0; b < samples; ++b) {
      coefficients(b0 + b, block, C::rows_of(b0 + b, block, filled + b * L * rows), d_prior != nullptr, c, db);
      if (d_prior) prior_gradient(b0 + b, block, db, d_prior);
      const int64_t J = shared ? 1 : z.J;
      const bool direct = !own && in.stored == Stored::real && D == row && n % kRows == 0;
      Real* const grads = (Real*)out.d_poses + ((b0 + b) * z.I + block * L) * rows;
      Real* const to = direct ? grads : du + (own ? b * L * rows : 0);
      if (out.d_poses || (own && out.d_weight)) row_gradients(b0 + b, n, c, db, to);
      for (int64_t l = 0; l < n; ++l) {
        const int64_t i = block * L + l;
        if (own) C::load_pose(b0 + b, i, x + (l * samples + b) * X);
        if (own || !out.d_poses) continue;
        if (C::masked(b0 + b, i)) std::memset(to + l * rows, 0, rows * sizeof(Real));
        if (!direct) C::trim(to + l * rows, J, D, in.stored, out.d_poses, ((b0 + b) * z.I + i) * J * D);
      }
    }
    if (!own || !(out.d_poses || out.d_weight)) return;
    for (int64_t m = 0; m < L * samples * X; ++m) dx[m] = vec{};
    for (int64_t l = 0; l < n; ++l) {
      const int64_t i = block * L + l, J = shared ? 1 : z.J, packed = C::packed();
      const bool direct = D == row;
      for (int64_t b = 0; b < samples && !direct; ++b) {
        std::memset(buffers.packed + (b + 1) * packed - L, 0, L * sizeof(Real));  // whole vectors are read
        C::trim(du + (b * L + l) * rows, J, D, Stored::real, buffers.packed, b * packed);
      }
      vec *xl = x + l * samples * X, *dxl = dx + l * samples * X;
      C::transform_backward(i * in.stride_i, J * D, samples, xl, direct ? du + l * rows : buffers.packed.data,
                            direct ? L * rows : packed, out.d_weight, dxl, buffers.matrix);
      for (int64_t b = 0; b < samples && out.d_poses; ++b) store_pose_gradient(b0 + b, i, dxl + b * X);
    }
  }

  // c_t and db_t, [steps, J], a lane for each input capsule; db_0 only where the prior wants it.
  void coefficients(int64_t b, int64_t block, const Rows& u, bool prior, vec* c, vec* db) const {
    const auto wants_db = [&](int64_t t) { return !in.detach && (t0 + t > 0 || prior); };
    for (int64_t t = 0; t < steps; ++t) {
      const int64_t at = index(t0 + t, b) * JD;
      C::load_prior(b, block, c + t * z.J);
      for (int64_t j = 0; j < z.J; ++j) db[t * z.J + j] = vec{};
      if (t0 + t > 0) C::dots(u, y + at, c + t * z.J);
      if (wants_db(t)) C::dots(u, g + at, db + t * z.J);
    }
    for (int64_t t = 0; t < steps; ++t) {
      K::template softmax<1>(c + t * z.J, z.J, in.leaky);
      if (wants_db(t)) K::template softmax_backward<1>(c + t * z.J, db + t * z.J, z.J);
    }
  }

  // du = sum_t c_t ds_t + db_t V_t (with y and g where absorbed) of `n` input capsules: [n, J, row], or [n, row] summed
  // over j. Four input capsules share what they are multiplied with.
  void row_gradients(int64_t b, int64_t n, const vec* c, const vec* db, Real* du) const {
    constexpr int R = kRows;
    const Real *ct = (const Real*)c, *dbt = (const Real*)db;
    for (int64_t j = 0; j < z.J; j += shared ? z.J : 1)
      for_vectors(row / L, [&](int64_t v, auto W) FASTCAPS_LAMBDA {
        for (int64_t l = 0; l < n; l += R) {
          vec sum[R * W];
          unroll<R * W>([&](auto m) FASTCAPS_LAMBDA { sum[m] = vec{}; });
          for (int64_t t = 0; t < steps; ++t)
            for (int64_t k = j; k < (shared ? z.J : j + 1); ++k) {
              const int64_t at = index(t0 + t, b) * JD + k * row + v * L, lanes = (t * z.J + k) * L + l;
              add_outer<R, W>(ct + lanes, g + at, sum);
              if (t > 0) add_outer<R, W>(dbt + lanes, y + at, sum);
            }
          unroll<R * W>([&](auto m) FASTCAPS_LAMBDA {
            K::store(du + (l + m / W) * rows + (shared ? 0 : j * row) + (v + m % W) * L, sum[m]);
          });
        }
      });
  }
  // sum[q, m] += factor[q] w[m], for W vectors w and R factors
  template <int R, int W>
  static FASTCAPS_INLINE void add_outer(const Real* factor, const Real* w, vec* sum) {
    vec wm[W];
    unroll<W>([&](auto m) FASTCAPS_LAMBDA { wm[m] = K::load(w + m * L); });
    unroll<R>([&](auto q) FASTCAPS_LAMBDA {
      const vec f = K::splat(factor[q]);
      unroll<W>([&](auto m) FASTCAPS_LAMBDA { sum[q * W + m] += f * wm[m]; });
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

  void prior_gradient(int64_t b, int64_t block, const vec* db, Real* d_prior) const {
    Scratch<vec> sum(z.J);
    Scratch<Real> rows_of_block(L * z.J);
    for (int64_t j = 0; j < z.J; ++j) {
      sum[j] = db[j];
      for (int64_t t = 1; t < steps; ++t) sum[j] += db[t * z.J + j];
    }
    const int64_t n = count(block), first = block * L * z.J;
    if (in.prior_stride_b)
      return K::from_lanes(sum, 1, n, z.J, Stored::real, d_prior, b * in.prior_stride_b + first, z.J);
    K::from_lanes(sum, 1, n, z.J, Stored::real, rows_of_block, 0, z.J);
    for (int64_t e = 0; e < n * z.J; ++e) d_prior[first + e] += rows_of_block[e];
  }

  // d W_j = sum_t,b ds_t r_t^T + V_t p_t^T, a task for some rows of a matrix at a time.
  void shared_weight_gradient(Parallel parallel) const {
    constexpr int R = kRows;
    const int64_t blocks_of_rows = ceil_div(z.D_out, R);
    parallel_for(parallel, C::shared_matrices() * blocks_of_rows, [&](int64_t task) {
      const int64_t matrix = task / blocks_of_rows, d = task % blocks_of_rows * R;
      const int64_t j0 = in.stride_j ? matrix : 0, j1 = in.stride_j ? j0 + 1 : z.J;
      Scratch<Real> sum(R * row);
      std::memset(sum, 0, R * row * sizeof(Real));
      for (int64_t first = t0 * z.B; first < z.T * z.B; first += 128)  // in parts, as long sums lose digits
        for_vectors(row / L, [&](int64_t v, auto W) FASTCAPS_LAMBDA {
          vec part[R * W];
          unroll<R * W>([&](auto n) FASTCAPS_LAMBDA { part[n] = vec{}; });
          for (int64_t tb = first; tb < least(first + 128, z.T * z.B); ++tb)
            for (int64_t j = j0; j < j1; ++j) {
              const int64_t from = tb * JO + j * out_row + d, at = tb * JD + j * row + v * L;
              add_outer<R, W>(ds + from, r + at, part);
              add_outer<R, W>(V + from, p + at, part);
            }
          unroll<R * W>([&](auto n) FASTCAPS_LAMBDA {
            Real* to = sum + n / W * row + (v + n % W) * L;
            K::store(to, K::load(to) + part[n]);
          });
        });
      C::trim(sum, least(R, z.D_out - d), z.D_in, in.stored, out.d_weight, (matrix * z.D_out + d) * z.D_in);
    });
  }
};

}  // namespace FASTCAPS_ISA
}  // namespace fastcaps
