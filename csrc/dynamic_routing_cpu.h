// Dynamic routing on the CPU, in its simplest form: plain loops over a tile of samples, votes recomputed in every
// iteration and never stored for more than one input capsule. This header knows no torch type.
//
// Letters as everywhere in fastcaps: B samples, I input capsules, J output capsules, D_in and D_out pose sizes,
// T iterations. L samples lie side by side ("lanes"), innermost in every scratch array.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace fastcaps {

struct Sizes {
  int64_t B, I, J, D_in, D_out, T;
};

template <class Real>
struct Routing {
  const Real* poses;                       // [B, I, D_in], or the votes [B, I, J or 1, D_out] when weight is null
  const Real* weight;                      // [I or 1, J or 1, D_out, D_in], or null
  int64_t stride_i, stride_j;              // elements from one matrix (or vote) to the next; 0 where it is shared
  const Real* prior;                       // [B or 1, I, J], or null
  int64_t prior_stride_b;                  // I * J, or 0 where the prior is the same for all samples
  const Real* bias;                        // [J, D_out], or null
  bool leaky;
  Real eps;
};

// v = squash(s) for one capsule of D_out entries that lie `step` apart.
template <class Real>
void squash(const Real* s, Real* v, int64_t D_out, int64_t step, Real eps) {
  Real n2 = 0;
  for (int64_t d = 0; d < D_out; ++d) n2 += s[d * step] * s[d * step];
  const Real scale = eps > 0 ? n2 / (1 + n2) / std::sqrt(n2 + eps) : std::sqrt(n2) / (1 + n2);
  for (int64_t d = 0; d < D_out; ++d) v[d * step] = s[d * step] * scale;
}

// The samples b0 .. b0 + n - 1 (n <= L), all iterations. Missing lanes repeat the last sample and are not stored.
template <class Real, int L>
void route_tile(const Routing<Real>& in, const Sizes& z, int64_t b0, int64_t n, Real* out, Real* sums) {
  // Summing the input capsules block by block keeps the rounding error near that of a pairwise sum.
  constexpr int64_t kBlock = 32;
  const int64_t JD = z.J * z.D_out;
  std::vector<Real> x(z.D_in * L), u(JD * L), logit(z.J * L), block(JD * L), s(JD * L), v(JD * L), V(JD * L, Real(0));
  int64_t sample[L];
  for (int l = 0; l < L; ++l) sample[l] = b0 + (l < n ? l : n - 1);

  for (int64_t t = 0; t < z.T; ++t) {
    for (Real& value : s) value = 0;
    for (int64_t i0 = 0; i0 < z.I; i0 += kBlock) {
      for (Real& value : block) value = 0;
      const int64_t i1 = i0 + kBlock < z.I ? i0 + kBlock : z.I;
      for (int64_t i = i0; i < i1; ++i) {
        // Votes of input capsule i: u[j, d, l].
        if (in.weight) {
          for (int64_t k = 0; k < z.D_in; ++k)
            for (int l = 0; l < L; ++l) x[k * L + l] = in.poses[(sample[l] * z.I + i) * z.D_in + k];
          for (int64_t j = 0; j < z.J; ++j)
            for (int64_t d = 0; d < z.D_out; ++d) {
              const Real* w = in.weight + i * in.stride_i + j * in.stride_j + d * z.D_in;
              Real sum[L] = {};
              for (int64_t k = 0; k < z.D_in; ++k)
                for (int l = 0; l < L; ++l) sum[l] += w[k] * x[k * L + l];
              for (int l = 0; l < L; ++l) u[(j * z.D_out + d) * L + l] = sum[l];
            }
        } else {
          const int64_t row = in.stride_j ? JD : z.D_out;
          for (int64_t j = 0; j < z.J; ++j)
            for (int64_t d = 0; d < z.D_out; ++d)
              for (int l = 0; l < L; ++l)
                u[(j * z.D_out + d) * L + l] = in.poses[(sample[l] * z.I + i) * row + j * in.stride_j + d];
        }
        // Routing logits: prior + <u, V>. V is 0 at t = 0 and the product is left out, as an infinite vote times 0
        // would be NaN where the definition has none.
        for (int64_t j = 0; j < z.J; ++j) {
          Real sum[L] = {};
          if (t > 0)
            for (int64_t d = 0; d < z.D_out; ++d)
              for (int l = 0; l < L; ++l) sum[l] += u[(j * z.D_out + d) * L + l] * V[(j * z.D_out + d) * L + l];
          for (int l = 0; l < L; ++l)
            logit[j * L + l] = sum[l] + (in.prior ? in.prior[sample[l] * in.prior_stride_b + i * z.J + j] : Real(0));
        }
        // Coupling: softmax over the output capsules, in place.
        for (int l = 0; l < L; ++l) {
          Real top = in.leaky ? Real(0) : -std::numeric_limits<Real>::infinity();
          for (int64_t j = 0; j < z.J; ++j) top = logit[j * L + l] > top ? logit[j * L + l] : top;
          Real total = in.leaky ? std::exp(-top) : Real(0);
          for (int64_t j = 0; j < z.J; ++j) total += logit[j * L + l] = std::exp(logit[j * L + l] - top);
          for (int64_t j = 0; j < z.J; ++j) logit[j * L + l] /= total;
        }
        for (int64_t j = 0; j < z.J; ++j)
          for (int64_t d = 0; d < z.D_out; ++d)
            for (int l = 0; l < L; ++l) block[(j * z.D_out + d) * L + l] += logit[j * L + l] * u[(j * z.D_out + d) * L + l];
      }
      for (int64_t r = 0; r < JD * L; ++r) s[r] += block[r];
    }
    if (in.bias)
      for (int64_t r = 0; r < JD; ++r)
        for (int l = 0; l < L; ++l) s[r * L + l] += in.bias[r];
    for (int64_t j = 0; j < z.J; ++j)
      for (int l = 0; l < L; ++l) squash(&s[j * z.D_out * L + l], &v[j * z.D_out * L + l], z.D_out, L, in.eps);
    for (int64_t r = 0; r < JD; ++r)
      for (int l = 0; l < n; ++l) sums[(t * z.B + b0 + l) * JD + r] = s[r * L + l];
    for (int64_t r = 0; r < JD * L; ++r) V[r] += v[r];
  }
  for (int64_t r = 0; r < JD; ++r)
    for (int l = 0; l < n; ++l) out[(b0 + l) * JD + r] = v[r * L + l];
}

// out [B, J, D_out], sums [T, B, J, D_out]. `parallel(n, body)` calls body(begin, end) on parts of 0 .. n - 1; a tile
// belongs to one call and every sample's arithmetic is the same in any tile, so threads change no bit of the result.
template <class Real, class Parallel>
void dynamic_routing_forward(const Routing<Real>& in, const Sizes& z, Real* out, Real* sums, const Parallel& parallel) {
  constexpr int64_t kLanes = 8;
  if (z.B < kLanes) {  // a tile of 8 would mostly compute copies
    parallel(z.B, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) route_tile<Real, 1>(in, z, b, 1, out, sums);
    });
    return;
  }
  parallel((z.B + kLanes - 1) / kLanes, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t b0 = tile * kLanes;
      route_tile<Real, kLanes>(in, z, b0, z.B - b0 < kLanes ? z.B - b0 : kLanes, out, sums);
    }
  });
}

}  // namespace fastcaps
