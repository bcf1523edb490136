// Which kernel serves which sizes, for one instruction set; each cpu/<isa>.cpp includes this once, with FASTCAPS_ISA
// and FASTCAPS_VECTOR_BYTES set and the compiler told what it may use.
//
//   one matrix for all input capsules        a sample at a time, poses routed instead of votes
//   votes in whole vectors, given            a sample at a time, votes read where they lie
//   up to about 12 samples of 16 lanes       a sample at a time, votes kept in the cache
//   large matrices                           votes of a band of samples computed once, and routed as if given
//   more samples                             samples in the lanes, votes computed again in every sweep
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/batch.h"
#include "cpu/batch_backward.h"
#include "cpu/entry_points.h"
#include "cpu/kept.h"
#include "cpu/matrices.h"
#include "cpu/simd.h"
#include "cpu/single.h"
#include "cpu/single_backward.h"
#include "numbers.h"
#include "routing.h"

namespace fastcaps {
namespace FASTCAPS_ISA {

// Where samples one at a time and samples in the lanes take as long, in eighths of the lanes: 12 of 16 samples with
// AVX-512, 6 of 8 with AVX2. Where rows of a matrix must be copied to fit into vectors (D_in = 12) it is 1 to 2.
constexpr int64_t kCrossingEighths = 6, kCopiedEighths = 1;
// Bytes of V and the sums of two vectors of samples, which must share 32 KB of L1 with the rest. With AVX-512 a larger
// layer takes 9.8 ms with one vector and 10.9 with two; with AVX2 two were always better.
constexpr int64_t kTwoVectorsBytes = 16 << 10;

template <class Real>
bool sample_by_sample(const Routing<Real>& in) {
  using Single = SingleForward<Real>;
  const Sizes& z = in.size;
  if (in.weight ? !in.stride_i : in.stored == Stored::real && z.D_out % Single::L == 0) return true;
  // With samples in the lanes 1 to L of them take the same time. Samples one at a time take longer where lanes are left
  // without an entry or an input capsule. The votes of a chunk must fit into the cache.
  const int64_t row = Single::whole(z.D_out), lanes = ceil_div(z.I, Single::L) * Single::L;
  const int64_t votes = Single::L * (in.stride_j ? z.J : 1) * row * int64_t(sizeof(Real));
  const int64_t eighths = in.weight && Single::padded(z.D_in) != z.D_in ? kCopiedEighths : kCrossingEighths;
  return 8 * z.B * lanes * row <= eighths * Single::L * z.I * z.D_out && votes <= Single::kCacheBytes;
}
// In the backward a chunk of input capsules keeps the votes of all samples, their gradients, poses and those of these.
constexpr int64_t kFewSamplesBytes = 4 << 20;
template <class Real>
bool votes_fit(const Routing<Real>& in) {
  using Single = SingleForward<Real>;
  const Sizes& z = in.size;
  const int64_t votes = 2 * (in.stride_j ? z.J : 1) * Single::whole(z.D_out),
                poses = 2 * Matrices<Real>::padded(most(z.D_in, Single::L));
  return !in.weight || !in.stride_i || z.B <= 1 ||
         z.B * Single::L * (votes + poses) * int64_t(sizeof(Real)) <= kFewSamplesBytes;
}

// Votes are kept where computing them T times takes longer than reading them. Computing a vote takes D_in / L vectors,
// reading it about as long as kReadForward (kReadBackward) of them, and kReadPadded for each vector of a padded row.
// In the other form samples leave lanes empty, and a matrix serves less of them.
constexpr int64_t kReadForward = 4, kReadBackward = 6, kReadPadded = 2;
template <class Real>
bool keeps_votes(const Routing<Real>& in, int64_t read) {
  using Kept = KeptVotes<Real>;
  const Sizes& z = in.size;
  if (!in.weight || !in.stride_i || !z.B || !z.I || z.D_in < Kept::L) return false;
  const Kept kept(in);
  if (kept.together < least(z.B, Kept::kFewSamples / 2)) return false;  // matrices would be read again too often
  const double lanes = double(ceil_div(z.B, Kept::L) * Kept::L), filled = z.B / lanes;
  const double vectors = (read + kReadPadded * double(kept.row) / z.D_out) * filled * filled;
  return z.D_in * (z.T - 1) >= 2 * Kept::L * vectors;
}

// f(N, kPairs): N vectors of samples share each broadcast entry of a weight as long as V and the sums of both stay in
// L1; pairs of bfloat16 are multiplied where there is an instruction for it.
template <class Real, class F>
void with_tiles(const Routing<Real>& in, const F& f) {
#ifdef FASTCAPS_PAIRS
  constexpr bool pairs = sizeof(Real) == 4;
#else
  constexpr bool pairs = false;
#endif
  const int64_t bytes = 2 * in.size.J * in.size.D_out * FASTCAPS_VECTOR_BYTES;
  const bool two = in.size.B > Simd<Real>::L && bytes <= kTwoVectorsBytes;
  const auto with_pairs = [&](auto N) {
    if constexpr (pairs)
      if (in.stored == Stored::bfloat16 && in.weight && in.size.D_in % 2 == 0 &&
          ((uintptr_t)in.poses | (uintptr_t)in.weight) % 4 == 0)
        return f(N, std::true_type{});
    f(N, std::false_type{});
  };
  if (two)
    with_pairs(std::integral_constant<int, 2>{});
  else
    with_pairs(std::integral_constant<int, 1>{});
}

// The matrix of a single input capsule may count as its own or as shared by all. As shared it is applied in every
// iteration, to poses that are routed instead of votes: less work where they are shorter and votes are not kept.
// 473, 1 -> 38, 2 -> 223 in bfloat16 takes 11 ms so and 51 ms with votes; 37, 1 -> 50, 9 -> 1 in float64 0.45 and 0.13.
template <class Real>
Routing<Real> with_single_matrix(Routing<Real> in, int64_t read) {
  const Sizes& z = in.size;
  if (in.weight && z.I == 1 && z.D_in < z.D_out && !keeps_votes(in, read)) in.stride_i = 0;
  return in;
}

template <class Real>
void forward(const Routing<Real>& given, void* out, Real* sums, Parallel parallel) {
  if (!given.size.B) return;
  const Routing<Real> in = with_single_matrix(given, kReadForward);
  if (sample_by_sample(in)) return SingleForward<Real>(in).forward(out, sums, parallel);
  if (keeps_votes(in, kReadForward)) return KeptVotes<Real>(in).forward(out, sums, parallel);
  with_tiles(in, [&](auto N, auto pairs) { BatchForward<Real, N, pairs>(in, parallel).forward(out, sums); });
}
template <class Real>
void backward(const Routing<Real>& given, const Gradients<Real>& out, Parallel parallel) {
  const Routing<Real> in = with_single_matrix(given, kReadBackward);
  if (sample_by_sample(in) && votes_fit(in)) return SingleBackward<Real>(in, out).run(parallel);
  if (keeps_votes(in, kReadBackward)) return KeptVotes<Real>(in).backward(out, parallel);
  with_tiles(in, [&](auto N, auto pairs) { BatchBackward<Real, N, pairs>(in, parallel).run(out); });
}
template void forward(const Routing<float>&, void*, float*, Parallel);
template void backward(const Routing<float>&, const Gradients<float>&, Parallel);
template bool sample_by_sample(const Routing<float>&);
#ifndef FASTCAPS_PAIRS
template void forward(const Routing<double>&, void*, double*, Parallel);
template void backward(const Routing<double>&, const Gradients<double>&, Parallel);
template bool sample_by_sample(const Routing<double>&);
#endif

}  // namespace FASTCAPS_ISA
}  // namespace fastcaps
