// Dynamic routing on the CPU with input capsules in the lanes of the vectors, for one instruction set: a few samples,
// whose votes then stay in the cache through all iterations, and matrices that all input capsules share.
//
// What is routed is the vote of an input capsule for each output capsule. Where one matrix serves all input capsules it
// is the pose itself, since with y_j = W_j^T V_j
//     <W_j x_i, V_j> = <x_i, y_j>   and   sum_i c_ij W_j x_i = W_j sum_i c_ij x_i,
// so that no vote exists at all ("absorbed").
#include "dynamic_routing_cpu_matrices.h"

namespace fastcaps {
namespace FASTCAPS_ISA {

inline void serial(int64_t n, void* context, Body body) { body(context, 0, n); }

template <class Real>
struct Capsules : Matrices<Real> {
  using K = Kernel<Real>;
  using Base = Matrices<Real>;
  using Base::absorbed;
  using Base::depth;
  using Base::in;
  using Base::L;
  using Base::pose_vectors;
  using Base::repeat;
  using Base::transform;
  using Base::weight;
  using Base::z;
  using typename K::vec;
  static constexpr int M = 2, kBlock = M * L;   // vectors, and input capsules, side by side
  static constexpr int64_t kCache = 800 << 10;  // bytes of votes kept from pass to pass
  static constexpr int64_t kNear = 96 << 10;    // bytes of votes, or of sums, that stay close to the core
  const bool given;                             // votes come from the caller
  const bool shared;                            // one vote (or pose) serves all output capsules
  const int64_t D, JD, JDo;                     // entries of what is routed, J times that, J * D_out
  const int64_t rows;                           // entries of one input capsule: of its pose, of its votes
  const int64_t blocks;
  const int64_t at_once;  // output capsules whose votes are near

  explicit Capsules(const Routing<Real>& in)
      : Base(in),
        given(!in.weight),
        shared(absorbed || !in.stride_j),
        D(absorbed ? z.D_in : z.D_out),
        JD(z.J * D),
        JDo(z.J * z.D_out),
        rows(shared ? D : JD),
        blocks(ceil_div(z.I, kBlock)),
        at_once(least(z.J, most(4, kNear / int64_t(D * M * sizeof(vec))))) {}
  // Where the mask starts for the input capsules of vector m of a block.
  const bool* mask(int64_t b, int64_t block, int m) const {
    return in.mask ? in.mask + b * z.I + block * kBlock + m * L : nullptr;
  }
  bool masked(int64_t b, int64_t i) const { return in.mask && !in.mask[b * z.I + i]; }
  // Input capsules of vector m of a block that are there.
  int64_t count(int64_t block, int m) const { return most(0, least(L, z.I - block * kBlock - m * L)); }

  // --------------------------------------------------------------------------------------- absorbed: V to y, r to s

  // What poses or votes are multiplied with: y_j = W_j^T V_j, or V itself.
  void to_query(const Real* V, Real* y) const {
    for (int64_t j = 0; j < z.J; ++j) {
      const Real *w = (const Real*)weight + j * in.stride_j, *v = V + j * z.D_out;
      Real* yj = y + j * z.D_in;
      int64_t k = 0;
      for (; k + 4 * L <= z.D_in; k += 4 * L) rows_times<4>(w + k, v, yj + k);
      for (; k + L <= z.D_in; k += L) rows_times<1>(w + k, v, yj + k);
      for (; k < z.D_in; ++k) {
        yj[k] = 0;
        for (int64_t d = 0; d < z.D_out; ++d) yj[k] += w[d * z.D_in + k] * v[d];
      }
    }
  }
  // sum_d v[d] times row d, for n vectors of entries of the rows.
  template <int n>
  void rows_times(const Real* w, const Real* v, Real* y) const {
    vec sum[n];
    unroll<n>([&](auto m) FASTCAPS_LAMBDA { sum[m] = vec{}; });
    for (int64_t d = 0; d < z.D_out; ++d) {
      const vec vd = K::splat(v[d]);
      unroll<n>([&](auto m) FASTCAPS_LAMBDA { sum[m] += K::load(w + d * z.D_in + m * L) * vd; });
    }
    unroll<n>([&](auto m) FASTCAPS_LAMBDA { K::store(y + m * L, sum[m]); });
  }
  // s_j = W_j r_j, or r itself.
  void from_sum(const Real* r, Real* s) const {
    if (!absorbed) {
      for (int64_t n = 0; n < JD; ++n) s[n] = r[n];
      return;
    }
    Scratch<vec> x(pose_vectors());
    Scratch<Real> padded_s(ceil_div(z.D_out, L) * L), buffer(L * depth);
    for (int64_t j = 0; j < z.J; ++j) {
      repeat(r + j * z.D_in, x);
      transform(j * in.stride_j, z.D_out, x, padded_s, buffer);
      for (int64_t d = 0; d < z.D_out; ++d) s[j * z.D_out + d] = padded_s[d];
    }
  }
  void squash(const Real* s, Real* v) const {
    for (int64_t j = 0; j < z.J; ++j, s += z.D_out, v += z.D_out) {
      const Real scale = K::squash_scale(K::dot(s, s, z.D_out), in.eps);
      for (int64_t d = 0; d < z.D_out; ++d) v[d] = s[d] * scale;
    }
  }
  void squash_backward(const Real* s, const Real* dv, Real* ds) const {
    for (int64_t j = 0; j < z.J; ++j, s += z.D_out, dv += z.D_out, ds += z.D_out) {
      const Real q = K::dot(s, s, z.D_out), scale = K::squash_scale(q, in.eps);
      const Real factor = K::squash_factor(q, q == 0 ? Real(1) : q, K::dot(s, dv, z.D_out), in.eps);
      for (int64_t d = 0; d < z.D_out; ++d) ds[d] = scale * dv[d] + factor * s[d];
    }
  }

  // --------------------------------------------------------------------------------------------- blocks of capsules

  struct Buffers {
    explicit Buffers(const Capsules& in)
        : votes(in.given || in.absorbed ? 1 : L * in.stride()), x(in.pose_vectors()), matrix(2 * L * in.depth) {}
    Scratch<Real> votes;
    Scratch<vec> x;
    Scratch<Real> matrix;
  };
  int64_t stride() const { return ceil_div(at_once * D, L) * L + L; }  // of a row of votes; not a power of two

  // Votes, or poses, of a block of input capsules for output capsules j0 .. j1 - 1: [j1 - j0 or 1, D, M].
  void source(int64_t b, int64_t block, int64_t j0, int64_t j1, vec* u, const Buffers& buffers) const {
    const int64_t row0 = shared ? 0 : j0 * D, total = shared ? D : (j1 - j0) * D;
    const int64_t entry = in.stored == Stored::real ? sizeof(Real) : 2;
    for (int m = 0; m < M; ++m) {
      const int64_t i0 = block * kBlock + m * L, n = count(block, m);
      if (given || absorbed) {
        // The next rows, one after the other: read side by side they would be waited for one by one.
        prefetch<3>((const char*)in.poses + (b * z.I + i0 + L) * rows * entry, least(L * rows * entry, 4 << 10));
        K::to_lanes(in.stored, in.poses, (b * z.I + i0) * rows + row0, rows, n, total, u + m, M);
        clear_masked(b, block, m, total, u);
        continue;
      }
      for (int64_t l = 0; l < n; ++l) {
        load_pose(b, i0 + l, buffers.x);
        transform((i0 + l) * in.stride_i + row0 * z.D_in, total, buffers.x, buffers.votes + l * stride(),
                  buffers.matrix);
      }
      K::to_lanes(Stored::real, buffers.votes, 0, stride(), n, total, u + m, M);
    }
  }
  // What the mask leaves out of [total, M] becomes 0, whatever it is.
  void clear_masked(int64_t b, int64_t block, int m, int64_t total, vec* u) const {
    if (!in.mask) return;
    const auto there = K::lanes_there(mask(b, block, m), 1, count(block, m));
    for (int64_t r = m; r < total * M; r += M) u[r] = there ? u[r] : vec{};
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
  // f(j0, j1) for the output capsules, some at a time.
  template <class F>
  FASTCAPS_INLINE void for_outputs(const F& f) const {
    for (int64_t j = 0; j < z.J; j += at_once) f(j, least(z.J, j + at_once));
  }
  void load_prior(int64_t b, int64_t block, vec* logits) const {
    for (int m = 0; m < M; ++m) {
      const int64_t first = b * in.prior_stride_b + (block * kBlock + m * L) * z.J;
      if (in.prior)
        K::to_lanes(Stored::real, in.prior, first, z.J, count(block, m), z.J, logits + m, M);
      else
        for (int64_t j = 0; j < z.J; ++j) logits[j * M + m] = vec{};
    }
  }
  // Lanes without an input capsule must add nothing, whatever not-a-number other lanes have led to.
  void clear_missing(int64_t block, vec* c) const {
    if ((block + 1) * kBlock <= z.I) return;
    for (int m = 0; m < M; ++m) {
      const auto there = K::lanes_there(nullptr, 1, count(block, m));
      for (int64_t j = 0; j < z.J; ++j) c[j * M + m] = there ? c[j * M + m] : vec{};
    }
  }

  // f(j, G) with G output capsules at a time, so that sums do not wait for each other; G a constant.
  template <class F>
  static FASTCAPS_INLINE void by_four(int64_t j0, int64_t j1, const F& f) {
    int64_t j = j0;
    for (; j + 4 <= j1; j += 4) f(j, std::integral_constant<int, 4>{});
    for (; j < j1; ++j) f(j, std::integral_constant<int, 1>{});
  }
  template <class F>
  FASTCAPS_INLINE void with_shared(const F& f) const {
    if (shared)
      f(std::true_type{});
    else
      f(std::false_type{});
  }
  // sum[j] += <u_j, q_j>
  void dots(int64_t j0, int64_t j1, const vec* u, const Real* q, vec* sum) const {
    with_shared([&](auto one) FASTCAPS_LAMBDA {
      by_four(j0, j1, [&](int64_t j, auto G) FASTCAPS_LAMBDA {
        vec s[G * M];
        unroll<G * M>([&](auto n) FASTCAPS_LAMBDA { s[n] = vec{}; });
        const vec* uj = one ? u : u + (j - j0) * D * M;
        const Real* qj = q + j * D;
        for (int64_t d = 0; d < D; ++d)
          unroll<G>([&](auto g) FASTCAPS_LAMBDA {
            const vec factor = K::splat(qj[g * D + d]);
            unroll<M>([&](auto m) FASTCAPS_LAMBDA { s[g * M + m] += uj[((one ? 0 : g * D) + d) * M + m] * factor; });
          });
        unroll<G * M>([&](auto n) FASTCAPS_LAMBDA { sum[j * M + n] += s[n]; });
      });
    });
  }
  // Vectors from the sum of one output capsule to that of the next: odd, as starts 4 KB apart hinder each other.
  int64_t sum_stride() const { return D | 1; }
  // sum[j] += f_j u_j, the block's capsules still in the lanes; sum is [j1 - j0, sum_stride]
  void add_routed(int64_t j0, int64_t j1, const vec* u, const vec* f, vec* sum) const {
    with_shared([&](auto one) FASTCAPS_LAMBDA {
      by_four(j0, j1, [&](int64_t j, auto G) FASTCAPS_LAMBDA {
        vec factor[G * M];
        unroll<G * M>([&](auto n) FASTCAPS_LAMBDA { factor[n] = f[j * M + n]; });
        const vec* uj = one ? u : u + (j - j0) * D * M;
        vec* to = sum + (j - j0) * sum_stride();
        const int64_t next = sum_stride();
        for (int64_t d = 0; d < D; ++d)
          unroll<G>([&](auto g) FASTCAPS_LAMBDA {
            const vec* ud = uj + ((one ? 0 : g * D) + d) * M;
            to[g * next + d] = (to[g * next + d] + factor[g * M] * ud[0]) + factor[g * M + 1] * ud[1];
          });
      });
    });
  }
  // to[j, d] += the sum of the lanes of from[j, d]
  void add_lanes(const vec* from, int64_t outputs, Real* to) const {
    for (int64_t j = 0; j < outputs; ++j, from += sum_stride(), to += D)
      for (int64_t d = 0; d < D; d += L) {
        vec v[L];
        unroll<L>([&](auto l) FASTCAPS_LAMBDA { v[l] = d + l < D ? from[d + l] : vec{}; });
        const vec total = K::sum_lanes(v);
        for (int64_t l = 0; l < least(L, D - d); ++l) to[d + l] += total[l];
      }
  }

  // ------------------------------------------------------------------------------------------------------- one pass

  struct Step {
    const Real* q;  // [J, D], V or y; null: the logits are the prior
    const Real* h;  // [J, D], ds or W^T ds; null in the forward
    bool plain;     // no logits at all: every coupling coefficient is 1, to be scaled by who asked
    Real* c_sum;    // [J, D], sum_i c u, or null
    Real* db_sum;   // [J, D], sum_i db u, or null
  };

  // Sums over blocks of input capsules; `cache` [blocks, rows, M] keeps the votes, and holds them already unless `fill`.
  void pass(int64_t b, int64_t block0, int64_t block1, const Step& step, vec* cache, bool fill) const {
    const bool whole = JD * int64_t(sizeof(vec)) <= 2 * kNear;  // sums over lanes once, or for every block
    const int64_t near_rows = shared ? D : at_once * D,  sums = (whole ? z.J : at_once) * sum_stride();
    const Buffers buffers(*this);
    Scratch<vec> local(cache ? 1 : near_rows * M, 1), c(z.J * M, 3), dc(z.J * M, 5);
    Scratch<vec> c_lanes(step.c_sum ? sums : 1, 7), db_lanes(step.db_sum ? sums : 1, 11);
    for (Real* sum : {step.c_sum, step.db_sum})
      if (sum) std::memset(sum, 0, JD * sizeof(Real));
    const auto clear = [&] {
      for (int64_t n = 0; n < sums; ++n) {
        if (step.c_sum) c_lanes[n] = vec{};
        if (step.db_sum) db_lanes[n] = vec{};
      }
    };
    clear();
    if (step.plain)
      for (int64_t n = 0; n < z.J * M; ++n) c[n] = K::splat(1);
    const int64_t J_sums = step.plain && shared ? 1 : z.J;  // all output capsules have the same sum
    for (int64_t block = block0; block < block1; ++block) {
      vec* kept = cache ? cache + block * rows * M : nullptr;
      if (kept && fill) for_outputs([&](int64_t j0, int64_t j1) { source(b, block, j0, j1, at(kept, j0), buffers); });
      bool fresh = false;  // whether `local` holds all votes of this block
      const auto votes = [&](int64_t j0, int64_t j1) -> const vec* {
        if (kept) return at(kept, j0);
        if (!fresh) source(b, block, j0, j1, local, buffers);
        fresh = shared || j1 - j0 == z.J;
        return local;
      };
      if (!step.plain) {
        load_prior(b, block, c);
        if (step.h)
          for (int64_t n = 0; n < z.J * M; ++n) dc[n] = vec{};
        if (step.q || step.h) for_outputs([&](int64_t j0, int64_t j1) {
            const vec* u = votes(j0, j1);
            if (step.q) dots(j0, j1, u, step.q, c);
            if (step.h) dots(j0, j1, u, step.h, dc);
          });
        K::template softmax<M>(c, z.J, in.leaky);
        clear_missing(block, c);
        if (step.h) K::template softmax_backward<M>(c, dc, z.J);
        if (step.h) clear_missing(block, dc);
      }
      for_outputs([&](int64_t j0, int64_t j1) {
        const vec* u = votes(j0, j1);
        const int64_t end = least(j1, J_sums), from = whole ? j0 * sum_stride() : 0;
        if (step.c_sum) add_routed(j0, end, u, c, c_lanes + from);
        if (step.db_sum) add_routed(j0, end, u, dc, db_lanes + from);
        if (whole) return;
        if (step.c_sum) add_lanes(c_lanes, j1 - j0, step.c_sum + j0 * D);
        if (step.db_sum) add_lanes(db_lanes, j1 - j0, step.db_sum + j0 * D);
        clear();
      });
    }
    if (whole) {
      if (step.c_sum) add_lanes(c_lanes, J_sums, step.c_sum);
      if (step.db_sum) add_lanes(db_lanes, J_sums, step.db_sum);
    }
    for (int64_t n = J_sums * D; n < JD; ++n) step.c_sum[n] = step.c_sum[n - D];
  }
  vec* at(vec* votes, int64_t j) const { return shared ? votes : votes + j * D * M; }

  // Some samples from b0 on, in slices of the input capsules: the votes that are kept, and the sums of the slices.
  struct Chunk {
    Chunk(const Capsules& of, int64_t b0, int64_t b1, int64_t slices, Parallel parallel)
        : of(of),
          b0(b0),
          samples(b1 - b0),
          slices(slices),
          parallel(parallel),
          keep(samples * of.cache_size() * int64_t(sizeof(vec)) <= kCache),
          cache(keep ? samples * of.cache_size() : 1, 15),
          partial(2 * samples * slices * of.JD) {}
    void start(int64_t b) {  // with the same number of samples
      b0 = b;
      fill = true;
    }
    const Capsules& of;
    int64_t b0;
    const int64_t samples, slices;
    const Parallel parallel;
    const bool keep;
    bool fill = true;
    Scratch<vec> cache;
    Scratch<Real> partial;  // [2, samples, slices, J, D]
    vec* kept(int64_t b) const { return keep ? cache + (b - b0) * of.cache_size() : nullptr; }

    // One pass: step(b) says what is wanted, done(b, sum_i c u, sum_i db u) gets it.
    template <class Wanted, class Done>
    void run(const Wanted& wanted, const Done& done) {
      const int64_t half = samples * slices * of.JD;
      parallel_for(parallel, samples * slices, [&](int64_t task) {
        const int64_t b = b0 + task / slices, s = task % slices;
        Step step = wanted(b);
        step.c_sum = step.c_sum ? partial + task * of.JD : nullptr;
        step.db_sum = step.db_sum ? partial + half + task * of.JD : nullptr;
        of.pass(b, of.blocks * s / slices, of.blocks * (s + 1) / slices, step, kept(b), fill);
      });
      fill = false;
      for (int64_t b = b0; b < b0 + samples; ++b) {
        Real* sum[2];
        for (int n = 0; n < 2; ++n) {
          sum[n] = partial + n * half + (b - b0) * slices * of.JD;
          const Step step = wanted(b);
          if (!(n ? step.db_sum : step.c_sum)) continue;
          for (int64_t s = 1; s < slices; ++s)
            for (int64_t r = 0; r < of.JD; ++r) sum[n][r] += sum[n][s * of.JD + r];
        }
        done(b, sum[0], sum[1]);
      }
    }
  };
  int64_t cache_size() const { return blocks * rows * M; }

  // body(chunk) for all samples: many of them side by side, each by one thread, or a few at a time in slices.
  template <class F>
  void for_samples(bool side_by_side, Parallel parallel, const F& body) const {
    if (side_by_side) {
      const int64_t tasks = least(z.B, kTasks);
      parallel_for(parallel, tasks, [&](int64_t task) {
        Chunk chunk(*this, 0, 1, 1, serial);
        for (int64_t b = z.B * task / tasks; b < z.B * (task + 1) / tasks; ++b) {
          chunk.start(b);
          body(chunk, task);
        }
      });
      return;
    }
    const int64_t together = most(1, least(z.B, kCache / most(1, cache_size() * sizeof(vec))));
    const int64_t slices = most(1, least(blocks, 16));
    for (int64_t b = 0; b < z.B; b += together) {
      Chunk chunk(*this, b, least(z.B, b + together), slices, parallel);
      body(chunk, 0);
    }
  }
  static constexpr int64_t kMany = 16, kTasks = 32;  // samples from which on they go side by side; in so many tasks

  Real uniform() const { return Real(1) / (z.J + in.leaky); }

  void forward(void* out, Real* sums, Parallel parallel) const {
    for_samples(z.B >= kMany, parallel, [&](Chunk& chunk, int64_t) {
      Scratch<Real> V(chunk.samples * JDo), y(absorbed ? chunk.samples * JD : 1), v(JDo);
      for (int64_t t = 0; t < z.T; ++t) {
        const bool plain = t == 0 && !in.prior;
        Real any;
        chunk.run(
            [&](int64_t b) {
              const int64_t n = b - chunk.b0;
              return Step{t ? (absorbed ? y + n * JD : V + n * JDo) : nullptr, nullptr, plain, &any, nullptr};
            },
            [&](int64_t b, const Real* r, const Real*) {
              Real *s = sums + (t * z.B + b) * JDo, *Vb = V + (b - chunk.b0) * JDo;
              from_sum(r, s);
              for (int64_t n = 0; n < JDo; ++n) {
                if (plain) s[n] *= uniform();
                if (in.bias) s[n] += in.bias[n];
              }
              squash(s, v);
              if (t == z.T - 1) return narrow(in.stored, v.data, JDo, out, b * JDo);
              for (int64_t n = 0; n < JDo; ++n) Vb[n] = t ? Vb[n] + v[n] : v[n];
              if (absorbed) to_query(Vb, y + (b - chunk.b0) * JD);
            });
      }
    });
  }
};

}  // namespace FASTCAPS_ISA
}  // namespace fastcaps
