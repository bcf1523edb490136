// Small kernels that gpu_probe.py times: what a GPU's units, its launches and its grid barrier cost.
// Each function returns the CUDA error code of its launch.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

namespace {

constexpr int kChains = 8;  // independent accumulators per warp or thread, to cover the latency of one instruction

__global__ void ffma(float* out, int iterations) {
  float a[kChains];
  for (int c = 0; c < kChains; ++c) a[c] = threadIdx.x + c;
  const float x = 1.0f + 1e-7f * threadIdx.x, y = 1e-7f * blockIdx.x;
  for (int n = 0; n < iterations; ++n)
#pragma unroll
    for (int c = 0; c < kChains; ++c) a[c] = fmaf(a[c], x, y);
  float sum = 0;
  for (int c = 0; c < kChains; ++c) sum += a[c];
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

// The two shapes that routing wants: D_in = 8 fits K = 8 without waste.
__global__ void mma_tf32_m16n8k8(float* out, int iterations) {
  float d[kChains][4] = {};
  const unsigned a = __float_as_uint(1e-3f * threadIdx.x), b = __float_as_uint(1e-3f * blockIdx.x);
  for (int n = 0; n < iterations; ++n)
#pragma unroll
    for (int c = 0; c < kChains; ++c)
      asm volatile(
          "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%4,%4,%4}, {%5,%5}, {%0,%1,%2,%3};"
          : "+f"(d[c][0]), "+f"(d[c][1]), "+f"(d[c][2]), "+f"(d[c][3])
          : "r"(a), "r"(b));
  float sum = 0;
  for (int c = 0; c < kChains; ++c) sum += d[c][0] + d[c][1] + d[c][2] + d[c][3];
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

__global__ void mma_bf16_m16n8k16(float* out, int iterations) {
  float d[kChains][4] = {};
  const unsigned a = 0x3c003c00u + threadIdx.x, b = 0x3c003c00u + blockIdx.x;
  for (int n = 0; n < iterations; ++n)
#pragma unroll
    for (int c = 0; c < kChains; ++c)
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%4,%4,%4}, {%5,%5}, {%0,%1,%2,%3};"
          : "+f"(d[c][0]), "+f"(d[c][1]), "+f"(d[c][2]), "+f"(d[c][3])
          : "r"(a), "r"(b));
  float sum = 0;
  for (int c = 0; c < kChains; ++c) sum += d[c][0] + d[c][1] + d[c][2] + d[c][3];
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

__global__ void barriers(int* counter, int count) {
  cooperative_groups::grid_group grid = cooperative_groups::this_grid();
  for (int n = 0; n < count; ++n) grid.sync();
  if (grid.thread_rank() == 0) *counter = count;
}

__global__ void touch(int* value) { *value += 1; }
__global__ void touch_first_in_capture(int* value) { *value += 1; }

}  // namespace

extern "C" {

int probe_ffma(float* out, int blocks, int iterations, cudaStream_t stream) {
  ffma<<<blocks, 256, 0, stream>>>(out, iterations);
  return cudaGetLastError();
}

int probe_mma_tf32(float* out, int blocks, int iterations, cudaStream_t stream) {
  mma_tf32_m16n8k8<<<blocks, 256, 0, stream>>>(out, iterations);
  return cudaGetLastError();
}

int probe_mma_bf16(float* out, int blocks, int iterations, cudaStream_t stream) {
  mma_bf16_m16n8k16<<<blocks, 256, 0, stream>>>(out, iterations);
  return cudaGetLastError();
}

int probe_barriers(int* counter, int blocks, int threads, int count, cudaStream_t stream) {
  void* arguments[] = {&counter, &count};
  return cudaLaunchCooperativeKernel((void*)barriers, dim3(blocks), dim3(threads), arguments, 0, stream);
}

int probe_touch(int* value, cudaStream_t stream) {
  touch<<<1, 1, 0, stream>>>(value);
  return cudaGetLastError();
}

int probe_touch_first_in_capture(int* value, cudaStream_t stream) {
  touch_first_in_capture<<<1, 1, 0, stream>>>(value);
  return cudaGetLastError();
}

const char* probe_error(int code) { return cudaGetErrorString((cudaError_t)code); }
}
