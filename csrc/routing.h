// A call of the kernels, on the CPU or on a GPU.
//
// Letters as everywhere in fastcaps: B samples, I input capsules, J output capsules, D_in and D_out pose sizes,
// T iterations.
#pragma once

#include <cstdint>

namespace fastcaps {

struct Sizes {
  int64_t B, I, J, D_in, D_out, T;
};

// How poses and weight lie in memory. Real: as the type that the kernel computes in; half types are widened when a tile
// of them is read, and rounded when a gradient is written.
enum class Stored { real, bfloat16, float16 };

template <class Real>
struct Routing {
  Sizes size;
  Stored stored;
  const void* poses;           // [B, I, D_in], or the votes [B, I, J or 1, D_out] where weight is null
  const void* weight;          // [I or 1, J or 1, D_out, D_in], or null
  int64_t stride_i, stride_j;  // entries from one matrix (or vote) to the next; 0 where one serves all
  const Real* prior;           // [I, J] or [B, I, J], or null
  int64_t prior_stride_b;      // 0 or I * J
  const Real* bias;            // [J, D_out], or null
  const bool* mask;            // [B, I], or null; false: poses (or votes), prior and the gradients of both are 0
  bool leaky, detach;
  Real eps;
};

template <class Real>
struct Gradients {
  const void* grad;  // [B, J, D_out], of the output, stored as the poses
  const Real* sums;  // [T, B, J, D_out], the weighted sums of the forward
  void* d_poses;     // these four in the shapes of the inputs, or null where not wanted; stored as the poses
  void* d_weight;    // stored as the poses
  Real* d_prior;
  Real* d_bias;
};

}  // namespace fastcaps
