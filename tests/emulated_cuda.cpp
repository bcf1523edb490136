// The CUDA kernels compiled for the host (cuda_emulation.h), behind a function that tests call on CPU tensors.
#define FASTCAPS_EMULATED
#define FASTCAPS_TILE_FORM float, false  // and the others:
#include "dynamic_routing_cuda.cu"

namespace fastcaps::cuda {
FASTCAPS_INSTANTIATE(float, true)
FASTCAPS_INSTANTIATE(bfloat16, true)
FASTCAPS_INSTANTIATE(float16, true)
}  // namespace fastcaps::cuda

using namespace fastcaps;

namespace {
template <class Real>
void run(bool backwards_pass, const int64_t* n, void* const* p, double eps) {
  Routing<Real> in{};
  in.size = {n[0], n[1], n[2], n[3], n[4], n[5]};
  in.stored = Stored(n[6]);
  in.poses = p[0], in.weight = p[1];
  in.stride_i = n[7], in.stride_j = n[8], in.prior_stride_b = n[9];
  in.prior = static_cast<const Real*>(p[2]), in.bias = static_cast<const Real*>(p[3]);
  in.mask = static_cast<const bool*>(p[4]);
  in.leaky = n[10], in.detach = n[11], in.eps = Real(eps);
  const bool allow_tf32 = n[12];
  Gradients<Real> out{p[5], static_cast<const Real*>(p[6]), p[7], p[8], static_cast<Real*>(p[9]), static_cast<Real*>(p[10])};
  const int64_t bytes = backwards_pass ? cuda::backward_scratch(in, out) : cuda::forward_scratch(in);
  std::unique_ptr<char[]> scratch(new char[bytes + 1]);
  std::memset(scratch.get(), 0xff, bytes + 1);  // NaN
  if (backwards_pass)
    cuda::backward(in, allow_tf32, out, scratch.get(), nullptr);
  else
    cuda::forward(in, allow_tf32, p[5], static_cast<Real*>(p[6]), scratch.get(), nullptr);
}
}  // namespace

// numbers: B, I, J, D_in, D_out, T, stored, stride_i, stride_j, prior_stride_b, leaky, detach, allow_tf32, descending.
// pointers: poses, weight, prior, bias, mask; then out and sums, or grad, sums and the four gradients.
extern "C" void emulated_dynamic_routing(int is_double, int is_backward, const int64_t* numbers, void* const* pointers,
                                         double eps) {
  emulated::backwards = numbers[13];
  if (is_double)
    run<double>(is_backward, numbers, pointers, eps);
  else
    run<float>(is_backward, numbers, pointers, eps);
}
