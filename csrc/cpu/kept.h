// Dynamic routing on the CPU with large matrices, whose votes take longer to compute again than to read: some samples
// at a time, their votes are computed once, kept, and routed as if they were given (cpu/single.h).
//
//   forward
//     for_bands                   a band of samples
//       votes                        W x (cpu/products.h)
//       SingleForward::forward
//   backward
//     for_bands
//       votes
//       SingleBackward::run          the gradients of the votes, in their place
//       gradients                    W^T du and du x^T (cpu/products.h)
//
// Rows of votes are padded to whole vectors; the entries that are added are 0 and stay 0.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/entry_points.h"
#include "cpu/parallel.h"
#include "cpu/products.h"
#include "cpu/scratch.h"
#include "cpu/single.h"
#include "cpu/single_backward.h"
#include "numbers.h"
#include "routing.h"

namespace fastcaps {
namespace FASTCAPS_ISA {

template <class Real>
struct KeptVotes : Products<Real> {
  using Base = Products<Real>;
  using Rows = SingleRows<Real>;
  using Base::in;
  using Base::L;
  using Base::matrices;
  using Base::rows;
  using Base::vectors;
  using Base::z;
  using typename Base::vec;
  // Of the votes that are kept: they should stay in the L3 cache, but eight samples meet each matrix together.
  static constexpr int64_t kVotesBytes = 8 << 20, kFewVotesBytes = 32 << 20, kFewSamples = 8;
  static constexpr int64_t kPosesBytes = 512 << 10;  // of the poses of an input capsule, of all samples of a band
#ifdef FASTCAPS_CHECK
  static constexpr int64_t kSamples = 5;
#else
  static constexpr int64_t kSamples = 128;  // of a band at most: sums over more of them lose digits
#endif
  static constexpr int64_t kTasks = 16, kTaskRows = 48, kTaskVectors = 8;
  const int64_t row, capsule;  // entries of the votes of a pair of capsules, and of an input capsule
  const int64_t IJ;            // entries of a prior
  const int64_t together;      // samples of a band

  explicit KeptVotes(const Routing<Real>& in)
      : Base(in), row(Rows::whole(z.D_out)), capsule(matrices * row), IJ(z.I * z.J), together(count_together()) {}

  int64_t count_together() const {
    const int64_t votes = (z.I * capsule + 4 * z.T * z.J * row) * int64_t(sizeof(Real));  // and sums, of a sample
    const int64_t fitting = most(kVotesBytes / votes, least(kFewSamples, kFewVotesBytes / votes));
    return least(least(z.B, kSamples), most(1, least(fitting, kPosesBytes / int64_t(vectors * sizeof(vec)))));
  }

  // A call that routes the votes of `samples` samples from b0 on.
  struct Band {
    int64_t b0, samples;
    Routing<Real> routing;
  };
  template <class F>
  void for_bands(Parallel parallel, const F& body) const {
    Scratch<Real> u(together * z.I * capsule), bias(in.bias ? z.J * row : 1), prior(masks_prior() ? together * IJ : 1);
    if (in.bias) Rows::pad(Stored::real, in.bias, 0, z.J, z.D_out, bias);
    for (int64_t b0 = 0; b0 < z.B; b0 += together) {
      const int64_t samples = least(together, z.B - b0);
      if (row != z.D_out)  // what is added to rows
        parallel_for(parallel, samples,
                     [&](int64_t b) { std::memset(u + b * z.I * capsule, 0, z.I * capsule * sizeof(Real)); });
      Routing<Real> routing = in;
      routing.size = {samples, z.I, z.J, 0, row, z.T};
      routing.stored = Stored::real;
      routing.poses = u;
      routing.weight = nullptr;
      routing.stride_i = 0;
      routing.stride_j = in.stride_j ? row : 0;
      if (in.prior) routing.prior = in.prior + b0 * in.prior_stride_b;
      if (masks_prior()) {
        load_prior(b0, samples, prior);
        routing.prior = prior;
        routing.prior_stride_b = IJ;
      }
      if (in.bias) routing.bias = bias;
      routing.mask = nullptr;  // poses that it leaves out are 0, and a matrix that is not finite still shows
      compute_votes(b0, samples, u, parallel);
      body(Band{b0, samples, routing}, u.data);
    }
  }
  // What the mask leaves out of a prior counts as 0, whatever it is, and has no gradient.
  bool masks_prior() const { return in.prior && in.mask; }
  bool masked(int64_t b, int64_t i) const { return in.mask && !in.mask[b * z.I + i]; }
  void load_prior(int64_t b0, int64_t samples, Real* to) const {
    for (int64_t b = b0; b < b0 + samples; ++b)
      for (int64_t i = 0; i < z.I; ++i, to += z.J) {
        const Real* from = in.prior + b * in.prior_stride_b + i * z.J;
        for (int64_t j = 0; j < z.J; ++j) to[j] = masked(b, i) ? 0 : from[j];
      }
  }
  void store_prior(const Band& band, const Real* from, Real* d_prior) const {
    if (!in.prior_stride_b && !band.b0) std::memset(d_prior, 0, IJ * sizeof(Real));
    for (int64_t b = band.b0; b < band.b0 + band.samples; ++b)
      for (int64_t i = 0; i < z.I; ++i, from += z.J) {
        Real* to = d_prior + b * in.prior_stride_b + i * z.J;
        for (int64_t j = 0; j < z.J; ++j) to[j] = (in.prior_stride_b ? 0 : to[j]) + (masked(b, i) ? 0 : from[j]);
      }
  }
  void compute_votes(int64_t b0, int64_t samples, Real* u, Parallel parallel) const {
    const int64_t parts = most(1, least(rows / kTaskRows, ceil_div(kTasks, z.I)));  // of the rows of an input capsule
    parallel_for(parallel, z.I * parts, [&](int64_t task) {
      const int64_t i = task / parts, part = task % parts;
      Scratch<vec> x(vectors * samples, 3);
      Base::load_stacks(i, b0, samples, x);
      Base::votes(i, rows * part / parts, rows * (part + 1) / parts, samples, x, u + i * capsule, z.I * capsule, row);
    });
  }

  void forward(void* out, Real* sums, Parallel parallel) const {
    const int64_t JD = z.J * z.D_out, size = together * z.J * row;
    Scratch<Real> v(size), s(z.T * size);
    for_bands(parallel, [&](const Band& band, Real*) {
      SingleForward<Real>(band.routing).forward(v, s, parallel);
      const int64_t capsules = band.samples * z.J;
      Rows::trim(v, capsules, z.D_out, in.stored, out, band.b0 * JD);
      for (int64_t t = 0; t < z.T; ++t)
        Rows::trim(s + t * capsules * row, capsules, z.D_out, Stored::real, sums, (t * z.B + band.b0) * JD);
    });
  }

  void backward(const Gradients<Real>& out, Parallel parallel) const {
    const int64_t JD = z.J * z.D_out, size = together * z.J * row, entries = z.I * in.stride_i;
    const bool whole = together >= z.B, own_prior = out.d_prior && (masks_prior() || !in.prior_stride_b);
    const bool widened = out.d_weight && !whole && in.stored != Stored::real;
    Scratch<Real> grad(size), s(z.T * size), d_bias(out.d_bias ? z.J * row : 1),
        d_prior(own_prior ? (masks_prior() ? together : 1) * IJ : 1);
    Scratch<Real> d_weight(widened ? entries : 1);
    for_bands(parallel, [&](const Band& band, Real* u) {
      const int64_t b0 = band.b0, capsules = band.samples * z.J;
      Rows::pad(in.stored, out.grad, b0 * JD, capsules, z.D_out, grad);
      for (int64_t t = 0; t < z.T; ++t)
        Rows::pad(Stored::real, out.sums, (t * z.B + b0) * JD, capsules, z.D_out, s + t * capsules * row);
      Gradients<Real> routed{grad, s, nullptr, nullptr, nullptr, out.d_bias ? d_bias.data : nullptr};
      if (out.d_poses || out.d_weight) routed.d_poses = u;
      if (out.d_prior) routed.d_prior = own_prior ? d_prior.data : out.d_prior + b0 * in.prior_stride_b;
      SingleBackward<Real>(band.routing, routed).run(parallel);
      if (own_prior && masks_prior())
        store_prior(band, d_prior, out.d_prior);
      else if (own_prior)
        for (int64_t n = 0; n < IJ; ++n) out.d_prior[n] = b0 ? out.d_prior[n] + d_prior[n] : d_prior[n];
      for (int64_t n = 0; out.d_bias && n < JD; ++n) {
        const Real d = d_bias[n / z.D_out * row + n % z.D_out];
        out.d_bias[n] = b0 ? out.d_bias[n] + d : d;
      }
      if (!out.d_poses && !out.d_weight) return;
      const typename Base::WeightGradient to{widened ? d_weight.data : out.d_weight, widened ? Stored::real : in.stored,
                                             b0 > 0};
      gradients(b0, band.samples, u, out.d_poses, to, parallel);
    });
    if (!widened) return;
    const int64_t matrix = in.stride_i;
    parallel_for(parallel, z.I,
                 [&](int64_t i) { narrow(in.stored, d_weight + i * matrix, matrix, out.d_weight, i * matrix); });
  }
  // Those of poses and matrices, of the gradients of the votes.
  void gradients(int64_t b0, int64_t samples, const Real* du, void* d_poses,
                 const typename Base::WeightGradient& d_weight, Parallel parallel) const {
    const int64_t parts = most(1, least(vectors / kTaskVectors, ceil_div(kTasks, z.I)));  // of the vectors of a row
    parallel_for(parallel, z.I * parts, [&](int64_t task) {
      const int64_t i = task / parts, v0 = vectors * (task % parts) / parts, v1 = vectors * (task % parts + 1) / parts;
      Scratch<vec> x(d_weight.to ? (v1 - v0) * samples : 1, 3), dx(d_poses ? (v1 - v0) * samples : 1, 7);
      if (d_weight.to) Base::load_stack(i, b0, samples, v0, v1, x);
      const auto run = [&](auto poses, auto weight) {
        Base::template gradients<poses, weight>(i, v0, v1, samples, x, du + i * capsule, z.I * capsule, row, dx,
                                                d_weight);
      };
      if (d_poses && d_weight.to)
        run(std::true_type{}, std::true_type{});
      else if (d_poses)
        run(std::true_type{}, std::false_type{});
      else
        run(std::false_type{}, std::true_type{});
      if (d_poses) Base::store_stack(i, b0, samples, v0, v1, dx, d_poses);
    });
  }
};

}  // namespace FASTCAPS_ISA
}  // namespace fastcaps
