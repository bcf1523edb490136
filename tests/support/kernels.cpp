// The CPU kernels of one instruction set, or the CUDA kernels in their emulation, without Python or torch, to be built
// with sanitizers (make sanitize): random sizes and options, every tensor on a heap block of exactly its size. Checks
// that outputs agree with a plain loop in double, gradients in double without detach with central differences of it,
// that everything is finite, that the order in which tasks run changes no bit, and that exp is within 2 ulp.
//
//   kernels [number of cases] [first seed]
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include FASTCAPS_SOURCE  // "cpu/<isa>.cpp" or "emulated_cuda.cpp"

using namespace fastcaps;
namespace isa = fastcaps::FASTCAPS_ISA;

#define STRING_(x) #x
#define STRING(x) STRING_(x)

static void require(bool ok, const char* what, unsigned seed) {
  if (ok) return;
  std::printf("seed %u: %s\n", seed, what);
  std::exit(1);
}

#ifdef FASTCAPS_EMULATED
constexpr bool in_order = false, backwards = true;
#else
static void in_order(int64_t n, void* context, Body body) {
  for (int64_t task = 0; task < n; ++task) body(context, task, task + 1);
}
static void backwards(int64_t n, void* context, Body body) {
  for (int64_t task = n; task-- > 0;) body(context, task, task + 1);
}
#endif

// Exactly `count` entries, so that an access past the end is found.
template <class T>
using Block = std::unique_ptr<T[]>;
template <class T>
static Block<T> block(int64_t count) {
  return Block<T>(new T[count]);
}

struct Dice {
  std::mt19937 engine;
  int64_t up_to(int64_t n) { return 1 + engine() % n; }
  bool coin() { return engine() & 1; }
  double value() { return (engine() >> 8) / double(1 << 24) - 0.5; }
};

// `count` random entries as they are stored, and as numbers.
struct Values {
  Values(Dice& dice, int64_t count, Stored stored, int size)
      : bytes(block<char>(count * (stored == Stored::real ? size : 2))), numbers(count) {
    for (int64_t n = 0; n < count; ++n) {
      double x = 2 * dice.value();
      if (stored == Stored::bfloat16) x = widen_bfloat16(((uint16_t*)bytes.get())[n] = narrow_bfloat16(x));
      if (stored == Stored::float16) x = widen_float16(((uint16_t*)bytes.get())[n] = narrow_float16(x));
      if (stored == Stored::real && size == 4) x = ((float*)bytes.get())[n] = float(x);
      if (stored == Stored::real && size == 8) ((double*)bytes.get())[n] = x;
      numbers[n] = x;
    }
  }
  Block<char> bytes;
  std::vector<double> numbers;
};

struct Case {
  Sizes z;
  bool votes, leaky;
  int64_t stride_i, stride_j, prior_stride_b;
  double eps;
  const bool* mask;
};

// Procedure 1 of the paper in double.
static std::vector<double> routed(const Case& c, const Values& poses, const Values& weight, const Values* prior,
                                  const Values* bias) {
  const Sizes& z = c.z;
  std::vector<double> out(z.B * z.J * z.D_out), u(z.J * z.D_out), logits(z.I * z.J), s(z.J * z.D_out);
  for (int64_t b = 0; b < z.B; ++b) {
    std::fill(logits.begin(), logits.end(), 0.0);
    if (prior)
      for (int64_t n = 0; n < z.I * z.J; ++n) logits[n] = prior->numbers[b * c.prior_stride_b + n];
    double* v = out.data() + b * z.J * z.D_out;
    for (int64_t t = 0; t < z.T; ++t) {
      for (int step = 0; step < 2; ++step) {  // the logits from the last v, then the sum with them
        if (step == 0 && t == 0) continue;
        if (step == 1) std::fill(s.begin(), s.end(), 0.0);
        for (int64_t i = 0; i < z.I; ++i) {
          for (int64_t j = 0; j < z.J; ++j)
            for (int64_t d = 0; d < z.D_out; ++d) {
              double& vote = u[j * z.D_out + d] = 0;
              const int64_t rows = c.stride_j ? z.J * z.D_out : z.D_out;
              if (c.mask && !c.mask[b * z.I + i]) continue;
              if (c.votes)
                vote = poses.numbers[(b * z.I + i) * rows + j * c.stride_j + d];
              else
                for (int64_t k = 0; k < z.D_in; ++k)
                  vote += weight.numbers[i * c.stride_i + j * c.stride_j + d * z.D_in + k] *
                          poses.numbers[(b * z.I + i) * z.D_in + k];
            }
          double* logit = logits.data() + i * z.J;
          if (step == 0)
            for (int64_t n = 0; n < z.J * z.D_out; ++n) logit[n / z.D_out] += u[n] * v[n];
          if (step == 0) continue;
          double total = c.leaky;
          for (int64_t j = 0; j < z.J; ++j) total += std::exp(logit[j]);
          for (int64_t n = 0; n < z.J * z.D_out; ++n) s[n] += std::exp(logit[n / z.D_out]) / total * u[n];
        }
      }
      for (int64_t j = 0; j < z.J; ++j) {
        double q = 0;
        for (int64_t n = j * z.D_out; n < (j + 1) * z.D_out; ++n) {
          if (bias) s[n] += bias->numbers[n];
          q += s[n] * s[n];
        }
        for (int64_t n = j * z.D_out; n < (j + 1) * z.D_out; ++n)
          v[n] = q > 0 ? s[n] * q / (1 + q) / std::sqrt(q + c.eps) : 0;
      }
    }
  }
  return out;
}

template <class Real>
static void one_case(unsigned seed) {
  Dice dice{std::mt19937(seed)};
  Case c{};
  Sizes& z = c.z;
  // Mostly small, now and then beyond a tile, a chunk of capsules, a section of outputs, a row of several vectors.
  const auto size = [&](int64_t small, int64_t large) { return dice.up_to(dice.up_to(8) == 1 ? large : small); };
  z = {size(6, 70) - (dice.up_to(40) == 1),
       size(9, 70) - (dice.up_to(40) == 1),
       dice.up_to(40) == 1 ? dice.up_to(500) : size(6, 60),
       size(9, 40),
       size(9, 40),
       dice.up_to(4)};
  z.B = std::max<int64_t>(z.B, 0);
  if (dice.coin()) z.D_in = int64_t(1) << dice.up_to(5);
  if (dice.up_to(4) == 1) z.D_in = 30 + dice.up_to(70);  // kept votes
#ifdef FASTCAPS_EMULATED
  const bool full_tiles = dice.coin();  // for the loops that look for nothing
  constexpr int64_t full[] = {5, 8, 10, 20};
  if (full_tiles) z.J = full[dice.up_to(4) - 1], z.D_in = 4 * dice.up_to(2), z.D_out = z.J == 5 ? 32 : 16;
  if (full_tiles && dice.up_to(4) == 1) z.B = 56 + dice.up_to(60), z.D_in = 8;  // matrices go through a ring
#else
  const bool full_tiles = false;
#endif
  Stored stored = Stored::real;
  if (sizeof(Real) == 4 && dice.coin()) stored = dice.coin() ? Stored::bfloat16 : Stored::float16;
  if (STRING(FASTCAPS_ISA) == std::string("avx512bf16")) stored = Stored::bfloat16;
  c.votes = dice.up_to(4) == 1;
  const bool share_i = dice.up_to(3) == 1, share_j = dice.up_to(4) == 1, with_prior = dice.coin() && !full_tiles;
  const bool with_bias = dice.coin();
  const int64_t matrix = z.D_out * (c.votes ? 1 : z.D_in), J_w = share_j ? 1 : z.J;
  c.stride_j = share_j ? 0 : matrix;
  c.stride_i = share_i || c.votes ? 0 : J_w * matrix;
  c.prior_stride_b = dice.coin() ? z.I * z.J : 0;
  c.leaky = dice.coin() && !full_tiles;
  c.eps = dice.coin() ? 0 : 0.01;
  const bool detach = dice.coin();
  const int bytes = sizeof(Real), stored_bytes = stored == Stored::real ? bytes : 2;
  const int64_t n_poses = c.votes ? z.B * z.I * J_w * z.D_out : z.B * z.I * z.D_in;
  const int64_t n_weight = c.votes ? 0 : (share_i ? 1 : z.I) * J_w * matrix, n_out = z.B * z.J * z.D_out;
  const int64_t n_prior = c.prior_stride_b ? z.B * z.I * z.J : z.I * z.J;
  Values poses(dice, n_poses, stored, bytes), weight(dice, n_weight, stored, bytes);
  Values prior(dice, n_prior, Stored::real, bytes), bias(dice, z.J * z.D_out, Stored::real, bytes);
  const Values grad(dice, n_out, stored, bytes);
  if (c.votes) z.D_in = 0;
  const bool with_mask = dice.up_to(3) == 1 && !full_tiles;
  const auto mask = block<bool>(z.B * z.I);
  for (int64_t n = 0; n < z.B * z.I; ++n) mask[n] = dice.up_to(3) > 1;
  if (with_mask) c.mask = mask.get();
  const int64_t row = z.B * z.I ? n_poses * (stored == Stored::real ? bytes : 2) / (z.B * z.I) : 0;
  for (int64_t n = 0; n < z.B * z.I; ++n)  // what is left out may be NaN
    if (c.mask && !mask[n]) std::memset(poses.bytes.get() + n * row, 0xff, row);

  Routing<Real> in{};
  in.size = z;
  in.stored = stored;
  in.poses = poses.bytes.get();
  in.weight = c.votes ? nullptr : weight.bytes.get();
  in.stride_i = c.stride_i;
  in.stride_j = c.stride_j;
  in.prior = with_prior ? (const Real*)prior.bytes.get() : nullptr;
  in.prior_stride_b = c.prior_stride_b;
  in.bias = with_bias ? (const Real*)bias.bytes.get() : nullptr;
  in.mask = c.mask;
  in.leaky = c.leaky;
  in.detach = detach;
  in.eps = Real(c.eps);

  // Output, sums and the four gradients, all forgotten before each run.
  const int64_t counts[] = {n_out * stored_bytes,    z.T * n_out * bytes, n_poses * stored_bytes,
                            n_weight * stored_bytes, n_prior * bytes,     z.J * z.D_out * bytes};
  const bool wanted[] = {true,
                         true,
                         dice.up_to(4) > 1,
                         !c.votes && dice.up_to(4) > 1,
                         with_prior && dice.up_to(4) > 1,
                         with_bias && dice.coin()};
  Block<char> results[2][6];
  for (int run = 0; run < 2; ++run) {
    for (int n = 0; n < 6; ++n) std::memset((results[run][n] = block<char>(counts[n])).get(), 0xff, counts[n]);
    const auto at = [&](int n) -> void* { return wanted[n] ? results[run][n].get() : nullptr; };
    const auto parallel = run ? backwards : in_order;
    isa::forward(in, at(0), (Real*)at(1), parallel);
    const Gradients<Real> out{grad.bytes.get(), (const Real*)at(1), at(2), at(3), (Real*)at(4), (Real*)at(5)};
    isa::backward(in, out, parallel);
  }
  for (int n = 0; n < 6; ++n) {
    if (!wanted[n]) continue;
    require(!std::memcmp(results[0][n].get(), results[1][n].get(), counts[n]), "the order of the tasks changed bits",
            seed);
    const bool half = stored != Stored::real && (n == 0 || n == 2 || n == 3);
    for (int64_t e = 0; e < counts[n] / (half ? 2 : bytes); ++e) {
      const void* from = results[0][n].get();
      const double x = !half                        ? double(((const Real*)from)[e])
                       : stored == Stored::bfloat16 ? widen_bfloat16(((const uint16_t*)from)[e])
                                                    : widen_float16(((const uint16_t*)from)[e]);
      require(std::isfinite(x), "an entry is not finite, or was not written", seed);
    }
  }
  if (sizeof(Real) == 8 && !detach) {
    // Along a random direction of all wanted inputs, <gradient, direction> is what <grad, out> changes by.
    Values* const inputs[] = {&poses, &weight, &prior, &bias};
    std::vector<double> directions[4];
    double by_gradient = 0, size = 0;
    for (int n = 0; n < 4; ++n) {
      directions[n].resize(inputs[n]->numbers.size());
      if (!wanted[n + 2]) continue;
      const Real* d = (const Real*)results[0][n + 2].get();
      for (size_t e = 0; e < directions[n].size(); ++e) {
        directions[n][e] = dice.value();
        by_gradient += double(d[e]) * directions[n][e];
        size += std::abs(double(d[e]) * directions[n][e]);
      }
    }
    const double step = 1e-6;
    double change = 0;
    for (const double sign : {1.0, -1.0}) {
      for (int n = 0; n < 4; ++n)
        for (size_t e = 0; e < directions[n].size(); ++e) inputs[n]->numbers[e] += sign * step * directions[n][e];
      const auto moved = routed(c, poses, weight, with_prior ? &prior : nullptr, with_bias ? &bias : nullptr);
      for (size_t e = 0; e < moved.size(); ++e) change += sign * moved[e] * grad.numbers[e] / (2 * step);
      for (int n = 0; n < 4; ++n)
        for (size_t e = 0; e < directions[n].size(); ++e) inputs[n]->numbers[e] -= sign * step * directions[n][e];
    }
    require(std::abs(change - by_gradient) <= 1e-6 * (1 + size), "a gradient differs from a central difference", seed);
  }
  const std::vector<double> exact =
      routed(c, poses, weight, with_prior ? &prior : nullptr, with_bias ? &bias : nullptr);
  double error = 0, norm = 0;
  for (int64_t e = 0; e < n_out; ++e) {
    const void* from = results[0][0].get();
    const double x = stored == Stored::real       ? double(((const Real*)from)[e])
                     : stored == Stored::bfloat16 ? widen_bfloat16(((const uint16_t*)from)[e])
                                                  : widen_float16(((const uint16_t*)from)[e]);
    error += (x - exact[e]) * (x - exact[e]);
    norm += exact[e] * exact[e];
  }
  const double eps = stored == Stored::bfloat16  ? 0x1p-8
                     : stored == Stored::float16 ? 0x1p-10
                                                 : 1000 * double(std::numeric_limits<Real>::epsilon());
  const double step = stored == Stored::float16 ? 0x1p-25 : 0;  // half of one among subnormal results
  require(std::sqrt(error) <= eps * std::sqrt(norm) + step * std::sqrt(double(n_out)),
          "the output differs from the plain loop", seed);
}

#ifndef FASTCAPS_EMULATED
// The largest error of exp in units in the last place, over floats `step` apart in their bits and over random doubles.
template <class Real>
static double exp_error(uint32_t step) {
  using SIMD = isa::Simd<Real>;
  double worst = 0;
  const auto check = [&](Real x) {
    typename SIMD::vec v = SIMD::exp(SIMD::splat(x));
    const long double exact = expl((long double)x);
    for (int l = 0; l < SIMD::L; l += SIMD::L - 1) {
      const Real y = v[l];
      if (std::isnan(x) || exact > (long double)std::numeric_limits<Real>::max()) {
        if (std::isnan(x) ? !std::isnan(y) : !std::isinf(y)) worst = INFINITY;
        continue;
      }
      const Real near = Real(exact);
      const long double ulp = std::max((long double)std::nextafter(near, Real(INFINITY)) - near,
                                       (long double)std::numeric_limits<Real>::denorm_min());
      const double error = std::isnan(y) ? INFINITY : double(fabsl(y - exact) / ulp);
      worst = std::max(worst, error);
    }
  };
  if (sizeof(Real) == 4)
    for (uint64_t bits = 0; bits < uint64_t(1) << 32; bits += step) {
      const uint32_t b = uint32_t(bits);
      float x;
      std::memcpy(&x, &b, 4);
      check(Real(x));
    }
  Dice dice{std::mt19937(1)};
  for (int n = 0; n < 300000; ++n) check(Real((2 * dice.value()) * (sizeof(Real) == 4 ? 110 : 760)));
  for (double x :
       {0.0, -0.0, 1.0, -1.0, 88.72, 88.73, -87.3, -87.4, -103.9, -104.1, 709.7, 709.8, -745.1, -745.2, 1e30, -1e30})
    check(Real(x));
  for (double x : {double(INFINITY), -double(INFINITY), std::nan("")}) check(Real(x));
  return worst;
}

#endif

int main(int argc, char** argv) {
  const char* const name = STRING(FASTCAPS_ISA);
  const bool runs =
      !std::strcmp(name, "baseline") || !std::strcmp(name, "emulated_cuda") ||
#ifdef __x86_64__
      (!std::strcmp(name, "avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) ||
      (!std::strcmp(name, "avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
       __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) ||
      (!std::strcmp(name, "avx512bf16") && __builtin_cpu_supports("avx512bf16")) ||
#endif
      false;
  if (!runs) {
    std::printf("%s: skipped, this processor does not have it\n", name);
    return 0;
  }
  const unsigned cases = argc > 1 ? std::atoi(argv[1]) : 1000, first = argc > 2 ? std::atoi(argv[2]) : 0;
  for (unsigned seed = first; seed < first + cases; ++seed) {
#ifdef FASTCAPS_PAIRS
    one_case<float>(seed);
#else
    seed % 2 ? one_case<double>(seed) : one_case<float>(seed);
#endif
  }
#ifdef FASTCAPS_EMULATED
  std::printf("%s: %u cases\n", name, cases);
  return 0;
#else
  const double single = exp_error<float>(1021), twofold = exp_error<double>(1);
  std::printf("%s: %u cases, exp within %.2f ulp in float, %.2f in double\n", name, cases, single, twofold);
  return single <= 2 && twofold <= 2 ? 0 : 1;
#endif
}
