// What one core multiplies and adds per second, from registers alone: the ceiling that the floors are counted against.
// Built and called by benchmarks/conftest.py; instruction_set as in ATEN_CPU_CAPABILITY.
#include <chrono>
#include <cstring>

#define REPEAT12(f) f(0) f(1) f(2) f(3) f(4) f(5) f(6) f(7) f(8) f(9) f(10) f(11)
#define DECLARE(n) vec a##n = {};
#define FUSED(n) asm volatile("vfmadd231ps %1, %2, %0" : "+v"(a##n) : "v"(x), "v"(y));
#define SEPARATE(n) asm volatile("mulps %1, %0\n\taddps %2, %0" : "+x"(a##n) : "x"(x), "x"(y));

// GFLOP/s in float32: 12 sums that do not wait for each other, for about `seconds`.
#define PEAK(name, bytes, target_, step)                                                         \
  __attribute__((target(target_))) static double name(double seconds) {                          \
    typedef float vec __attribute__((vector_size(bytes)));                                       \
    vec x = {}, y = {};                                                                          \
    REPEAT12(DECLARE)                                                                            \
    const auto start = std::chrono::steady_clock::now();                                         \
    double elapsed = 0, flop = 0;                                                                \
    while (elapsed < seconds) {                                                                  \
      for (int n = 0; n < 100000; ++n) {                                                         \
        REPEAT12(step)                                                                           \
      }                                                                                          \
      flop += 2.0 * 12 * 100000 * (bytes / 4);                                                   \
      elapsed = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(); \
    }                                                                                            \
    return flop / elapsed / 1e9;                                                                 \
  }

#ifdef __x86_64__
PEAK(peak_avx512, 64, "avx512f", FUSED)
PEAK(peak_avx2, 32, "avx2,fma", FUSED)
PEAK(peak_baseline, 16, "sse2", SEPARATE)

extern "C" double fma_peak(const char* instruction_set, double seconds) {
  if (!std::strcmp(instruction_set, "avx512")) return peak_avx512(seconds);
  if (!std::strcmp(instruction_set, "avx2")) return peak_avx2(seconds);
  return peak_baseline(seconds);
}
#else
extern "C" double fma_peak(const char*, double) { return 0; }  // not known here
#endif
