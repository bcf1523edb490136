// Dynamic routing on the CPU one sample at a time: a few samples, whose votes then stay in the cache through all
// iterations, votes that the caller gives, and matrices that all input capsules share.
//
//   forward
//     for_samples                  many samples side by side, one task each; or a band of some, in slices of I
//       Band::run                    one sweep, T times
//         sweep                        a chunk of L input capsules at a time
//           fill                         their rows, where they are not kept and do not lie in memory
//             transform                    W x, a strip of L rows of a matrix at a time
//           dots                         <u, query>, a lane for each input capsule
//           softmax                      logits -> c
//           add_routed                   sum += c u
//         the sums of all slices
//       from_sum, squash             -> s, v, V
//       to_query                     what the next sweep multiplies rows with: V, or W^T V
//
// Indices: b, i, j as everywhere; l an input capsule of a chunk, which is a lane; v a vector of a row; t an iteration.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/entry_points.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/simd.h"
#include "cpu/single_rows.h"
#include "numbers.h"
#include "routing.h"

namespace fastcaps {
namespace FASTCAPS_ISA {

template <class Real>
struct SingleForward : SingleRows<Real> {
  using SIMD = Simd<Real>;
  using Base = SingleRows<Real>;
  using Base::add_routed;
  using Base::capsule_size;
  using Base::chunks;
  using Base::count;
  using Base::dots;
  using Base::fill;
  using Base::from_sum;
  using Base::in;
  using Base::in_place;
  using Base::J_out;
  using Base::J_row;
  using Base::kBandSamples;
  using Base::kLocalBytes;
  using Base::L;
  using Base::load_prior;
  using Base::one_row;
  using Base::padded_bias;
  using Base::routed;
  using Base::row;
  using Base::rows_of;
  using Base::squash;
  using Base::to_query;
  using Base::trim;
  using Base::z;
  using typename SIMD::vec;
  static constexpr int64_t kCacheBytes = 16 << 20;  // of rows kept from sweep to sweep, of all threads together
  static constexpr int64_t kSumsBytes = 2 << 20;    // of the sums of all slices
  static constexpr int64_t kSlices = 16;       // each clears and sums its own: one sample 0.107 -> 0.096 ms against 32
  static constexpr int64_t kManySamples = 16;  // from which on they go side by side,
  static constexpr int64_t kTasks = 32;        // in so many tasks

  using Base::Base;

  // ------------------------------------------------------------------------------------------------------- one sweep

  // Of a sweep. Queries are what rows are multiplied with, [samples, J, row].
  struct Wanted {
    const Real* query;    // V, or W^T V; null: the logits are the prior
    const Real* d_query;  // ds, or W^T ds; null in the forward
    bool uniform;         // no logits at all: every coupling coefficient is 1, to be scaled by who asked
    bool sum_c, sum_db;   // whether sum_i c u and sum_i db u are wanted
  };

  // Sums [samples, J, row] over chunks of input capsules; `cache` [chunks, samples, L, capsule_size], if any, keeps the
  // rows, and holds them already unless `fresh`.
  void sweep(int64_t b0, int64_t samples, int64_t chunk0, int64_t chunk1, const Wanted& wanted, Real* cache, bool fresh,
             Real* c_sum, Real* db_sum) const {
    const int64_t chunk_size = samples * L * capsule_size;
    const typename Base::Buffers buffers(*this, samples);
    Scratch<Real> local(cache || in_place ? 1 : chunk_size, 1);
    Scratch<vec> c(samples * z.J, 3), dc(wanted.d_query ? samples * z.J : 1, 5);
    Scratch<typename Base::Rows> u(samples);
    if (c_sum) std::memset(c_sum, 0, samples * J_row * sizeof(Real));
    if (db_sum) std::memset(db_sum, 0, samples * J_row * sizeof(Real));
    if (wanted.uniform)
      for (int64_t n = 0; n < samples * z.J; ++n) c[n] = SIMD::splat(1);
    const int64_t J_sums = wanted.uniform && one_row() ? 1 : z.J;  // all output capsules have the same sum
    for (int64_t chunk = chunk0; chunk < chunk1; ++chunk) {
      Real* filled = cache ? cache + chunk * chunk_size : local.data;
      if (!in_place && (!cache || fresh)) fill(b0, samples, chunk, filled, buffers);
      for (int64_t b = 0; b < samples; ++b) {
        u[b] = rows_of(b0 + b, chunk, filled + b * L * capsule_size);
        if (wanted.uniform) continue;
        load_prior(b0 + b, chunk, c + b * z.J);
        if (wanted.query) dots(u[b], wanted.query + b * J_row, c + b * z.J);
        for (int64_t j = 0; wanted.d_query && j < z.J; ++j) dc[b * z.J + j] = vec{};
        if (wanted.d_query) dots(u[b], wanted.d_query + b * J_row, dc + b * z.J);
      }
      for (int64_t b = 0; b < samples && !wanted.uniform; ++b) {  // side by side, as each alone mostly waits for itself
        SIMD::template softmax<1>(c + b * z.J, z.J, in.leaky);
        if (wanted.d_query) SIMD::template softmax_backward<1>(c + b * z.J, dc + b * z.J, z.J);
      }
      for (int64_t b = 0; b < samples; ++b) {
        if (c_sum) add_routed(u[b], count(chunk), J_sums, c + b * z.J, c_sum + b * J_row);
        if (db_sum) add_routed(u[b], count(chunk), J_sums, dc + b * z.J, db_sum + b * J_row);
      }
    }
    if (J_sums < z.J)
      for (int64_t b = 0; b < samples; ++b)
        for (int64_t n = row; n < J_row; ++n) c_sum[b * J_row + n] = c_sum[b * J_row + n - row];
  }

  // Some samples from b0 on, in slices of the input capsules: the rows that are kept, and the sums of the slices.
  struct Band {
    Band(const SingleForward& of, int64_t most_samples, int64_t slices, bool backward, Parallel parallel)
        : of(of),
          slices(slices),
          parallel(parallel),
          keeps_rows(!of.in_place && most_samples * of.cache_bytes() <= (slices > 1 ? kCacheBytes : kLocalBytes)),
          cache(keeps_rows ? most_samples * of.chunks * L * of.capsule_size : 1, 15),
          partial((1 + backward) * slices * most_samples * of.J_row) {}
    void start(int64_t b0_, int64_t samples_) {
      b0 = b0_;
      samples = samples_;
      fresh = true;
    }
    const SingleForward& of;
    const int64_t slices;
    const Parallel parallel;
    const bool keeps_rows;
    int64_t b0 = 0, samples = 0;
    bool fresh = true;
    Scratch<Real> cache;    // [chunks, samples, L, capsule_size]
    Scratch<Real> partial;  // [1 or 2, slices, samples, J, row]
    Real* kept() const { return keeps_rows ? cache.data : nullptr; }

    // One sweep; done(sum_i c u, sum_i db u) gets the sums, [samples, J, row].
    template <class Done>
    void run(const Wanted& wanted, const Done& done) {
      const int64_t size = samples * of.J_row;
      Real* const sums[] = {wanted.sum_c ? partial.data : nullptr, wanted.sum_db ? partial + slices * size : nullptr};
      parallel_for(parallel, slices, [&](int64_t s) {
        of.sweep(b0, samples, of.chunks * s / slices, of.chunks * (s + 1) / slices, wanted, kept(), fresh,
                 sums[0] ? sums[0] + s * size : nullptr, sums[1] ? sums[1] + s * size : nullptr);
      });
      fresh = false;
      for (Real* sum : sums)
        for (int64_t s = 1; sum && s < slices; ++s)
          for (int64_t r = 0; r < size; ++r) sum[r] += sum[s * size + r];
      done(sums[0], sums[1]);
    }
  };
  int64_t cache_bytes() const { return chunks * L * capsule_size * int64_t(sizeof(Real)); }  // of one sample

  // body(band, task) for all samples: many of them side by side, each by one thread, or a few at a time in slices.
  template <class F>
  void for_samples(bool side_by_side, bool backward, Parallel parallel, const F& body) const {
    if (side_by_side) {
      const int64_t tasks = least(z.B, kTasks);
      parallel_for(parallel, tasks, [&](int64_t task) {
        Band band(*this, kBandSamples, 1, backward, serial);
        const int64_t end = z.B * (task + 1) / tasks;
        for (int64_t b = z.B * task / tasks; b < end; b += kBandSamples) {
          band.start(b, least(kBandSamples, end - b));
          body(band, task);
        }
      });
      return;
    }
    // As many as can be kept, or else as many as fit beside each other for one chunk, and their sums.
    const int64_t kept = kCacheBytes / most(1, cache_bytes()),
                  local = kLocalBytes / int64_t(L * capsule_size * sizeof(Real));
    const int64_t slices = most(1, least(chunks, kSlices)),
                  summed = kSumsBytes / int64_t(2 * slices * J_row * sizeof(Real));
    const int64_t together = most(1, least(least(z.B, summed), in_place ? z.B : kept ? kept : local));
    Band band(*this, together, slices, backward, parallel);
    for (int64_t b = 0; b < z.B; b += together) {
      band.start(b, least(together, z.B - b));
      body(band, 0);
    }
  }

  Real uniform_coupling() const { return Real(1) / (z.J + in.leaky); }

  void forward(void* out, Real* sums, Parallel parallel) const {
    for_samples(z.B >= kManySamples, false, parallel, [&](Band& band, int64_t) {
      const int64_t samples = band.samples, JD = z.J * z.D_out;
      Scratch<Real> V(samples * J_out), y(routed == Routed::poses ? samples * J_row : 1), s(samples * J_out);
      for (int64_t t = 0; t < z.T; ++t) {
        const bool uniform = t == 0 && !in.prior;
        band.run({t ? (routed == Routed::poses ? y.data : V.data) : nullptr, nullptr, uniform, true, false},
                 [&](const Real* r, const Real*) {
                   from_sum(samples, r, s);
                   for (int64_t b = 0; b < samples; ++b) {
                     Real *sb = s + b * J_out, *Vb = V + b * J_out;
                     for (int64_t n = 0; n < J_out; ++n)
                       sb[n] = (uniform ? sb[n] * uniform_coupling() : sb[n]) + padded_bias[n];
                     trim(sb, z.J, z.D_out, Stored::real, sums, (t * z.B + band.b0 + b) * JD);
                     squash(sb, sb);
                     if (t == z.T - 1) trim(sb, z.J, z.D_out, in.stored, out, (band.b0 + b) * JD);
                     for (int64_t n = 0; n < J_out; ++n) Vb[n] = t ? Vb[n] + sb[n] : sb[n];
                   }
                   if (routed == Routed::poses && t < z.T - 1) to_query(samples, V, y);
                 });
      }
    });
  }
};

}  // namespace FASTCAPS_ISA
}  // namespace fastcaps
