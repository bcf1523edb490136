// Tasks of the CPU kernels: on the caller's threads, or one after the other.
#pragma once

#include <cstdint>

#include "cpu/entry_points.h"

namespace fastcaps {
namespace FASTCAPS_ISA {

// task(0) .. task(n - 1), each once, in any order.
template <class Task>
void parallel_for(Parallel parallel, int64_t n, const Task& task) {
  if (n <= 0) return;
  parallel(n, (void*)&task, [](void* context, int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) (*(const Task*)context)(n);
  });
}

// A Parallel that stays on the calling thread.
inline void serial(int64_t n, void* context, Body body) { body(context, 0, n); }

}  // namespace FASTCAPS_ISA
}  // namespace fastcaps
