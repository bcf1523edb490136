// Which kernel serves which sizes, for one instruction set; each dynamic_routing_<isa>.cpp includes this once.
//
//   one matrix for all input capsules        a sample at a time, poses routed instead of votes
//   votes in whole vectors, given            a sample at a time, votes read where they lie
//   up to about 12 samples of 16 lanes       a sample at a time, votes kept in the cache
//   more samples                             samples in the lanes, votes computed again in every pass
#include "cpu/single_backward.h"

namespace fastcaps {
namespace FASTCAPS_ISA {

template <class Real>
bool sample_by_sample(const Routing<Real>& in) {
  using C = Capsules<Real>;
  const Sizes& z = in.size;
  if (in.weight ? !in.stride_i : in.stored == Stored::real && z.D_out % C::L == 0) return true;
  // With samples in the lanes 1 to L of them take the same time; one at a time they meet at 12 of 16, or earlier: where
  // lanes are left without an entry or an input capsule, or rows of a matrix must be copied to fit into vectors. The
  // votes of a block must fit into the cache.
  const int64_t row = C::whole(z.D_out), lanes = ceil_div(z.I, C::L) * C::L;
  const int64_t votes = C::L * (in.stride_j ? z.J : 1) * row * int64_t(sizeof(Real));
  const int64_t some = in.weight && C::padded(z.D_in) != z.D_in ? 1 : 6;  // eighths of the lanes
  return 8 * z.B * lanes * row <= some * C::L * z.I * z.D_out && votes <= C::kLocal;
}
// In the backward a block of input capsules keeps the votes of all samples, their gradients, poses and those of these.
template <class Real>
bool votes_fit(const Routing<Real>& in) {
  using C = Capsules<Real>;
  const Sizes& z = in.size;
  const int64_t votes = 2 * (in.stride_j ? z.J : 1) * C::whole(z.D_out),
                poses = 2 * Matrices<Real>::padded(most(z.D_in, C::L));
  return !in.weight || !in.stride_i || z.B <= 1 || z.B * C::L * (votes + poses) * int64_t(sizeof(Real)) <= C::kLocal;
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
  const bool two = in.size.B > Kernel<Real>::L && bytes <= (16 << 10);
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

template <class Real>
void forward(const Routing<Real>& in, void* out, Real* sums, Parallel parallel) {
  if (!in.size.B) return;
  if (sample_by_sample(in)) return Capsules<Real>(in).forward(out, sums, parallel);
  with_tiles(in, [&](auto N, auto pairs) { Pass<Real, N, pairs>(in, parallel).forward(out, sums); });
}
template <class Real>
void backward(const Routing<Real>& in, const Gradients<Real>& out, Parallel parallel) {
  if (sample_by_sample(in) && votes_fit(in)) return CapsulesBackward<Real>(in, out).run(parallel);
  with_tiles(in, [&](auto N, auto pairs) { Backward<Real, N, pairs>(in, parallel).run(out); });
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
