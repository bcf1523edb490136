// The CPU kernels as the layer above sees them, once for each instruction set. No torch header, no standard-library
// template: a template instantiated in two of the sources that include this would be shared between them.
#pragma once

#include <cstdint>

#include "routing.h"

namespace fastcaps {

// Calls body(context, begin, end) on ranges that make up 0 .. n - 1, in any order and on any thread, and waits.
using Body = void (*)(void* context, int64_t begin, int64_t end);
using Parallel = void (*)(int64_t n, void* context, Body body);

// What a kernel throws that gets no memory.
struct OutOfMemory {
  int64_t bytes;
};

// `out` is [B, J, D_out], stored as the poses; sample_by_sample: whether samples go one at a time.
#define FASTCAPS_DECLARE(isa)                                            \
  namespace isa {                                                        \
  template <class Real>                                                  \
  void forward(const Routing<Real>&, void* out, Real* sums, Parallel);   \
  template <class Real>                                                  \
  void backward(const Routing<Real>&, const Gradients<Real>&, Parallel); \
  template <class Real>                                                  \
  bool sample_by_sample(const Routing<Real>&);                           \
  }
FASTCAPS_DECLARE(baseline)
FASTCAPS_DECLARE(avx2)
FASTCAPS_DECLARE(avx512)
FASTCAPS_DECLARE(avx512bf16)

}  // namespace fastcaps
