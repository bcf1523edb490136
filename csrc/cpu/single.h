// Dynamic routing on the CPU one sample at a time, for one instruction set: a few samples, whose votes then stay in the
// cache through all iterations, votes that the caller gives, and matrices that all input capsules share.
//
// What is routed is a row of numbers for an input capsule (and an output capsule): its vote. Where one matrix serves
// all input capsules it is the pose itself, since with y_j = W_j^T V_j
//     <W_j x_i, V_j> = <x_i, y_j>   and   sum_i c_ij W_j x_i = W_j sum_i c_ij x_i,
// so that no vote exists at all ("absorbed"). Rows lie in the lanes as they lie in memory, padded to whole vectors; the
// input capsules of a block, as many as there are lanes, fill them where there is one number each: logits,
// coefficients.
#include "cpu/matrices.h"

namespace fastcaps {
namespace FASTCAPS_ISA {

inline void serial(int64_t n, void* context, Body body) { body(context, 0, n); }

template <class Real>
struct Capsules : Matrices<Real> {
  using K = Kernel<Real>;
  using Base = Matrices<Real>;
  using Base::depth;
  using Base::in;
  using Base::L;
  using Base::pose_vectors;
  using Base::repeat;
  using Base::transform;
  using Base::whole;
  using Base::z;
  using typename K::vec;
  static constexpr int kWide = FASTCAPS_VECTOR_BYTES == 64 ? 4 : 2;  // vectors of a row that are worked on together
  static constexpr int64_t kCache = 1500 << 10;      // bytes of rows kept from pass to pass, of all threads together
  static constexpr int64_t kLocal = 1 << 20;         // bytes of rows of one block, or kept by one thread alone
  static constexpr int64_t kSums = 2 << 20;          // bytes of the sums of all slices
  static constexpr int64_t kMany = 16, kTasks = 32;  // samples from which on they go side by side; in so many tasks
  static constexpr int kSamples = 4;                 // of a task that go together, as they meet the shared matrices
  const bool absorbed;                               // one matrix for all input capsules
  const bool own;                                    // or one for each
  const bool shared;                                 // one row serves all output capsules
  const bool in_place;                               // rows can be read where they lie
  const int64_t D, row, out_row;                     // entries of what is routed; of its row; of a row of [J, D_out]
  const int64_t JD, JO;                              // J * row, J * out_row
  const int64_t rows;                                // entries of one input capsule: row, or JD
  const int64_t blocks;                              // of L input capsules
  const bool keep_prior;                             // all samples have the same, which lies in lanes once
  Scratch<Real> own_weight;          // the shared matrices [J or 1, D_out, row], where they do not lie so
  Scratch<vec> transposed;           // and [J or 1, D_in, out_row]
  Scratch<Real> zeros, padded_bias;  // [rows]; [J, out_row]
  Scratch<vec> prior_lanes;          // [blocks, J]
  const Real* const w_rows;

  explicit Capsules(const Routing<Real>& in)
      : Base(in),
        absorbed(in.weight && !in.stride_i),
        own(in.weight && in.stride_i),
        shared(absorbed || !in.stride_j),
        in_place(!own && in.stored == Stored::real && (absorbed ? z.D_in : z.D_out) % L == 0),
        D(absorbed ? z.D_in : z.D_out),
        row(whole(D)),
        out_row(whole(z.D_out)),
        JD(z.J * row),
        JO(z.J * out_row),
        rows(shared ? row : JD),
        blocks(ceil_div(z.I, L)),
        keep_prior(in.prior && !in.prior_stride_b && z.B > 1 && blocks * z.J * int64_t(sizeof(vec)) <= kLocal),
        own_weight(absorbed && !in_place ? shared_matrices() * z.D_out * row : 1),
        transposed(absorbed ? shared_matrices() * z.D_in * out_row / L : 1),
        zeros(rows),
        padded_bias(JO),
        prior_lanes(keep_prior ? blocks * z.J : 1),
        w_rows(in_place ? (const Real*)in.weight : own_weight.data) {
    std::memset(zeros, 0, rows * sizeof(Real));
    std::memset(padded_bias, 0, JO * sizeof(Real));
    if (in.bias) pad(Stored::real, in.bias, 0, z.J, z.D_out, padded_bias);
    for (int64_t block = 0; keep_prior && block < blocks; ++block) prior_to_lanes(0, block, prior_lanes + block * z.J);
    if (!absorbed) return;
    if (!in_place) pad(in.stored, in.weight, 0, shared_matrices() * z.D_out, z.D_in, own_weight);
    for (int64_t n = 0; n < shared_matrices(); ++n)
      for (int64_t d = 0; d < z.D_out; d += L)
        K::to_lanes(in.stored, in.weight, (n * z.D_out + d) * z.D_in, z.D_in, least(L, z.D_out - d), z.D_in,
                    transposed + (n * z.D_in * out_row + d) / L, out_row / L);
  }
  int64_t shared_matrices() const { return in.stride_j ? z.J : 1; }
  bool masked(int64_t b, int64_t i) const { return in.mask && !in.mask[b * z.I + i]; }
  int64_t count(int64_t block) const { return least(L, z.I - block * L); }  // input capsules of a block

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
      multiply(samples, w_rows + (in.stride_j ? j : 0) * z.D_out * row, z.D_out, row, V + j * out_row, JO, y + j * row,
               JD);
  }
  // s_j = W_j r_j, or r itself.
  void from_sum(int64_t samples, const Real* r, Real* s) const {
    if (!absorbed) return (void)std::memcpy(s, r, samples * JO * sizeof(Real));
    for (int64_t j = 0; j < z.J; ++j)
      multiply(samples, (const Real*)transposed.data + (in.stride_j ? j : 0) * z.D_in * out_row, z.D_in, out_row,
               r + j * row, JD, s + j * out_row, JO);
  }
  // to[b] = sum_n x[b, n] w[n], with w [count, width].
  static void multiply(int64_t samples, const Real* w, int64_t count, int64_t width, const Real* x, int64_t stride_x,
                       Real* to, int64_t stride_to) {
    const auto some = [&](auto S, auto W, int64_t b, int64_t k) FASTCAPS_LAMBDA {
      vec sum[S * W];
      unroll<S * W>([&](auto n) FASTCAPS_LAMBDA { sum[n] = vec{}; });
      for (int64_t n = 0; n < count; ++n)
        unroll<W>([&](auto v) FASTCAPS_LAMBDA {
          const vec wn = K::load(w + n * width + k + v * L);
          unroll<S>([&](auto s) FASTCAPS_LAMBDA { sum[s * W + v] += wn * K::splat(x[(b + s) * stride_x + n]); });
        });
      unroll<S * W>([&](auto n) FASTCAPS_LAMBDA { K::store(to + (b + n / W) * stride_to + k + n % W * L, sum[n]); });
    };
    const auto all = [&](auto S, int64_t b) FASTCAPS_LAMBDA {
      for_vectors(width / L, [&](int64_t v, auto W) FASTCAPS_LAMBDA { some(S, W, b, v * L); });
    };
    int64_t b = 0;
    for (; b + kSamples <= samples; b += kSamples) all(std::integral_constant<int, kSamples>{}, b);
    for (; b < samples; ++b) all(std::integral_constant<int, 1>{}, b);
  }
  void squash(const Real* s, Real* v) const {
    for (int64_t j = 0; j < z.J; ++j, s += out_row, v += out_row) {
      const Real scale = K::squash_scale(K::dot(s, s, out_row), in.eps);
      for (int64_t d = 0; d < out_row; ++d) v[d] = s[d] * scale;
    }
  }
  void squash_backward(const Real* s, const Real* dv, Real* ds) const {
    for (int64_t j = 0; j < z.J; ++j, s += out_row, dv += out_row, ds += out_row) {
      const Real q = K::dot(s, s, out_row), scale = K::squash_scale(q, in.eps);
      const Real factor = K::squash_factor(q, q == 0 ? Real(1) : q, K::dot(s, dv, out_row), in.eps);
      for (int64_t d = 0; d < out_row; ++d) ds[d] = scale * dv[d] + factor * s[d];
    }
  }

  // --------------------------------------------------------------------------------------------- blocks of capsules

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
    if (shared)
      f(std::true_type{});
    else
      f(std::false_type{});
  }

  struct Buffers {
    Buffers(const Capsules& in, int64_t samples)
        : x(samples * in.pose_vectors()),
          matrix(2 * L * in.depth),
          packed(in.own && in.D != in.row ? samples * in.packed() : 1) {}
    Scratch<vec> x;        // [samples, pose_vectors]
    Scratch<Real> matrix;  // a block of rows, and of their gradients
    Scratch<Real> packed;  // [samples, packed]: votes of an input capsule, or their gradients, one after the other
  };
  int64_t packed() const { return whole((shared ? 1 : z.J) * D); }
  // Rows that cannot be used where they lie, of a block of input capsules: [samples, L, rows].
  void fill(int64_t b0, int64_t samples, int64_t block, Real* to, const Buffers& buffers) const {
    const int64_t J = shared ? 1 : z.J, next = L * rows;
    for (int64_t l = 0; l < count(block); ++l, to += rows) {
      const int64_t i = block * L + l;
      if (!own) {
        for (int64_t b = 0; b < samples; ++b)
          if (!masked(b0 + b, i)) pad(in.stored, in.poses, ((b0 + b) * z.I + i) * J * D, J, D, to + b * next);
        continue;
      }
      for (int64_t b = 0; b < samples; ++b) load_pose(b0 + b, i, buffers.x + b * pose_vectors());
      const bool direct = D == row;
      transform(i * in.stride_i, J * D, samples, buffers.x, direct ? to : buffers.packed.data, direct ? next : packed(),
                buffers.matrix);
      for (int64_t b = 0; b < samples && !direct; ++b)
        pad(Stored::real, buffers.packed, b * packed(), J, D, to + b * next);
    }
  }
  // The rows of the input capsules of a block; `filled` holds them where they cannot be used where they lie.
  struct Rows {
    const Real* of[L];
  };
  Rows rows_of(int64_t b, int64_t block, const Real* filled) const {
    const Real* first = in_place ? (const Real*)in.poses + (b * z.I + block * L) * rows : filled;
    if (in_place) prefetch<3>(first + L * rows, least(L * rows * sizeof(Real), 4 << 10));
    const bool* there = in.mask && !own ? in.mask + b * z.I + block * L : nullptr;
    Rows found;
    const int64_t n = count(block);
    for (int64_t l = 0; l < n; ++l) found.of[l] = first + l * rows;
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
  void load_prior(int64_t b, int64_t block, vec* logits) const {
    if (keep_prior)
      std::memcpy(logits, prior_lanes + block * z.J, z.J * sizeof(vec));
    else if (in.prior)
      prior_to_lanes(b, block, logits);
    else
      for (int64_t j = 0; j < z.J; ++j) logits[j] = vec{};
  }
  void prior_to_lanes(int64_t b, int64_t block, vec* logits) const {
    K::to_lanes(Stored::real, in.prior, b * in.prior_stride_b + block * L * z.J, z.J, count(block), z.J, logits, 1);
  }

  // sum[j] += <u_j, q_j>, a lane for each input capsule
  void dots(const Rows& u, const Real* q, vec* sum) const {
    for (int64_t j = 0; j < z.J; ++j) {
      const int64_t first = shared ? 0 : j * row;
      vec part[L];
      unroll<L>([&](auto l) FASTCAPS_LAMBDA { part[l] = vec{}; });
      for_vectors(row / L, [&](int64_t v, auto W) FASTCAPS_LAMBDA {
        vec factor[W];
        unroll<W>([&](auto n) FASTCAPS_LAMBDA { factor[n] = K::load(q + j * row + (v + n) * L); });
        unroll<L>([&](auto l) FASTCAPS_LAMBDA {
          const Real* ul = u.of[l] + first + v * L;
          unroll<W>([&](auto n) FASTCAPS_LAMBDA { part[l] += K::load(ul + n * L) * factor[n]; });
        });
      });
      sum[j] += K::sum_lanes(part);
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
          unroll<G * W>([&](auto m) FASTCAPS_LAMBDA { s[m] = K::load(to + m / W * row + m % W * L); });
          for (int64_t l = 0; l < n; ++l) {
            const Real* ul = u.of[l] + first;
            unroll<G>([&](auto g) FASTCAPS_LAMBDA {
              const vec fl = K::splat(factor[(j + g) * L + l]);
              unroll<W>([&](auto m)
                            FASTCAPS_LAMBDA { s[g * W + m] += fl * K::load(ul + (one ? 0 : g * row) + m * L); });
            });
          }
          unroll<G * W>([&](auto m) FASTCAPS_LAMBDA { K::store(to + m / W * row + m % W * L, s[m]); });
        });
      });
    });
  }

  // ------------------------------------------------------------------------------------------------------- one pass

  struct Step {          // [samples, J, row] each, or null
    const Real* q;       // V or y; null: the logits are the prior
    const Real* h;       // ds or W^T ds; null in the forward
    bool plain;          // no logits at all: every coupling coefficient is 1, to be scaled by who asked
    bool sum_c, sum_db;  // whether sum_i c u and sum_i db u are wanted
  };

  // Sums [samples, J, row] over blocks of input capsules; `cache` [blocks, samples, L, rows], if any, keeps the rows,
  // and holds them already unless `fresh`.
  void pass(int64_t b0, int64_t samples, int64_t block0, int64_t block1, const Step& step, Real* cache, bool fresh,
            Real* c_sum, Real* db_sum) const {
    const int64_t block_size = samples * L * rows;
    const Buffers buffers(*this, samples);
    Scratch<Real> local(cache || in_place ? 1 : block_size, 1);
    Scratch<vec> c(samples * z.J, 3), dc(step.h ? samples * z.J : 1, 5);
    Scratch<Rows> u(samples);
    if (c_sum) std::memset(c_sum, 0, samples * JD * sizeof(Real));
    if (db_sum) std::memset(db_sum, 0, samples * JD * sizeof(Real));
    if (step.plain)
      for (int64_t n = 0; n < samples * z.J; ++n) c[n] = K::splat(1);
    const int64_t J_sums = step.plain && shared ? 1 : z.J;  // all output capsules have the same sum
    for (int64_t block = block0; block < block1; ++block) {
      Real* filled = cache ? cache + block * block_size : local.data;
      if (!in_place && (!cache || fresh)) fill(b0, samples, block, filled, buffers);
      for (int64_t b = 0; b < samples; ++b) {
        u[b] = rows_of(b0 + b, block, filled + b * L * rows);
        if (step.plain) continue;
        load_prior(b0 + b, block, c + b * z.J);
        if (step.q) dots(u[b], step.q + b * JD, c + b * z.J);
        for (int64_t j = 0; step.h && j < z.J; ++j) dc[b * z.J + j] = vec{};
        if (step.h) dots(u[b], step.h + b * JD, dc + b * z.J);
      }
      for (int64_t b = 0; b < samples && !step.plain; ++b) {  // side by side, as each alone mostly waits for itself
        K::template softmax<1>(c + b * z.J, z.J, in.leaky);
        if (step.h) K::template softmax_backward<1>(c + b * z.J, dc + b * z.J, z.J);
      }
      for (int64_t b = 0; b < samples; ++b) {
        if (c_sum) add_routed(u[b], count(block), J_sums, c + b * z.J, c_sum + b * JD);
        if (db_sum) add_routed(u[b], count(block), J_sums, dc + b * z.J, db_sum + b * JD);
      }
    }
    if (J_sums < z.J)
      for (int64_t b = 0; b < samples; ++b)
        for (int64_t n = row; n < JD; ++n) c_sum[b * JD + n] = c_sum[b * JD + n - row];
  }

  // Some samples from b0 on, in slices of the input capsules: the rows that are kept, and the sums of the slices.
  struct Chunk {
    Chunk(const Capsules& of, int64_t most_samples, int64_t slices, bool backward, Parallel parallel)
        : of(of),
          slices(slices),
          parallel(parallel),
          keep(!of.in_place && most_samples * of.cache_bytes() <= (slices > 1 ? kCache : kLocal)),
          cache(keep ? most_samples * of.blocks * L * of.rows : 1, 15),
          partial((1 + backward) * slices * most_samples * of.JD) {}
    void start(int64_t b0_, int64_t samples_) {
      b0 = b0_;
      samples = samples_;
      fresh = true;
    }
    const Capsules& of;
    const int64_t slices;
    const Parallel parallel;
    const bool keep;
    int64_t b0 = 0, samples = 0;
    bool fresh = true;
    Scratch<Real> cache;    // [blocks, samples, L, rows]
    Scratch<Real> partial;  // [1 or 2, slices, samples, J, row]
    Real* kept() const { return keep ? cache.data : nullptr; }

    // One pass; done(sum_i c u, sum_i db u) gets the sums, [samples, J, row].
    template <class Done>
    void run(const Step& step, const Done& done) {
      const int64_t size = samples * of.JD;
      Real* const sums[] = {step.sum_c ? partial.data : nullptr, step.sum_db ? partial + slices * size : nullptr};
      parallel_for(parallel, slices, [&](int64_t s) {
        of.pass(b0, samples, of.blocks * s / slices, of.blocks * (s + 1) / slices, step, kept(), fresh,
                sums[0] ? sums[0] + s * size : nullptr, sums[1] ? sums[1] + s * size : nullptr);
      });
      fresh = false;
      for (Real* sum : sums)
        for (int64_t s = 1; sum && s < slices; ++s)
          for (int64_t r = 0; r < size; ++r) sum[r] += sum[s * size + r];
      done(sums[0], sums[1]);
    }
  };
  int64_t cache_bytes() const { return blocks * L * rows * int64_t(sizeof(Real)); }  // of one sample

  // body(chunk, task) for all samples: many of them side by side, each by one thread, or a few at a time in slices.
  template <class F>
  void for_samples(bool side_by_side, bool backward, Parallel parallel, const F& body) const {
    if (side_by_side) {
      const int64_t tasks = least(z.B, kTasks);
      parallel_for(parallel, tasks, [&](int64_t task) {
        Chunk chunk(*this, kSamples, 1, backward, serial);
        const int64_t end = z.B * (task + 1) / tasks;
        for (int64_t b = z.B * task / tasks; b < end; b += kSamples) {
          chunk.start(b, least(kSamples, end - b));
          body(chunk, task);
        }
      });
      return;
    }
    // As many as can be kept, or else as many as fit beside each other for one block, and their sums.
    const int64_t kept = kCache / most(1, cache_bytes()), local = kLocal / int64_t(L * rows * sizeof(Real));
    const int64_t slices = most(1, least(blocks, 16)), summed = kSums / int64_t(2 * slices * JD * sizeof(Real));
    const int64_t together = most(1, least(least(z.B, summed), in_place ? z.B : kept ? kept : local));
    Chunk chunk(*this, together, slices, backward, parallel);
    for (int64_t b = 0; b < z.B; b += together) {
      chunk.start(b, least(together, z.B - b));
      body(chunk, 0);
    }
  }

  Real uniform() const { return Real(1) / (z.J + in.leaky); }

  void forward(void* out, Real* sums, Parallel parallel) const {
    for_samples(z.B >= kMany, false, parallel, [&](Chunk& chunk, int64_t) {
      const int64_t samples = chunk.samples, JDo = z.J * z.D_out;
      Scratch<Real> V(samples * JO), y(absorbed ? samples * JD : 1), s(samples * JO);
      for (int64_t t = 0; t < z.T; ++t) {
        const bool plain = t == 0 && !in.prior;
        chunk.run({t ? (absorbed ? y.data : V.data) : nullptr, nullptr, plain, true, false},
                  [&](const Real* r, const Real*) {
                    from_sum(samples, r, s);
                    for (int64_t b = 0; b < samples; ++b) {
                      Real *sb = s + b * JO, *Vb = V + b * JO;
                      for (int64_t n = 0; n < JO; ++n) sb[n] = (plain ? sb[n] * uniform() : sb[n]) + padded_bias[n];
                      trim(sb, z.J, z.D_out, Stored::real, sums, (t * z.B + chunk.b0 + b) * JDo);
                      squash(sb, sb);
                      if (t == z.T - 1) trim(sb, z.J, z.D_out, in.stored, out, (chunk.b0 + b) * JDo);
                      for (int64_t n = 0; n < JO; ++n) Vb[n] = t ? Vb[n] + sb[n] : sb[n];
                    }
                    if (absorbed && t < z.T - 1) to_query(samples, V, y);
                  });
      }
    });
  }
};

}  // namespace FASTCAPS_ISA
}  // namespace fastcaps
