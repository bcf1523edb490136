// Which kernel serves which sizes, for one instruction set; each dynamic_routing_<isa>.cpp includes this once.
//
//   one matrix for all input capsules        input capsules in the lanes, poses routed instead of votes
//   up to about ten samples of 16 lanes      input capsules in the lanes, votes kept in the cache
//   more samples                             samples in the lanes, votes computed again in every pass
#include "dynamic_routing_cpu_capsules_backward.h"

namespace fastcaps {
namespace FASTCAPS_ISA {

template <class Real>
bool capsules_in_lanes(const Routing<Real>& in) {
  // With samples in the lanes 1 to L of them take the same time; with capsules they meet at about 10 of 16, or earlier
  // where lanes are left without a capsule.
  constexpr int64_t block = Capsules<Real>::kBlock;
  const int64_t lanes = ceil_div(in.size.I, block) * block;
  return (in.weight && !in.stride_i) || 8 * in.size.B * lanes <= 5 * Kernel<Real>::L * in.size.I;
}
// In the backward a block of capsules keeps the coefficients of all samples, in all iterations, their poses and the
// gradients of their votes: so many samples fit.
template <class Real>
bool coefficients_fit(const Routing<Real>& in) {
  using C = Capsules<Real>;
  const Sizes& z = in.size;
  const int64_t coefficients = 2 * z.T * z.J * C::M * FASTCAPS_VECTOR_BYTES, poses = 2 * (z.D_in + C::L) * sizeof(Real);
  const int64_t votes = least(z.J * z.D_out * sizeof(Real), C::kNear);
  return !in.weight || !in.stride_i || z.B <= 1 || z.B * (coefficients + C::kBlock * (poses + votes)) <= (800 << 10);
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
  if (capsules_in_lanes(in)) return Capsules<Real>(in).forward(out, sums, parallel);
  with_tiles(in, [&](auto N, auto pairs) { Pass<Real, N, pairs>(in, parallel).forward(out, sums); });
}
template <class Real>
void backward(const Routing<Real>& in, const Gradients<Real>& out, Parallel parallel) {
  if (capsules_in_lanes(in) && coefficients_fit(in)) return CapsulesBackward<Real>(in, out).run(parallel);
  with_tiles(in, [&](auto N, auto pairs) { Backward<Real, N, pairs>(in, parallel).run(out); });
}
template void forward(const Routing<float>&, void*, float*, Parallel);
template void backward(const Routing<float>&, const Gradients<float>&, Parallel);
template bool capsules_in_lanes(const Routing<float>&);
#ifndef FASTCAPS_PAIRS
template void forward(const Routing<double>&, void*, double*, Parallel);
template void backward(const Routing<double>&, const Gradients<double>&, Parallel);
template bool capsules_in_lanes(const Routing<double>&);
#endif

}  // namespace FASTCAPS_ISA
}  // namespace fastcaps
