// Dynamic routing on the CPU with samples in the lanes of the vectors: the forward, and what the backward shares with
// it.
//
// N vectors of samples side by side are a batch tile. Votes are computed again in every sweep over the input capsules
// and live in the cache for a chunk of them. What crosses input capsules (weighted sums, dV) is summed per slice of I,
// and the slices in a fixed order. Slices depend on sizes only, so threads change no bit of the result.
//
//   forward                      T iterations
//     over_slices                  a task: a band of batch tiles, a slice of the input capsules
//       uniform_sum                  first iteration without a prior: sum_i u
//         votes                        u for kRows entries of an output capsule, in registers
//       routed_sum                   else: sum_i c u, a chunk of input capsules at a time
//         agreement                    <u, V> of an output capsule; keeps u where it fits
//           vote_rows -> votes
//         softmax                      logits -> c
//         add_votes                    sum += c u
//     squash                       the sums of all slices -> v, V
//
// Indices: i, j capsules; d an entry of an output capsule, k one of an input pose; n a vector of the tile, l a lane of
// it; m an input capsule of a chunk; R rows of votes are in registers at a time, as vectors u[r * N + n].
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/entry_points.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/simd.h"
#include "numbers.h"
#include "routing.h"

namespace fastcaps {
namespace FASTCAPS_ISA {

// One call with N vectors of samples side by side. kPairs: poses and weight are bfloat16, taken as pairs of entries in
// 32 bits, which one instruction multiplies and sums.
template <class Real, int N, bool kPairs = false>
struct BatchForward : Simd<Real> {
  using SIMD = Simd<Real>;
  using typename SIMD::vec;
  static constexpr int L = SIMD::L, kTileSamples = N * L;
  // Entries whose votes share the registers. Four chains of FMAs wait for each other where N is 1: eight samples of a
  // tiny layer 41 -> 35 us.
  static constexpr int kRows = N == 1 || FASTCAPS_VECTOR_BYTES == 64 ? 8 : 4;
  static constexpr int kEntries = kPairs ? 2 : 1;  // of a pose, in what is loaded and multiplied as one
  static constexpr int kChunk = 4;                 // input capsules whose votes are kept until their sum is taken
  // Bytes of these votes, at most. At J = 100 keeping 400 KB still took the forward from 33 to 26 ms.
  static constexpr int64_t kVotesBytes = 400 << 10;
  // Bytes of the sums of a band, and of the matrices that its tiles meet one after the other. Without bands every tile
  // reads all matrices from L3: the paper's layer 29.5 -> 16.9 ms, and 37 -> 23 at J = 100 with 256 KB.
  static constexpr int64_t kBandBytes = 256 << 10, kNearBytes = 128 << 10;
  // At least kTasks tasks keep eight threads busy. Up to twice as many, while all partial sums take kPartialBytes.
  static constexpr int64_t kTasks = 16, kPartialBytes = 1 << 20;
  static constexpr int64_t kWidenedBytes = 96 << 10;                 // of matrices that are widened at a time
  static constexpr int64_t kUniformChunk = 32, kUniformRows = 2048;  // of uniform_sum: input capsules, their rows
  const Routing<Real>& in;
  const Sizes z;
  const Parallel parallel;
  const int64_t JD, JDN;               // J * D_out; vectors [J, D_out, N] of a batch tile
  const int64_t tiles, bands, slices;  // batch tiles; bands of them; slices of the input capsules
  const int64_t depth;                 // D_in, or pairs of them
  const Stored stored;

  BatchForward(const Routing<Real>& in, Parallel parallel)
      : in(in),
        z(in.size),
        parallel(parallel),
        JD(z.J * z.D_out),
        JDN(JD * N),
        tiles(ceil_div(z.B, kTileSamples)),
        bands(least(tiles, ceil_div(tiles * JDN * sizeof(vec), kBandBytes))),
        slices(count_slices()),
        depth(z.D_in / kEntries),
        stored(kPairs ? Stored::real : in.stored) {}

  int64_t count_slices() const {
    if (!tiles) return 1;
    const int64_t affordable = kPartialBytes / (tiles * JDN * int64_t(sizeof(vec)));
    const int64_t wanted = most(ceil_div(kTasks, bands), least(ceil_div(2 * kTasks, bands), affordable));
    return most(1, least(z.I / kChunk, wanted));
  }
  // Input capsules that all tiles of a band meet before the next ones: their matrices then come from the L2 cache.
  int64_t capsules_per_visit() const {
    if (!in.weight || !in.stride_i) return most(1, z.I);
    return most(1, kNearBytes / int64_t(in.stride_i * sizeof(Real)) / kChunk) * kChunk;
  }

  // Samples of a tile that are there, in all or in its vector n.
  int64_t samples(int64_t tile) const { return least(kTileSamples, z.B - tile * kTileSamples); }
  int64_t samples(int64_t tile, int n) const { return most(0, least(L, z.B - tile * kTileSamples - n * L)); }

  // Rows [count] of the samples of a tile, `stride` apart, -> lanes [count, N]; the lanes that are not there are 0.
  void gather(int64_t tile, Stored kind, const void* from, int64_t first, int64_t stride, int64_t count,
              vec* to) const {
    for (int n = 0; n < N; ++n)
      SIMD::to_lanes(kind, from, first + (tile * kTileSamples + n * L) * stride, stride, samples(tile, n), count,
                     to + n, N);
  }
  void scatter(int64_t tile, const vec* from, int64_t count, Stored kind, void* to, int64_t first,
               int64_t stride) const {
    for (int n = 0; n < N; ++n)
      SIMD::from_lanes(from + n, N, samples(tile, n), count, kind, to, first + (tile * kTileSamples + n * L) * stride,
                       stride);
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

  // f(kDepth), decided once for many rows: a test in every for_rows costs a tenth of the time. The paper's pose
  // size as a constant saves 2 to 5 % of the forward.
  static constexpr int kVotesGiven = -1, kAnyDepth = 0, kPaperDepth = 8 / kEntries;
  template <class F>
  FASTCAPS_INLINE void with_depth(const F& f) const {
    if (!in.weight) return f(std::integral_constant<int, kVotesGiven>{});
    if constexpr (sizeof(Real) == 4)
      if (depth == kPaperDepth) return f(std::integral_constant<int, kPaperDepth>{});
    f(std::integral_constant<int, kAnyDepth>{});
  }
  // u[r] += sum_k w[r, k] x[k], for R rows: w [R, depth], x [depth, N].
  template <int kDepth, int R>
  FASTCAPS_INLINE void votes(const Real* w, const vec* x, vec* u) const {
    const auto add = [&](int64_t k, int64_t row) FASTCAPS_LAMBDA {
      vec xk[N];
      unroll<N>([&](auto n) FASTCAPS_LAMBDA { xk[n] = x[k * N + n]; });
      unroll<R>([&](auto r) FASTCAPS_LAMBDA {
        const vec wk = SIMD::splat(w[r * row + k]);
        unroll<N>([&](auto n) FASTCAPS_LAMBDA { u[r * N + n] = SIMD::template fma<kPairs>(wk, xk[n], u[r * N + n]); });
      });
    };
    if constexpr (kDepth != kAnyDepth) return unroll<kDepth>([&](auto k) FASTCAPS_LAMBDA { add(k, kDepth); });
    int64_t k = 0;
    for (; k + 4 <= depth; k += 4) unroll<4>([&](auto n) FASTCAPS_LAMBDA { add(k + n, depth); });
    for (; k < depth; ++k) add(k, depth);
  }

  // What the votes of input capsules come from: their poses in lanes, [count, depth, N], or their votes,
  // [count, J or 1, D_out, N].
  int64_t source_rows() const { return in.weight ? depth : in.stride_j ? JD : z.D_out; }
  void load_source(int64_t tile, int64_t i, int64_t count, vec* x) const {
    const int64_t rows = source_rows();
    gather(tile, stored, in.poses, i * rows, z.I * rows, count * rows, x);
    clear_masked(tile, i, count, rows, x);
    // The rows of other samples are far from each other, which no processor expects.
    const int64_t entry = stored == Stored::real ? sizeof(Real) : 2, row = rows * entry, b0 = (tile + 1) * kTileSamples;
    for (int64_t b = b0; b < least(b0 + kTileSamples, z.B); ++b)
      prefetch((const char*)in.poses + (b * z.I + i) * row, count * row);
  }
  // What the mask leaves out of the rows [count, rows, N] of some input capsules becomes 0, whatever it is.
  void clear_masked(int64_t tile, int64_t i, int64_t count, int64_t rows, vec* x) const {
    if (!in.mask) return;
    for (int64_t m = 0; m < count; ++m, x += rows * N)
      for (int n = 0; n < N; ++n) {
        const int64_t b = tile * kTileSamples + n * L;
        const auto there = SIMD::lanes_there(in.mask + b * z.I + i + m, z.I, samples(tile, n));
        for (int64_t r = n; r < rows * N; r += N) x[r] = there ? x[r] : vec{};
      }
  }
  // How many of `count` input capsules are widened at a time.
  int64_t widened_chunk(int64_t count) const {
    if (stored == Stored::real || !in.weight) return count;
    return most(1, least(count, kWidenedBytes / int64_t(in.stride_i * sizeof(Real))));
  }
  // The matrices of some input capsules, [count, J or 1, D_out, depth]; `buffer` is used where they must be widened.
  int64_t matrices_size(int64_t count) const { return in.weight && stored != Stored::real ? count * in.stride_i : 1; }
  const Real* matrices(int64_t i, int64_t count, Real* buffer) const {
    if (!in.weight) return nullptr;
    if (stored == Stored::real) return (const Real*)in.weight + i * (in.stride_i / kEntries);
    widen(stored, in.weight, i * in.stride_i, count * in.stride_i, buffer);
    return buffer;
  }
  // Votes of entries d .. d + R - 1 of output capsule j: w the matrices of the input capsule, x its source.
  template <int kDepth, int R>
  FASTCAPS_INLINE void vote_rows(const Real* w, int64_t j, int64_t d, const vec* x, vec* u) const {
    if constexpr (kDepth == kVotesGiven) {
      unroll<R * N>([&](auto r) FASTCAPS_LAMBDA { u[r] = x[(j * in.stride_j + d) * N + r]; });
    } else {
      unroll<R * N>([&](auto r) FASTCAPS_LAMBDA { u[r] = vec{}; });
      votes<kDepth, R>(w + j * (in.stride_j / kEntries) + d * (kDepth != kAnyDepth ? kDepth : depth), x, u);
    }
  }

  void load_prior(int64_t tile, int64_t i, int64_t count, vec* logits) const {
    if (!in.prior) {
      for (int64_t r = 0; r < count * z.J * N; ++r) logits[r] = vec{};
      return;
    }
    if (in.prior_stride_b) {
      gather(tile, Stored::real, in.prior, i * z.J, in.prior_stride_b, count * z.J, logits);
    } else {
      for (int64_t r = 0; r < count * z.J; ++r)
        for (int n = 0; n < N; ++n) logits[r * N + n] = SIMD::splat(in.prior[i * z.J + r]);
    }
    clear_masked(tile, i, count, z.J, logits);
  }

  void squash(const vec* s, vec* v) const {
    for (int64_t j = 0; j < z.J; ++j)
      for (int n = 0; n < N; ++n) {
        const int64_t first = j * z.D_out * N + n, end = first + z.D_out * N;
        vec q = {};
        for (int64_t r = first; r < end; r += N) q += s[r] * s[r];
        const vec scale = SIMD::squash_scale(q, in.eps);
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
        const vec scale = SIMD::squash_scale(q, in.eps);
        const vec factor = SIMD::squash_factor(q, q == vec{} ? SIMD::splat(1) : q, dot, in.eps);
        for (int64_t r = first; r < end; r += N) ds[r] = scale * dv[r] + factor * s[r];
      }
  }

  // ------------------------------------------------------------------------------------------ sums over input capsules

  // sum_i u over a slice: the first iteration without a prior, where every coupling coefficient is the same.
  void uniform_sum(int64_t tile, int64_t i0, int64_t i1, vec* sum) const {
    const int64_t rows = source_rows(), chunk = most(1, least(widened_chunk(kUniformChunk), kUniformRows / rows));
    Scratch<vec> x(chunk * rows * N, 3);
    Scratch<Real> buffer(matrices_size(chunk));
    for (int64_t first = i0; first < i1; first += chunk) {
      const int64_t count = least(chunk, i1 - first), matrix = in.stride_i / kEntries;
      load_source(tile, first, count, x);
      const Real* w = matrices(first, count, buffer);
      with_depth([&](auto kDepth) FASTCAPS_LAMBDA {
        for (int64_t j = 0; j < z.J; ++j)
          for_rows(z.D_out, [&](int64_t d, auto R) FASTCAPS_LAMBDA {
            vec u[R * N];
            unroll<R * N>([&](auto r) FASTCAPS_LAMBDA { u[r] = vec{}; });
            for (int64_t m = 0; m < count; ++m)
              if constexpr (kDepth == kVotesGiven)
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
  void routed_sum(int64_t tile, int64_t i0, int64_t i1, const vec* V, const vec* ds, vec* sum) const {
    if (ds)
      routed_sum<true>(tile, i0, i1, V, ds, sum);
    else
      routed_sum<false>(tile, i0, i1, V, ds, sum);
  }
  template <bool kBackward>
  void routed_sum(int64_t tile, int64_t i0, int64_t i1, const vec* V, const vec* ds, vec* sum) const {
    const int64_t rows = source_rows(), JN = z.J * N;
    const int64_t matrix = in.stride_i / kEntries, entries = in.stride_j / kEntries;
    const int64_t matrix_bytes = z.D_out * depth * sizeof(Real);
    const int64_t stride_u = JDN | 1;  // from the votes of one capsule to the next: starts 4 KB apart hinder each other
    const bool keep_votes = int64_t(JDN * sizeof(vec)) <= kVotesBytes;  // else the sum computes the votes again
    const int64_t chunk = keep_votes ? widened_chunk(least(kChunk, kVotesBytes / int64_t(JDN * sizeof(vec)))) : 1;
    Scratch<vec> x(rows * N * chunk, 1), u(keep_votes ? stride_u * chunk : 1, 5), c(JN * chunk, 9), dc(JN * chunk, 13);
    Scratch<Real> buffer(matrices_size(chunk));
    for (int64_t first = i0; first < i1; first += chunk) {
      const int64_t count = least(chunk, i1 - first);
      load_source(tile, first, count, x);
      load_prior(tile, first, count, c);
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
            agreement<kDepth, kBackward>(wm, j, xm, Vj, dsj, keep_votes ? u + m * stride_u + row : nullptr, dots);
          });
          unroll<N>([&](auto n) FASTCAPS_LAMBDA {
            c[m * JN + j * N + n] += dots[n];
            dc[m * JN + j * N + n] = dots[N + n];
          });
        }
      for (int64_t m = 0; m < count; ++m) {
        SIMD::template softmax<N>(c + m * JN, z.J, in.leaky);
        if (kBackward) SIMD::template softmax_backward<N>(c + m * JN, dc + m * JN, z.J);
      }
      add_votes(kBackward ? dc : c, count, w, x, keep_votes ? u.data : nullptr, stride_u, sum);
    }
  }
  // dots += <u, V>, if there is a V, and in the backward <u, ds>, of one input and one output capsule; `kept`, if any,
  // keeps the votes.
  template <int kDepth, bool kBackward>
  FASTCAPS_INLINE void agreement(const Real* w, int64_t j, const vec* x, const vec* V, const vec* ds, vec* kept,
                                 vec* dots) const {
    for_rows(z.D_out, [&](int64_t d, auto R) FASTCAPS_LAMBDA {
      vec u[R * N];
      vote_rows<kDepth, R>(w, j, d, x, u);
      if (V) unroll<R * N>([&](auto r) FASTCAPS_LAMBDA { dots[r % N] += u[r] * V[d * N + r]; });
      if constexpr (kBackward) unroll<R * N>([&](auto r) FASTCAPS_LAMBDA { dots[N + r % N] += u[r] * ds[d * N + r]; });
      if (kept) unroll<R * N>([&](auto r) FASTCAPS_LAMBDA { kept[d * N + r] = u[r]; });
    });
  }
  // sum += c u (or db u) over `count` input capsules, c [count, J, N]; their votes are `kept`, or computed again.
  void add_votes(const vec* c, int64_t count, const Real* w, const vec* x, const vec* kept, int64_t stride_u,
                 vec* sum) const {
    const int64_t JN = z.J * N;
    for (int64_t j = 0; j < z.J; ++j) {
      const int64_t begin = j * z.D_out * N, end = begin + z.D_out * N;
      vec factor[kChunk * N];
      for (int64_t m = 0; m < count; ++m)
        for (int n = 0; n < N; ++n) factor[m * N + n] = c[m * JN + j * N + n];
      if (!kept) {
        with_depth([&](auto kDepth) FASTCAPS_LAMBDA {
          for_rows(z.D_out, [&](int64_t d, auto R) FASTCAPS_LAMBDA {
            vec u[R * N];
            vote_rows<kDepth, R>(w, j, d, x, u);
            unroll<R * N>([&](auto r) FASTCAPS_LAMBDA { sum[begin + d * N + r] += factor[r % N] * u[r]; });
          });
        });
      } else if (count == kChunk) {
        for (int64_t r = begin; r < end; r += N)
          unroll<N>([&](auto n) FASTCAPS_LAMBDA {
            const vec* ur = kept + r + n;
            sum[r + n] += (factor[n] * ur[0] + factor[N + n] * ur[stride_u]) +
                          (factor[2 * N + n] * ur[2 * stride_u] + factor[3 * N + n] * ur[3 * stride_u]);
          });
      } else {
        for (int64_t m = 0; m < count; ++m)
          for (int64_t r = begin; r < end; r += N)
            unroll<N>([&](auto n) FASTCAPS_LAMBDA { sum[r + n] += factor[m * N + n] * kept[m * stride_u + r + n]; });
      }
    }
  }

  // `each(tile, i0, i1, sum)` adds input capsules i0 .. i1 - 1 to the sum of a batch tile; `done(tile, sum)` gets it
  // over all of them, slice by slice in order.
  template <class Each, class Done>
  void over_slices(vec* partial, const Each& each, const Done& done) const {
    parallel_for(parallel, bands * slices, [&](int64_t task) {
      const int64_t band = task / slices, s = task % slices, step = capsules_per_visit();
      const int64_t tile0 = tiles * band / bands, tile1 = tiles * (band + 1) / bands;
      const int64_t i0 = z.I * s / slices, i1 = z.I * (s + 1) / slices;
      for (int64_t tile = tile0; tile < tile1; ++tile)
        for (int64_t r = 0; r < JDN; ++r) partial[(tile * slices + s) * JDN + r] = vec{};
      for (int64_t first = i0; first < i1; first += step)
        for (int64_t tile = tile0; tile < tile1; ++tile)
          each(tile, first, least(i1, first + step), partial + (tile * slices + s) * JDN);
    });
    parallel_for(parallel, tiles, [&](int64_t tile) {
      vec* sum = partial + tile * slices * JDN;
      for (int64_t s = 1; s < slices; ++s)
        for (int64_t r = 0; r < JDN; ++r) sum[r] += sum[s * JDN + r];
      done(tile, sum);
    });
  }

  Real uniform_coupling() const { return Real(1) / (z.J + in.leaky); }

  void forward(void* out, Real* sums) const {
    Scratch<vec> partial(tiles * slices * JDN), V(tiles * JDN, 7);
    for (int64_t t = 0; t < z.T; ++t) {
      const bool uniform = t == 0 && !in.prior;  // every coupling coefficient is the same
      over_slices(
          partial,
          [&](int64_t tile, int64_t i0, int64_t i1, vec* sum) {
            if (uniform)
              uniform_sum(tile, i0, i1, sum);
            else
              routed_sum(tile, i0, i1, t ? V + tile * JDN : nullptr, nullptr, sum);
          },
          [&](int64_t tile, vec* s) {
            for (int64_t r = 0; r < JD; ++r)
              for (int n = 0; n < N; ++n) {
                if (uniform) s[r * N + n] *= uniform_coupling();
                if (in.bias) s[r * N + n] += in.bias[r];
              }
            scatter(tile, s, JD, Stored::real, sums, t * z.B * JD, JD);
            squash(s, s);
            if (t == z.T - 1) scatter(tile, s, JD, in.stored, out, 0, JD);
            for (int64_t r = 0; r < JDN; ++r) V[tile * JDN + r] = t ? V[tile * JDN + r] + s[r] : s[r];
          });
    }
  }
};

}  // namespace FASTCAPS_ISA
}  // namespace fastcaps
