// Schemas of the native ops and the thin layer between PyTorch's stable ABI and the kernels.
#include <Python.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "cpu/entry_points.h"
#include "routing.h"
#include "team.h"
#ifdef FASTCAPS_WITH_CUDA
#include "cuda/entry_points.h"

// In libtorch_cuda; null beside a PyTorch that has only a CPU, which never calls a CUDA op.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

void require(bool ok, const char* message) { STD_TORCH_CHECK(ok, "fastcaps::native_dynamic_routing: ", message); }

enum class Capability { baseline, avx2, avx512, avx512bf16 };

// What the processor can do, or less where PyTorch's own ATEN_CPU_CAPABILITY says so.
Capability capability() {
  static const Capability chosen = [] {
    Capability best = Capability::baseline;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
      best = Capability::avx2;
    if (best == Capability::avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
      best = Capability::avx512;
#if !defined(__clang__)  // it has another pragma for the instruction set of a file
    if (best == Capability::avx512 && __builtin_cpu_supports("avx512bf16")) best = Capability::avx512bf16;
#endif
    if (const char* wanted = std::getenv("ATEN_CPU_CAPABILITY")) {
      if (!std::strcmp(wanted, "default")) best = Capability::baseline;
      if (!std::strcmp(wanted, "avx2")) best = std::min(best, Capability::avx2);
      if (!std::strcmp(wanted, "avx512")) best = std::min(best, Capability::avx512);
    }
#endif
    return best;
  }();
  return chosen;
}

template <class Real>
struct EntryPoints {
  void (*forward)(const fastcaps::Routing<Real>&, void* out, Real* sums, fastcaps::Parallel);
  void (*backward)(const fastcaps::Routing<Real>&, const fastcaps::Gradients<Real>&, fastcaps::Parallel);
};

template <class Real>
EntryPoints<Real> entry_points(const fastcaps::Routing<Real>& in) {
#if defined(__x86_64__)
#if !defined(__clang__)
  if constexpr (std::is_same_v<Real, float>)
    if (capability() == Capability::avx512bf16 && in.stored == fastcaps::Stored::bfloat16)
      return {fastcaps::avx512bf16::forward, fastcaps::avx512bf16::backward};
#endif
  // Samples that leave half of the wider lanes empty take as long in the narrower ones, or less: eight samples of a
  // tiny layer 35 us instead of 41 with one thread.
  constexpr int64_t kNarrowBytes = 32;
  if (capability() >= Capability::avx512 &&
      (in.size.B * int64_t(sizeof(Real)) > kNarrowBytes || fastcaps::avx512::sample_by_sample(in)))
    return {fastcaps::avx512::forward, fastcaps::avx512::backward};
  if (capability() >= Capability::avx2) return {fastcaps::avx2::forward, fastcaps::avx2::backward};
#endif
  return {fastcaps::baseline::forward, fastcaps::baseline::backward};
}

// Of the votes of one sweep.
int64_t products(const fastcaps::Sizes& z) { return z.B * z.I * z.J * z.D_out * std::max<int64_t>(z.D_in, 1); }

// PyTorch's own error of an allocation that fails does not pass the stable ABI. The bytes that the call had asked for
// until then do: fastcaps/routing/dynamic/ops.py asks PyTorch for all of them once more, which raises that error.
thread_local int64_t asked_bytes = 0, missing_bytes = 0;

[[noreturn]] void raise(const fastcaps::OutOfMemory& memory, bool cuda) {
  missing_bytes = asked_bytes + memory.bytes;
  const char* why =
      cuda ? "CUDA out of memory. Or an earlier kernel failed" : "DefaultCPUAllocator: can't allocate memory";
  throw std::runtime_error("fastcaps::native_dynamic_routing: could not allocate " + std::to_string(memory.bytes) +
                           " bytes: " + why);
}

// make() of a tensor that takes so many bytes.
template <class Make>
Tensor allocate(int64_t bytes, const Make& make) {
  try {
    Tensor made = make();
    asked_bytes += bytes;
    return made;
  } catch (const std::exception&) {
    throw fastcaps::OutOfMemory{bytes};
  }
}
Tensor allocated(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  int64_t bytes = dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : dtype == ScalarType::Byte ? 1 : 2;
  for (const int64_t size : sizes) bytes *= size;
  return allocate(bytes, [&] { return torch::stable::new_empty(like, sizes, dtype); });
}
Tensor allocated_like(const Tensor& tensor) {
  return allocate(tensor.numel() * tensor.element_size(), [&] { return torch::stable::empty_like(tensor); });
}
Tensor as_contiguous(const Tensor& tensor) {
  if (tensor.is_contiguous()) return tensor;
  return allocate(tensor.numel() * tensor.element_size(), [&] { return torch::stable::contiguous(tensor); });
}

// The inputs, contiguous and checked: a wrong call of an op must raise, not read past a tensor's end.
struct Inputs {
  Tensor poses;
  OptionalTensor weight, prior, bias, mask;
  ScalarType dtype, computed;  // of poses and weight; of everything else
  fastcaps::Sizes size{};

  Inputs(const Tensor& poses_, const OptionalTensor& weight_, const OptionalTensor& prior_, const OptionalTensor& bias_,
         const OptionalTensor& mask_, int64_t num_iterations)
      : poses(as_contiguous(poses_)),
        weight(weight_),
        prior(prior_),
        bias(bias_),
        mask(mask_),
        dtype(poses_.scalar_type()),
        computed(dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float) {
    require(dtype == computed || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
            "poses must be float64, float32, bfloat16 or float16");
    require(num_iterations >= 1, "num_iterations must be at least 1");
    require(poses.dim() == (weight ? 3 : 4), "poses must be [B, I, D_in], or votes [B, I, J, D_out] without a weight");
    require(!weight || weight->dim() == 4, "weight must be [I or 1, J or 1, D_out, D_in]");
    require(!prior || prior->dim() == 2 || prior->dim() == 3, "prior must be [I, J] or [B, I, J]");
    require(!bias || bias->dim() == 2, "bias must be [J, D_out]");
    const int64_t J_votes = weight ? weight->size(1) : poses.size(2);
    size = {poses.size(0), poses.size(1), J_votes, weight ? poses.size(2) : 0, weight ? weight->size(2) : poses.size(3),
            num_iterations};
    require(J_votes > 0 && size.D_out > 0 && (!weight || size.D_in > 0), "J, D_out and D_in must be at least 1");
    if (prior) size.J = std::max(size.J, prior->size(prior->dim() - 1));
    if (bias) size.J = std::max(size.J, bias->size(0));
    require(J_votes == size.J || J_votes == 1, "weight (or votes), prior and bias disagree in J");
    if (weight)
      require((weight->size(0) == size.I || weight->size(0) == 1) && weight->size(3) == size.D_in,
              "weight does not fit poses");
    if (prior) {
      const int64_t first = prior->dim() - 2;
      require(
          prior->size(first) == size.I && prior->size(first + 1) == size.J && (first == 0 || prior->size(0) == size.B),
          "prior must be [I, J] or [B, I, J]");
    }
    if (bias) require(bias->size(0) == size.J && bias->size(1) == size.D_out, "bias must be [J, D_out]");
    if (mask) {
      require(mask->dim() == 2 && mask->size(0) == size.B && mask->size(1) == size.I, "mask must be [B, I]");
      require(mask->scalar_type() == ScalarType::Bool, "mask must be bool");
      mask = as_contiguous(*mask);
    }
    require(!weight || weight->scalar_type() == dtype, "weight must have the dtype of poses");
    if (mask) require_same_device(*mask);
    for (OptionalTensor* tensor : {&weight, &prior, &bias}) {
      if (!*tensor) continue;
      require_same_device(**tensor);
      require(tensor == &weight || (*tensor)->scalar_type() == computed,
              "prior and bias must have the dtype of poses, or float32 beside half types");
      *tensor = as_contiguous(**tensor);
    }
  }

  void require_same_device(const Tensor& tensor) const {
    require(tensor.is_cuda() == poses.is_cuda() && tensor.get_device_index() == poses.get_device_index(),
            "all tensors must be on the device of poses");
  }

  template <class Real>
  fastcaps::Routing<Real> routing(bool leaky, bool detach, double eps) const {
    fastcaps::Routing<Real> in{};
    in.size = size;
    in.stored = dtype == ScalarType::BFloat16 ? fastcaps::Stored::bfloat16
                : dtype == ScalarType::Half   ? fastcaps::Stored::float16
                                              : fastcaps::Stored::real;
    in.poses = poses.const_data_ptr();
    const int64_t matrix = size.D_out * (weight ? size.D_in : 1);
    in.stride_j = (weight ? weight->size(1) : poses.size(2)) == 1 ? 0 : matrix;
    if (weight) {
      in.weight = weight->const_data_ptr();
      in.stride_i = weight->size(0) == 1 && size.I != 1 ? 0 : weight->size(1) * matrix;
    }
    if (prior) {
      in.prior = prior->const_data_ptr<Real>();
      in.prior_stride_b = prior->dim() == 3 ? size.I * size.J : 0;
    }
    if (bias) in.bias = bias->const_data_ptr<Real>();
    if (mask) in.mask = mask->const_data_ptr<bool>();
    in.leaky = leaky;
    in.detach = detach;
    in.eps = static_cast<Real>(eps);
    return in;
  }
};

// From 32 MB on an allocation of the host is always new memory, whose page faults, one for 4 KB, take a tenth of a
// training step: 95 -> 84 ms with large pages.
Tensor in_large_pages(Tensor tensor) {
#ifdef MADV_HUGEPAGE
  if (tensor.is_cuda()) return tensor;
  constexpr uintptr_t kPage = 4 << 10, kNewMemory = 32 << 20;
  const uintptr_t begin = ((uintptr_t)tensor.mutable_data_ptr() + kPage - 1) / kPage * kPage;
  const uintptr_t end = ((uintptr_t)tensor.mutable_data_ptr() + tensor.numel() * tensor.element_size()) / kPage * kPage;
  if (end > begin + kNewMemory) madvise((void*)begin, end - begin, MADV_HUGEPAGE);  // advice: it may fail
#endif
  return tensor;
}

#ifdef FASTCAPS_WITH_CUDA
// The device of a tensor made the current one, its current stream, and scratch memory there.
struct OnDevice {
  explicit OnDevice(const Tensor& like) : device(like.get_device_index()), guard(device) {
    require(aoti_torch_get_current_cuda_stream, "this PyTorch has no CUDA");
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  }
  static Tensor scratch(const Tensor& like, int64_t bytes) { return allocated(like, {bytes}, ScalarType::Byte); }
  int32_t device;
  torch::stable::accelerator::DeviceGuard guard;
  void* stream = nullptr;
};
#endif

template <class Real>
void run_forward(const Inputs& inputs, bool leaky, double eps, bool allow_tf32, Tensor& out, Tensor& sums) {
  const fastcaps::Routing<Real> in = inputs.routing<Real>(leaky, false, eps);
#ifdef FASTCAPS_WITH_CUDA
  if (out.is_cuda()) {
    const OnDevice on(out);
    Tensor scratch = OnDevice::scratch(out, fastcaps::cuda::forward_scratch(in));
    return fastcaps::cuda::forward(in, allow_tf32, out.mutable_data_ptr(), sums.mutable_data_ptr<Real>(),
                                   scratch.mutable_data_ptr(), on.stream);
  }
#endif
  void* const to = out.mutable_data_ptr();
  Real* const kept = sums.mutable_data_ptr<Real>();
  fastcaps::Team::run(products(in.size),
                      [&] { entry_points<Real>(in).forward(in, to, kept, fastcaps::Team::parallel); });
}

std::tuple<Tensor, Tensor> dynamic_routing_forward(Tensor poses, OptionalTensor weight, OptionalTensor prior,
                                                   OptionalTensor bias, OptionalTensor mask, int64_t num_iterations,
                                                   bool leaky, bool /*detach: for the derivative only*/, double eps,
                                                   bool allow_tf32) try {
  asked_bytes = 0;
  const Inputs inputs(poses, weight, prior, bias, mask, num_iterations);
  const fastcaps::Sizes& z = inputs.size;
  Tensor out = allocated(inputs.poses, {z.B, z.J, z.D_out}, inputs.dtype);
  Tensor sums = allocated(inputs.poses, {z.T, z.B, z.J, z.D_out}, inputs.computed);
  if (inputs.computed == ScalarType::Float)
    run_forward<float>(inputs, leaky, eps, allow_tf32, out, sums);
  else
    run_forward<double>(inputs, leaky, eps, allow_tf32, out, sums);
  return {out, sums};
} catch (const fastcaps::OutOfMemory& memory) {
  raise(memory, poses.is_cuda());
}

template <class Real>
void run_backward(const Inputs& inputs, const Tensor& grad, const Tensor& sums, bool leaky, bool detach, double eps,
                  bool allow_tf32, Tensor* const (&gradients)[4]) {
  const fastcaps::Routing<Real> in = inputs.routing<Real>(leaky, detach, eps);
  fastcaps::Gradients<Real> out{};
  out.grad = grad.const_data_ptr();
  out.sums = sums.const_data_ptr<Real>();
  if (gradients[0]) out.d_poses = gradients[0]->mutable_data_ptr();
  if (gradients[1]) out.d_weight = gradients[1]->mutable_data_ptr();
  if (gradients[2]) out.d_prior = gradients[2]->mutable_data_ptr<Real>();
  if (gradients[3]) out.d_bias = gradients[3]->mutable_data_ptr<Real>();
#ifdef FASTCAPS_WITH_CUDA
  if (grad.is_cuda()) {
    const OnDevice on(grad);
    Tensor scratch = OnDevice::scratch(grad, fastcaps::cuda::backward_scratch(in, out));
    return fastcaps::cuda::backward(in, allow_tf32, out, scratch.mutable_data_ptr(), on.stream);
  }
#endif
  fastcaps::Team::run(products(in.size), [&] { entry_points<Real>(in).backward(in, out, fastcaps::Team::parallel); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dynamic_routing_backward(Tensor grad, Tensor poses, OptionalTensor weight,
                                                                    OptionalTensor prior, OptionalTensor bias,
                                                                    OptionalTensor mask, Tensor sums, bool leaky,
                                                                    bool detach, double eps, bool need_poses,
                                                                    bool need_weight, bool need_prior, bool need_bias,
                                                                    bool allow_tf32) try {
  asked_bytes = 0;
  const Inputs inputs(poses, weight, prior, bias, mask, sums.size(0));
  const fastcaps::Sizes& z = inputs.size;
  require(grad.dim() == 3 && grad.size(0) == z.B && grad.size(1) == z.J && grad.size(2) == z.D_out,
          "grad must be [B, J, D_out]");
  require(sums.dim() == 4 && sums.size(1) == z.B && sums.size(2) == z.J && sums.size(3) == z.D_out,
          "sums must be [T, B, J, D_out]");
  require(grad.scalar_type() == inputs.dtype, "grad must have the dtype of poses");
  require(sums.scalar_type() == inputs.computed, "sums must have the dtype of poses, or float32 beside half types");
  inputs.require_same_device(grad), inputs.require_same_device(sums);
  const Tensor incoming = as_contiguous(grad), saved = as_contiguous(sums);
  const OptionalTensor sources[] = {inputs.poses, inputs.weight, inputs.prior, inputs.bias};
  const bool needed[] = {need_poses, need_weight, need_prior, need_bias};
  std::optional<Tensor> results[4];
  Tensor* gradients[4];
  for (int n = 0; n < 4; ++n) {
    const bool wanted = needed[n] && sources[n];
    results[n] = wanted ? in_large_pages(allocated_like(*sources[n])) : allocated(inputs.poses, {0}, inputs.dtype);
    gradients[n] = wanted ? &*results[n] : nullptr;
  }
  if (inputs.computed == ScalarType::Float)
    run_backward<float>(inputs, incoming, saved, leaky, detach, eps, allow_tf32, gradients);
  else
    run_backward<double>(inputs, incoming, saved, leaky, detach, eps, allow_tf32, gradients);
  return {*results[0], *results[1], *results[2], *results[3]};
} catch (const fastcaps::OutOfMemory& memory) {
  raise(memory, poses.is_cuda());
}

}  // namespace

// A weight of None says that `poses` are the votes [B, I, J or 1, D_out].
STABLE_TORCH_LIBRARY(fastcaps, m) {
  m.def(
      "native_dynamic_routing_forward(Tensor poses, Tensor? weight, Tensor? prior, Tensor? bias, Tensor? mask, "
      "int num_iterations, bool leaky, bool detach, float eps, bool allow_tf32=False) -> (Tensor out, Tensor sums)");
  m.def(
      "native_dynamic_routing_backward(Tensor grad, Tensor poses, Tensor? weight, Tensor? prior, Tensor? bias, "
      "Tensor? mask, Tensor sums, bool leaky, bool detach, float eps, bool need_poses, bool need_weight, "
      "bool need_prior, bool need_bias, bool allow_tf32=False) -> (Tensor d_poses, Tensor d_weight, Tensor d_prior, "
      "Tensor d_bias)");
}

STABLE_TORCH_LIBRARY_IMPL(fastcaps, CPU, m) {
  m.impl("native_dynamic_routing_forward", TORCH_BOX(&dynamic_routing_forward));
  m.impl("native_dynamic_routing_backward", TORCH_BOX(&dynamic_routing_backward));
}

#ifdef FASTCAPS_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastcaps, CUDA, m) {
  m.impl("native_dynamic_routing_forward", TORCH_BOX(&dynamic_routing_forward));
  m.impl("native_dynamic_routing_backward", TORCH_BOX(&dynamic_routing_backward));
}
#endif

// Why the CUDA kernels cannot run on a device, or None.
static PyObject* why_no_cuda(PyObject*, PyObject* device) {
#ifdef FASTCAPS_WITH_CUDA
  return Py_BuildValue("z", fastcaps::cuda::why_unavailable(int(PyLong_AsLong(device))));
#else
  (void)device;
  return Py_BuildValue("s", "it was built without CUDA");
#endif
}

// The bytes of an op that this thread called and that could not allocate them, or 0; once.
static PyObject* bytes_not_allocated(PyObject*, PyObject*) {
  return PyLong_FromLongLong(std::exchange(missing_bytes, 0));
}

// Importing fastcaps._C runs the registrations above; the module itself says how it was built and where it can run.
static PyMethodDef methods[] = {{"why_no_cuda", why_no_cuda, METH_O, nullptr},
                                {"bytes_not_allocated", bytes_not_allocated, METH_NOARGS, nullptr},
                                {nullptr, nullptr, 0, nullptr}};
static PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", FASTCAPS_BUILD, -1, methods, nullptr, nullptr, nullptr, nullptr};
PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
