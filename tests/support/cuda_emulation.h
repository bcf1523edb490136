// CUDA for the host, just enough to run the kernels of csrc/ without a GPU: every thread of a block is a fiber, what a
// warp does together (shuffles, matrix instructions), __syncthreads and the barrier of a grid are meetings that fibers
// wait at. Blocks run one after the other, unless they may wait for each other. Fibers run until they have to wait, in
// ascending or (emulated::backwards) descending order, so that a missing barrier shows in one of the two. Shared memory
// is full of NaN when a block starts, with canaries at its end.
#pragma once

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif
#include <dlfcn.h>
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
#define __launch_bounds__(...)

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;
using cudaStream_t = void*;

namespace emulated {

// Memory that the address sanitizer lets nobody touch, where the program is built with it.
#ifdef __SANITIZE_ADDRESS__
constexpr int kFence = 256;
inline void fence(char* memory) { __asan_poison_memory_region(memory, kFence); }
#else
constexpr int kFence = 0;
inline void fence(char*) {}
#endif

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

constexpr int kMostThreads = 384, kStack = 128 << 10, kCanaries = 64;

enum Scope { of_warp, of_block, of_grid };

struct Exchange {
  uint32_t words[6];
};
// 16 bytes that are on their way to shared memory; from nowhere: zeros.
struct Copy {
  char* to;
  const void* from;
};
struct Arrival {  // at a barrier, when these copies are done
  void* barrier;
  std::vector<Copy> copies;
};
struct Block {
  unsigned index;
  int arrived[kMostThreads / 32 + 1][2];  // of each warp, and last of the block, for odd and even meetings
  Exchange exchanges[2][kMostThreads];
  int any[2];  // of the predicates that a meeting of the block has been given
  std::vector<Arrival> arrivals;
  std::vector<uint32_t> memory;
  char* shared_memory;
};
struct Fiber {
  ucontext_t first;
  jmp_buf here;
  Block* block;
  unsigned thread;
  bool started, done;
  int meetings[3];           // that it has been at, of each scope
  std::vector<Copy> copies;  // at whose end it has not arrived yet anywhere
  std::unique_ptr<char[]> stack{new char[kStack]};
};

inline bool backwards = false;
inline int64_t resident_blocks = 0;  // that may wait for each other in one launch
inline int64_t multiprocessors = 2;
inline int64_t launches = 0;
inline Fiber* current = nullptr;
inline jmp_buf scheduler;
inline std::function<void()> body;
inline int64_t progress = 0;
inline int arrived_of_grid[2];
inline char* shared_memory = nullptr;

// From here on `fiber` runs.
inline void enter(Fiber& fiber) {
  current = &fiber;
  threadIdx.x = fiber.thread, blockIdx.x = fiber.block->index, shared_memory = fiber.block->shared_memory;
}

// longjmp, but not the address sanitizer's, which asks the kernel about the stack before each.
inline void jump(jmp_buf& to) {
  static const auto libc = reinterpret_cast<void (*)(jmp_buf, int)>(dlsym(dlopen("libc.so.6", RTLD_LAZY), "_longjmp"));
  libc(to, 1);
}

inline void wait() {
  if (!_setjmp(current->here)) jump(scheduler);
}

// Waits until all of the scope have come here; says whether this meeting is an odd one.
inline int meet(Scope scope) {
  const int parity = current->meetings[scope]++ & 1, place = scope == of_block ? kMostThreads / 32 : threadIdx.x / 32;
  const unsigned everybody = scope == of_warp ? 32 : blockDim.x * (scope == of_grid ? gridDim.x : 1);
  int* const count = scope == of_grid ? &arrived_of_grid[parity] : &current->block->arrived[place][parity];
  if (*count >= int(everybody)) *count = 0;  // all have left the meeting before last, as all have been at the last one
  ++*count, ++progress;
  while (*count < int(everybody)) wait();
  return parity;
}

inline void start_fiber() {
  body();
  current->done = true;
  ++progress;
  jump(scheduler);
}

// Blocks first .. first + blocks - 1 at the same time.
inline void run(int64_t first, int64_t blocks, int threads, int64_t shared_bytes) {
  static std::vector<Fiber> fibers;
  static std::vector<Block> all_blocks;
  if (int64_t(fibers.size()) < blocks * threads) fibers = std::vector<Fiber>(blocks * threads);
  if (int64_t(all_blocks.size()) < blocks) all_blocks = std::vector<Block>(blocks);
  arrived_of_grid[0] = arrived_of_grid[1] = 0;
  for (int64_t n = 0; n < blocks; ++n) {
    Block& block = all_blocks[n];
    block.index = unsigned(first + n);
    std::memset(block.arrived, 0, sizeof(block.arrived));
    block.arrivals.clear();
    block.memory.assign(shared_bytes / 4 + kCanaries + 4, 0xffffffff);
    block.shared_memory = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(block.memory.data()) + 15) / 16 * 16);
  }
  for (int64_t n = 0; n < blocks * threads; ++n) {
    Fiber& fiber = fibers[n];
    fiber.block = &all_blocks[n / threads], fiber.thread = unsigned(n % threads);
    fiber.started = fiber.done = false, fiber.meetings[0] = fiber.meetings[1] = fiber.meetings[2] = 0;
    getcontext(&fiber.first);
    fiber.first.uc_stack.ss_sp = fiber.stack.get(), fiber.first.uc_stack.ss_size = kStack;
    fiber.first.uc_link = nullptr;
    makecontext(&fiber.first, start_fiber, 0);
  }
  static int64_t left, turn, before, count;  // not on the stack, where a jump may forget them
  left = count = blocks * threads;
  while (left > 0) {
    before = progress;
    for (turn = 0; turn < count; ++turn) {
      Fiber& fiber = fibers[backwards ? count - 1 - turn : turn];
      if (fiber.done) continue;
      enter(fiber);
      if (!_setjmp(scheduler)) {
        if (fiber.started) jump(fiber.here);
        fiber.started = true;
        setcontext(&fiber.first);
      }
      if (current->done) --left;
    }
    require(progress != before, "threads wait for each other forever");
  }
  for (int64_t n = 0; n < blocks * threads; ++n) require(fibers[n].copies.empty(), "copies that nobody waits for");
  for (int64_t n = 0; n < blocks; ++n) {
    require(all_blocks[n].arrivals.empty(), "copies that nobody waited for");
    const char* end = all_blocks[n].shared_memory + shared_bytes;
    for (int m = 0; m < kCanaries; ++m)
      require(reinterpret_cast<const uint32_t*>(end)[m] == 0xffffffff, "a write past the end of shared memory");
  }
}

// `cooperative`: the blocks may wait for each other.
inline void launch(int64_t blocks, int threads, int64_t shared_bytes, std::function<void()> kernel,
                   bool cooperative = false) {
  require(threads <= kMostThreads && threads % 32 == 0, "threads of a block");
  require(shared_bytes <= 99 * 1024, "shared memory that not every GPU has");
  ++launches;
  body = std::move(kernel), blockDim.x = threads, gridDim.x = unsigned(blocks);
  if (cooperative) return run(0, blocks, threads, shared_bytes);
  for (int64_t block = 0; block < blocks; ++block) run(block, 1, threads, shared_bytes);
}

// Everybody's words, after all have given theirs.
inline const Exchange* exchange(const Exchange& mine) {
  Exchange* const all = current->block->exchanges[current->meetings[of_warp] & 1];
  all[threadIdx.x] = mine;
  meet(of_warp);
  return all + threadIdx.x / 32 * 32;
}

// A barrier's words: how many arrive in a phase, how many of them have not, and the number of the phase.
struct BarrierState {
  uint16_t expected, left;
  uint32_t phase;
};
inline void start_barrier(void* at, int count) {
  *static_cast<BarrierState*>(at) = {uint16_t(count), uint16_t(count), 0};
}
inline void arrive(void* at) {
  BarrierState& barrier = *static_cast<BarrierState*>(at);
  require(barrier.expected != 0xffff, "a barrier that nobody has started");
  if (--barrier.left == 0) barrier.left = barrier.expected, ++barrier.phase;
  ++progress;
}
inline void land(const std::vector<Copy>& copies) {
  for (const Copy& copy : copies) copy.from ? std::memcpy(copy.to, copy.from, 16) : std::memset(copy.to, 0, 16);
}
// Copies are as late as they may be: they land when somebody waits for them. Until then there is NaN.
inline void copy_16(uint32_t to, const void* from) {
  require(to % 16 == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0, "a copy that is not aligned");
  std::memset(shared_memory + to, 0xff, 16);
  current->copies.push_back({shared_memory + to, from});
}
inline void arrive_after_copies(void* barrier) {
  current->block->arrivals.push_back({barrier, std::move(current->copies)});
  current->copies.clear();
}
inline void wait_for(void* at, int parity) {
  require(static_cast<BarrierState*>(at)->expected != 0xffff, "a barrier that nobody has started");
  std::vector<Arrival>& arrivals = current->block->arrivals;
  while ((static_cast<BarrierState*>(at)->phase & 1) == unsigned(parity)) {
    size_t kept = 0;
    for (size_t n = 0; n < arrivals.size(); ++n)
      if (arrivals[n].barrier == at) {
        land(arrivals[n].copies);
        arrive(at);
      } else if (kept++ != n) {
        std::swap(arrivals[kept - 1], arrivals[n]);
      }
    arrivals.resize(kept);
    if ((static_cast<BarrierState*>(at)->phase & 1) == unsigned(parity)) wait();
  }
}

inline void load_matrices(float (&a)[4], uint32_t row) {
  const Exchange* all = exchange({{row}});
  const int lane = threadIdx.x % 32;
  for (int n = 0; n < 4; ++n) {
    const char* from = shared_memory + all[8 * n + lane / 4].words[0];
    require(reinterpret_cast<uintptr_t>(from) % 16 == 0, "a row that is not aligned");
    std::memcpy(&a[n], from + 4 * (lane % 4), 4);
  }
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
    c[r] =
        std::isfinite(rounded) && std::fabs(double(rounded)) > std::fabs(sum) ? std::nextafter(rounded, 0.f) : rounded;
  }
}

}  // namespace emulated

inline void __syncthreads() { emulated::meet(emulated::of_block); }
inline int __syncthreads_or(int predicate) {
  emulated::Block& block = *emulated::current->block;
  const int parity = emulated::current->meetings[emulated::of_block] & 1;
  const int arrived = block.arrived[emulated::kMostThreads / 32][parity];
  if (arrived == 0 || arrived >= int(blockDim.x)) block.any[parity] = 0;  // the first to come
  block.any[parity] |= predicate != 0;
  emulated::meet(emulated::of_block);
  return block.any[parity];
}
inline void __syncwarp() { emulated::meet(emulated::of_warp); }
template <class T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  emulated::Exchange mine{};
  std::memcpy(mine.words, &x, sizeof(x));
  const emulated::Exchange* all = emulated::exchange(mine);
  std::memcpy(&x, all[(threadIdx.x % 32) ^ mask].words, sizeof(x));
  return x;
}
