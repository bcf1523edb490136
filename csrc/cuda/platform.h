// What the CUDA kernels need of CUDA: the matrix instruction, widening and rounding, fast functions, shared memory,
// launch. With FASTCAPS_EMULATED the same kernels are compiled for the host, where tests run them thread by thread.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#ifdef FASTCAPS_EMULATED
#include "cuda_emulation.h"
#else
#include <cooperative_groups.h>
#include <cuda_runtime.h>
#endif

namespace fastcaps::cuda {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// ------------------------------------------------------------------------------------------------- bits and functions

__device__ inline uint32_t bits_of(float x) {
#ifdef FASTCAPS_EMULATED
  return emulated::bit_cast<uint32_t>(x);
#else
  return __float_as_uint(x);
#endif
}
__device__ inline float from_bits(uint32_t bits) {
#ifdef FASTCAPS_EMULATED
  return emulated::bit_cast<float>(bits);
#else
  return __uint_as_float(bits);
#endif
}

__device__ inline double widen(double x) { return x; }
__device__ inline float widen(float x) { return x; }
__device__ inline float widen(bfloat16 x) { return from_bits(uint32_t(x.bits) << 16); }
__device__ inline float widen(float16 x) {
#ifdef FASTCAPS_EMULATED
  return emulated::widen_float16(x.bits);
#else
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
  return result;
#endif
}

__device__ inline void narrow(double x, double& to) { to = x; }
__device__ inline void narrow(float x, float& to) { to = x; }
__device__ inline void narrow(float x, bfloat16& to) {  // to nearest, ties to even; a NaN stays one
  const uint32_t bits = bits_of(x);
  to.bits = x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
__device__ inline void narrow(float x, float16& to) {
#ifdef FASTCAPS_EMULATED
  to.bits = emulated::narrow_float16(x);
#else
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
#endif
}

// a b + c, rounded towards zero: what is finite stays finite.
template <class Real>
__device__ inline Real fma_towards_zero(Real a, Real b, Real c) {
#ifdef FASTCAPS_EMULATED  // to nearest, but for that
  const Real sum = std::fma(a, b, c);
  const bool overflows = std::isinf(sum) && std::isfinite(a) && std::isfinite(b) && std::isfinite(c);
  return overflows ? std::copysign(std::numeric_limits<Real>::max(), sum) : sum;
#else
  if constexpr (sizeof(Real) == 4)
    return __fmaf_rz(a, b, c);
  else
    return __fma_rz(a, b, c);
#endif
}

// 2^x, 1 / x and log2 x within 2^-22 or so, without branches; what a softmax divides by is neither tiny nor huge.
__device__ inline float power_of_two(float x) {
#ifdef FASTCAPS_EMULATED
  return std::exp2(x);
#else
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#endif
}
__device__ inline double power_of_two(double x) { return exp2(x); }
__device__ inline float reciprocal(float x) {
#ifdef FASTCAPS_EMULATED
  return 1 / x;
#else
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#endif
}
__device__ inline double reciprocal(double x) { return 1 / x; }
__device__ inline float log_of_two(float x) {
#ifdef FASTCAPS_EMULATED
  return std::log2(x);
#else
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#endif
}
__device__ inline double log_of_two(double x) { return log2(x); }
// The exponent of a normal number, which keeps a mantissa between 1 and 2: of that log_of_two is exact to its last
// bits.
__device__ inline float take_exponent(float& x) {
  const uint32_t bits = bits_of(x);
  x = from_bits((bits & 0x7fffff) | 0x3f800000);
  return float(int(bits >> 23) - 127);
}

// ------------------------------------------------------------------------------------------------------------- tf32

// To the nearest number that tf32 holds, if the hardware then cuts the last 13 bits off. A NaN with all bits set would
// become -0.
__device__ inline float rounded_to_tf32(float x) { return x == x ? from_bits(bits_of(x) + 0x1000) : x; }
__device__ inline float cut_to_tf32(float x) { return from_bits(bits_of(x) & 0xffffe000); }
// The nearest number of tf32, but for a NaN, of which the rest x - nearest_tf32(x) is one.
__device__ inline float nearest_tf32(float x) { return cut_to_tf32(from_bits(bits_of(x) + 0x1000)); }

// c = a b, or c += a b, by mma.sync.m16n8k8: a [16, 8], b [8, 8], c [16, 8] as cuda/layout.h lays them out.
__device__ inline void multiply(float* c, const float (&a)[4], const float (&b)[2]) {
#ifdef FASTCAPS_EMULATED
  for (int n = 0; n < 4; ++n) c[n] = 0;
  emulated::mma(c, a, b);
#else
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
      : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
      : "r"(bits_of(a[0])), "r"(bits_of(a[1])), "r"(bits_of(a[2])), "r"(bits_of(a[3])), "r"(bits_of(b[0])),
        "r"(bits_of(b[1])), "f"(0.f));
#endif
}
__device__ inline void multiply_add(float* c, const float (&a)[4], const float (&b)[2]) {
#ifdef FASTCAPS_EMULATED
  emulated::mma(c, a, b);
#else
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(bits_of(a[0])), "r"(bits_of(a[1])), "r"(bits_of(a[2])), "r"(bits_of(a[3])), "r"(bits_of(b[0])),
        "r"(bits_of(b[1])));
#endif
}

// ------------------------------------------------------------------------------------------------------------- warps

template <class Real>
__device__ inline Real exchanged(Real x, int mask) {  // with lane ^ mask
  return __shfl_xor_sync(0xffffffff, x, mask);
}
// Of this thread's warp; from a shuffle, so that the compiler knows that it is the same for all lanes.
__device__ inline int warp_of_block() {
#ifdef FASTCAPS_EMULATED
  return threadIdx.x / 32;
#else
  return __shfl_sync(0xffffffff, threadIdx.x / 32, 0);
#endif
}
template <class Real>
__device__ inline Real sum_over_warp(Real x) {
  for (int mask = 16; mask > 0; mask /= 2) x += exchanged(x, mask);
  return x;
}

// All blocks of a launch_cooperative wait for each other; what they have written before is seen after.
__device__ inline void grid_barrier() {
#ifdef FASTCAPS_EMULATED
  emulated::meet(emulated::of_grid);
#else
  cooperative_groups::this_grid().sync();
#endif
}

template <class T>
__device__ inline T* shared_memory() {
#ifdef FASTCAPS_EMULATED
  return reinterpret_cast<T*>(emulated::shared_memory);
#else
  extern __shared__ __align__(16) char memory[];
  return reinterpret_cast<T*>(memory);
#endif
}

// The same number, of which the compiler knows nothing: what follows from it is computed where it is used, and does not
// wait in registers while a loop runs that needs them.
__device__ inline int forgotten(int x) {
#ifndef FASTCAPS_EMULATED
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// An address in shared memory, in bytes.
using Shared = uint32_t;
__device__ inline Shared shared_address(const void* at) {
#ifdef FASTCAPS_EMULATED
  return Shared(static_cast<const char*>(at) - emulated::shared_memory);
#else
  return Shared(__cvta_generic_to_shared(at));
#endif
}

// Operand a of mma.sync from rows of eight numbers as they lie: lanes 0 .. 7 give the addresses of entries 0 .. 3 of
// rows 0 .. 7, lanes 8 .. 15 those of rows 8 .. 15, and 16 .. 31 those of entries 4 .. 7. Column slots are entries
// then.
template <int offset>
__device__ inline void load_operand(float (&a)[4], Shared row) {
#ifdef FASTCAPS_EMULATED
  emulated::load_matrices(a, row + offset);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4+%5];"
               : "=f"(a[0]), "=f"(a[1]), "=f"(a[2]), "=f"(a[3])
               : "r"(row), "n"(offset)
               : "memory");
#endif
}

// ------------------------------------------------------------------------------------------------------------- copies

// A barrier in shared memory that other threads wait at without stopping those that arrive: phase n is over when so
// many have arrived as it was made for.
struct Barrier {
  uint64_t state;
};
__device__ inline void start_barrier(Barrier* barrier, int count) {
#ifdef FASTCAPS_EMULATED
  emulated::start_barrier(&barrier->state, count);
#else
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
#endif
}
__device__ inline void arrive(Barrier* barrier) {
#ifdef FASTCAPS_EMULATED
  emulated::arrive(&barrier->state);
#else
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(shared_address(barrier))
               : "memory");
#endif
}
// Until the phase of that parity is over, which the one before the first is from the start.
__device__ inline void wait_for(Barrier* barrier, int parity) {
#ifdef FASTCAPS_EMULATED
  emulated::wait_for(&barrier->state, parity);
#else
  uint32_t over;
  do
    asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared.b64 p, [%1], %2;\nselp.b32 %0, 1, 0, p;\n}"
                 : "=r"(over)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
  while (!over);
#endif
}

// 16 bytes to shared memory, zeros where they are not `there`, while this thread goes on.
__device__ inline void copy_16(Shared to, const void* from, bool there) {
#ifdef FASTCAPS_EMULATED
  emulated::copy_16(to, there ? from : nullptr);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
#endif
}
// This thread arrives at a barrier when its copies so far are done.
__device__ inline void arrive_after_copies(Barrier* barrier) {
#ifdef FASTCAPS_EMULATED
  emulated::arrive_after_copies(&barrier->state);
#else
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
#endif
}

// ------------------------------------------------------------------------------------------------------------- launch

struct Grid {
  int64_t blocks;
  int threads;
  int64_t shared_bytes;
};

#ifndef FASTCAPS_EMULATED
// Throws if `error` is one: with the kernel's name and sizes, which are anything that has B, I and J.
template <class SizesLike>
void check_launch(cudaError_t error, const Grid& grid, cudaStream_t stream, const char* name, const SizesLike& sizes) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next call would report it again
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  cudaStreamIsCapturing(stream, &capture);
  throw std::runtime_error(
      std::string("fastcaps::cuda::") + name + " with B = " + std::to_string(sizes.B) +
      ", I = " + std::to_string(sizes.I) + ", J = " + std::to_string(sizes.J) + ", " + std::to_string(grid.blocks) +
      " blocks, " + std::to_string(grid.shared_bytes) + " bytes of shared memory: " + cudaGetErrorString(error) +
      (capture == cudaStreamCaptureStatusNone ? ""
                                              : ". A CUDA graph is being captured: call fastcaps.warmup before it"));
}
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}
// All that there is, as a smaller permission would be taken from a launch of another thread.
template <class Argument>
cudaError_t allow_shared_memory(void (*kernel)(Argument), int64_t bytes) {
  if (bytes <= 48 * 1024) return cudaSuccess;  // which needs no permission
  const int most = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
}
#endif

inline int64_t multiprocessors() {
#ifdef FASTCAPS_EMULATED
  return emulated::multiprocessors;
#else
  return device_attribute(cudaDevAttrMultiProcessorCount);
#endif
}

// `kernel`<<<>>>(argument).
template <class Argument, class SizesLike>
void launch(void (*kernel)(Argument), Grid grid, cudaStream_t stream, const Argument& argument, const char* name,
            const SizesLike& sizes) {
  if (grid.blocks == 0) return;
#ifdef FASTCAPS_EMULATED
  emulated::launch(grid.blocks, grid.threads, grid.shared_bytes, [&] { kernel(argument); });
#else
  cudaError_t error = grid.blocks > 0x7fffffff ? cudaErrorInvalidConfiguration : cudaSuccess;
  if (error == cudaSuccess) error = allow_shared_memory(kernel, grid.shared_bytes);
  if (error == cudaSuccess) {
    kernel<<<unsigned(grid.blocks), grid.threads, grid.shared_bytes, stream>>>(argument);
    error = cudaPeekAtLastError();
  }
  check_launch(error, grid, stream, name, sizes);
#endif
}

// The same for a kernel with a grid_barrier; false, and nothing is launched, where not all blocks can be resident at
// once.
template <class Argument, class SizesLike>
bool launch_cooperative(void (*kernel)(Argument), Grid grid, cudaStream_t stream, const Argument& argument,
                        const char* name, const SizesLike& sizes) {
  if (grid.blocks == 0) return false;
#ifdef FASTCAPS_EMULATED
  if (grid.blocks > emulated::resident_blocks || grid.shared_bytes > 99 * 1024) return false;
  emulated::launch(grid.blocks, grid.threads, grid.shared_bytes, [&] { kernel(argument); }, true);
#else
  if (!device_attribute(cudaDevAttrCooperativeLaunch) ||
      grid.shared_bytes > device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin))
    return false;
  int blocks = 0;
  cudaError_t error = allow_shared_memory(kernel, grid.shared_bytes);
  if (error == cudaSuccess)
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, grid.threads, grid.shared_bytes);
  if (error == cudaSuccess && grid.blocks > blocks * multiprocessors()) return false;
  if (error == cudaSuccess) {
    void* arguments[] = {const_cast<Argument*>(&argument)};
    error = cudaLaunchCooperativeKernel(kernel, dim3(unsigned(grid.blocks)), dim3(grid.threads), arguments,
                                        grid.shared_bytes, stream);
  }
  if (error == cudaErrorCooperativeLaunchTooLarge) {  // a process may have only some of the GPU
    cudaGetLastError();
    return false;
  }
  check_launch(error, grid, stream, name, sizes);
#endif
  return true;
}

}  // namespace fastcaps::cuda
