// CUDA for the host, just enough to run the kernels of csrc/ without a GPU: every thread of a block is a fiber, what a
// warp does together (shuffles, matrix instructions) and __syncthreads are meetings that fibers wait at. Blocks run one
// after the other. Fibers run until they have to wait, in ascending or (emulated::backwards) descending order, so that a
// missing barrier shows in one of the two. Shared memory is full of NaN when a block starts, with canaries at its end.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
struct uint2 {
  uint32_t x, y;
};
struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx, blockDim;
using cudaStream_t = void*;

namespace emulated {

inline void require(bool ok, const char* what) {
  if (ok) return;
  std::fprintf(stderr, "emulated CUDA: %s (block %u, thread %u)\n", what, blockIdx.x, threadIdx.x);
  std::abort();
}

template <class To, class From>
To bit_cast(From from) {
  To to;
  static_assert(sizeof(to) == sizeof(from));
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline float widen_float16(uint16_t bits) {
  const int exponent = bits >> 10 & 31;
  const float fraction = bits & 1023, sign = bits & 0x8000 ? -1 : 1;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24));
}
inline uint16_t narrow_float16(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  if (x != x) return 0x7fff;
  x = std::fabs(x);
  if (x >= 65520) return sign | 0x7c00;
  if (x < std::ldexp(1.f, -14)) return sign | uint16_t(std::nearbyint(std::ldexp(x, 24)));
  const int exponent = std::ilogb(x);
  return sign | uint16_t(((exponent + 14) << 10) + int(std::nearbyint(std::ldexp(x, 10 - exponent))));
}

// ---------------------------------------------------------------------------------------------------------- fibers

constexpr int kMostThreads = 256, kStack = 128 << 10;

struct Fiber {
  ucontext_t first;
  jmp_buf here;
  bool started, done;
  int meetings[2];  // that it has been at: of its warp, of its block
  std::unique_ptr<char[]> stack{new char[kStack]};
};
struct Exchange {
  uint32_t words[6];
};

inline bool backwards = false;
inline Fiber* fibers = nullptr;
inline jmp_buf scheduler;
inline ucontext_t scheduler_context;
inline std::function<void()>* body = nullptr;
inline int64_t progress = 0;
inline int arrived[kMostThreads / 32 + 1][2];          // of each warp, and last of the block, for odd and even meetings
inline Exchange exchanges[2][kMostThreads];
inline char* shared_memory = nullptr;

inline void wait() {
  Fiber& fiber = fibers[threadIdx.x];
  const unsigned thread = threadIdx.x;
  if (!_setjmp(fiber.here)) _longjmp(scheduler, 1);
  threadIdx.x = thread;
}

// Waits until all of the warp (or of the block) have come here; says whether this meeting is an odd one.
inline int meet(bool block) {
  Fiber& fiber = fibers[threadIdx.x];
  const int parity = fiber.meetings[block]++ & 1, place = block ? kMostThreads / 32 : threadIdx.x / 32;
  const int everybody = block ? blockDim.x : 32;
  int& count = arrived[place][parity];
  if (count >= everybody) count = 0;  // all have left the meeting before last, as all have been at the last one
  ++count, ++progress;
  while (arrived[place][parity] < everybody) wait();
  return parity;
}

inline void start_fiber() {
  (*body)();
  fibers[threadIdx.x].done = true;
  ++progress;
  _longjmp(scheduler, 1);
}

inline void launch(int64_t blocks, int threads, int64_t shared_bytes, std::function<void()> kernel) {
  require(threads <= kMostThreads && threads % 32 == 0, "threads of a block");
  require(shared_bytes <= 99 * 1024, "shared memory that not every GPU has");
  static std::unique_ptr<Fiber[]> all(new Fiber[kMostThreads]);
  constexpr int kCanaries = 64;
  std::vector<uint32_t> memory(shared_bytes / 4 + kCanaries + 4);
  fibers = all.get(), body = &kernel, blockDim.x = threads;
  shared_memory = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.data()) + 15) / 16 * 16);
  for (int64_t block = 0; block < blocks; ++block) {
    blockIdx.x = unsigned(block);
    std::fill(memory.begin(), memory.end(), 0xffffffff);
    std::memset(arrived, 0, sizeof(arrived));
    for (int n = 0; n < threads; ++n) {
      Fiber& fiber = fibers[n];
      fiber.started = fiber.done = false, fiber.meetings[0] = fiber.meetings[1] = 0;
      getcontext(&fiber.first);
      fiber.first.uc_stack.ss_sp = fiber.stack.get(), fiber.first.uc_stack.ss_size = kStack;
      fiber.first.uc_link = nullptr;
      makecontext(&fiber.first, start_fiber, 0);
    }
    static int left, turn;  // not on the stack: setjmp may forget them there
    static int64_t before;
    left = threads;
    while (left > 0) {
      before = progress;
      for (turn = 0; turn < threads; ++turn) {
        const int n = backwards ? threads - 1 - turn : turn;
        Fiber& fiber = fibers[n];
        if (fiber.done) continue;
        threadIdx.x = n;
        if (!_setjmp(scheduler)) {
          if (fiber.started) _longjmp(fiber.here, 1);
          fiber.started = true;
          setcontext(&fiber.first);
        }
        if (fibers[threadIdx.x].done) --left;
      }
      require(progress != before, "threads wait for each other forever");
    }
    const uint32_t* canary = reinterpret_cast<const uint32_t*>(shared_memory + shared_bytes);
    for (int n = 0; n < kCanaries; ++n) require(canary[n] == 0xffffffff, "a write past the end of shared memory");
  }
}

// Everybody's words, after all have given theirs.
inline const Exchange* exchange(const Exchange& mine) {
  const int parity = fibers[threadIdx.x].meetings[0] & 1;
  exchanges[parity][threadIdx.x] = mine;
  meet(false);
  return exchanges[parity] + threadIdx.x / 32 * 32;
}

// What the tensor cores do, as far as it is known: operands cut to tf32, exact products, a sum that is cut off.
inline void mma(float* c, const float (&a)[4], const float (&b)[2]) {
  Exchange mine;
  for (int n = 0; n < 4; ++n) mine.words[n] = bit_cast<uint32_t>(a[n]) & 0xffffe000;
  for (int n = 0; n < 2; ++n) mine.words[4 + n] = bit_cast<uint32_t>(b[n]) & 0xffffe000;
  const Exchange* all = exchange(mine);
  const int lane = threadIdx.x % 32;
  for (int r = 0; r < 4; ++r) {
    const int row = lane / 4 + 8 * (r / 2), column = 2 * (lane % 4) + r % 2;
    double sum = c[r];
    for (int k = 0; k < 8; ++k) {  // a: row r, slots t and t + 4; b: the same slots of a column
      const float left = bit_cast<float>(all[row % 8 * 4 + k % 4].words[row / 8 + 2 * (k / 4)]);
      const float right = bit_cast<float>(all[column * 4 + k % 4].words[4 + k / 4]);
      sum += double(left) * double(right);
    }
    const float rounded = float(sum);
    c[r] = std::isfinite(rounded) && std::fabs(double(rounded)) > std::fabs(sum) ? std::nextafter(rounded, 0.f) : rounded;
  }
}

}  // namespace emulated

inline void __syncthreads() { emulated::meet(true); }
inline void __syncwarp() { emulated::meet(false); }
template <class T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  emulated::Exchange mine{};
  std::memcpy(mine.words, &x, sizeof(x));
  const emulated::Exchange* all = emulated::exchange(mine);
  std::memcpy(&x, all[(threadIdx.x % 32) ^ mask].words, sizeof(x));
  return x;
}
