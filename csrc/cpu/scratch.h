// Scratch memory of the CPU kernels.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "cpu/entry_points.h"
#include "numbers.h"

namespace fastcaps {

#ifdef FASTCAPS_CHECK  // every array on the heap, where sanitizers see its end, and full of NaN
constexpr int64_t kScratchStack = 0;
#else
constexpr int64_t kScratchStack = 64 << 10;
#endif
inline thread_local int64_t scratch_used = 0;
alignas(64) inline thread_local char scratch_stack[kScratchStack + 64];

namespace FASTCAPS_ISA {

// Scratch memory, not initialised; its start is moved by `line` cache lines so that arrays that are used together
// do not fall on the same lines of a set (4 KB aliasing). Small ones come from a stack that each thread has.
template <class T>
struct Scratch {
  explicit Scratch(int64_t count, int line = 0) {
    const int64_t bytes = most(64, (count * int64_t(sizeof(T)) + 64 * line + 63) / 64 * 64);
    near = scratch_used + bytes <= kScratchStack;
    raw = near ? scratch_stack + scratch_used : (char*)std::aligned_alloc(64, bytes);
    if (!raw) throw OutOfMemory{bytes};
    if (near) scratch_used += bytes;
#ifdef FASTCAPS_CHECK
    std::memset(raw, 0xff, bytes);
#endif
    data = (T*)(raw + 64 * line);
  }
  ~Scratch() {
    if (near)
      scratch_used = raw - scratch_stack;  // scopes end in the reverse order
    else
      std::free(raw);
  }
  Scratch(const Scratch&) = delete;
  operator T*() const { return data; }
  char* raw;
  bool near;
  T* data;
};

}  // namespace FASTCAPS_ISA
}  // namespace fastcaps
