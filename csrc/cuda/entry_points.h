// The CUDA kernels as the layer above sees them: no torch, no CUDA header.
#pragma once

#include "routing.h"

namespace fastcaps::cuda {

// Why no kernel can run on a device, or null. The text stays valid.
const char* why_unavailable(int device);

// Bytes of scratch that forward and backward want.
template <class Real>
int64_t forward_scratch(const Routing<Real>&);
template <class Real>
int64_t backward_scratch(const Routing<Real>&, const Gradients<Real>&);

// On the current device; tensors as in routing.h, in device memory. allow_tf32: float32 products may be rounded.
// Throws std::runtime_error where a launch fails.
template <class Real>
void forward(const Routing<Real>&, bool allow_tf32, void* out, Real* sums, void* scratch, void* stream);
template <class Real>
void backward(const Routing<Real>&, bool allow_tf32, const Gradients<Real>&, void* scratch, void* stream);

}  // namespace fastcaps::cuda
