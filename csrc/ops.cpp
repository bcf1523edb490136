// Schemas of the native ops and the thin layer between PyTorch's stable ABI and the kernels.
#include <Python.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "dynamic_routing_cpu.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void require(bool ok, const char* message) { STD_TORCH_CHECK(ok, "fastcaps::native_dynamic_routing_forward: ", message); }

template <class Real>
void launch(const Tensor& poses, const std::optional<Tensor>& weight, const std::optional<Tensor>& prior,
            const std::optional<Tensor>& bias, const fastcaps::Sizes& z, bool leaky, double eps, Tensor& out, Tensor& sums) {
  fastcaps::Routing<Real> in{};
  in.poses = poses.const_data_ptr<Real>();
  in.leaky = leaky;
  in.eps = static_cast<Real>(eps);
  if (weight) {
    in.weight = weight->const_data_ptr<Real>();
    in.stride_j = weight->size(1) == 1 ? 0 : z.D_out * z.D_in;
    in.stride_i = weight->size(0) == 1 ? 0 : weight->size(1) * z.D_out * z.D_in;
  } else {
    in.stride_j = poses.size(2) == 1 ? 0 : z.D_out;
  }
  if (prior) {
    in.prior = prior->const_data_ptr<Real>();
    in.prior_stride_b = prior->dim() == 3 ? z.I * z.J : 0;
  }
  if (bias) in.bias = bias->const_data_ptr<Real>();
  fastcaps::dynamic_routing_forward<Real>(in, z, out.mutable_data_ptr<Real>(), sums.mutable_data_ptr<Real>(),
                                          [](int64_t n, const auto& body) { torch::stable::parallel_for(0, n, 1, body); });
}

// Sizes and types are checked here too: a wrong call of the op must raise, not read past a tensor's end.
std::tuple<Tensor, Tensor> dynamic_routing_forward(Tensor poses, std::optional<Tensor> weight, std::optional<Tensor> prior,
                                                   std::optional<Tensor> bias, int64_t num_iterations, bool leaky,
                                                   bool /*detach: for the derivative only*/, double eps) {
  const ScalarType dtype = poses.scalar_type();
  require(dtype == ScalarType::Float || dtype == ScalarType::Double, "poses must be float32 or float64");
  require(num_iterations >= 1, "num_iterations must be at least 1");
  require(poses.dim() == (weight ? 3 : 4), "poses must be [B, I, D_in], or votes [B, I, J, D_out] without a weight");
  require(!weight || weight->dim() == 4, "weight must be [I or 1, J or 1, D_out, D_in]");
  require(!prior || prior->dim() == 2 || prior->dim() == 3, "prior must be [I, J] or [B, I, J]");
  require(!bias || bias->dim() == 2, "bias must be [J, D_out]");

  fastcaps::Sizes z{};
  z.B = poses.size(0);
  z.I = poses.size(1);
  z.T = num_iterations;
  z.D_in = weight ? poses.size(2) : 0;
  z.D_out = weight ? weight->size(2) : poses.size(3);
  const int64_t J_votes = weight ? weight->size(1) : poses.size(2);
  z.J = J_votes;
  if (prior) z.J = std::max(z.J, prior->size(prior->dim() - 1));
  if (bias) z.J = std::max(z.J, bias->size(0));
  require(J_votes == z.J || J_votes == 1, "weight (or votes), prior and bias disagree in J");
  if (weight) require((weight->size(0) == z.I || weight->size(0) == 1) && weight->size(3) == z.D_in, "weight does not fit poses");
  if (prior) {
    const int64_t first = prior->dim() - 2;
    require(prior->size(first) == z.I && prior->size(first + 1) == z.J && (first == 0 || prior->size(0) == z.B),
            "prior must be [I, J] or [B, I, J]");
  }
  if (bias) require(bias->size(0) == z.J && bias->size(1) == z.D_out, "bias must be [J, D_out]");
  for (std::optional<Tensor>* tensor : {&weight, &prior, &bias}) {
    if (!*tensor) continue;
    require((*tensor)->scalar_type() == dtype, "all tensors must have one dtype");
    *tensor = torch::stable::contiguous(**tensor);
  }
  poses = torch::stable::contiguous(poses);

  Tensor out = torch::stable::new_empty(poses, {z.B, z.J, z.D_out});
  Tensor sums = torch::stable::new_empty(poses, {z.T, z.B, z.J, z.D_out});
  if (dtype == ScalarType::Float)
    launch<float>(poses, weight, prior, bias, z, leaky, eps, out, sums);
  else
    launch<double>(poses, weight, prior, bias, z, leaky, eps, out, sums);
  return {out, sums};
}

}  // namespace

// A weight of None says that `poses` are the votes [B, I, J or 1, D_out].
STABLE_TORCH_LIBRARY(fastcaps, m) {
  m.def(
      "native_dynamic_routing_forward(Tensor poses, Tensor? weight, Tensor? prior, Tensor? bias, int num_iterations, "
      "bool leaky, bool detach, float eps) -> (Tensor out, Tensor sums)");
  m.def(
      "native_dynamic_routing_backward(Tensor grad, Tensor poses, Tensor? weight, Tensor? prior, Tensor? bias, "
      "Tensor sums, bool leaky, bool detach, float eps, bool need_poses, bool need_weight, bool need_prior, "
      "bool need_bias) -> (Tensor d_poses, Tensor d_weight, Tensor d_prior, Tensor d_bias)");
}

STABLE_TORCH_LIBRARY_IMPL(fastcaps, CPU, m) { m.impl("native_dynamic_routing_forward", TORCH_BOX(&dynamic_routing_forward)); }

// Importing fastcaps._C runs the registrations above; the module itself only says how it was built.
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", FASTCAPS_BUILD, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
