// The CUDA kernels compiled for the host (cuda_emulation.h), behind a function that tests call on CPU tensors.
#define FASTCAPS_EMULATED
#define FASTCAPS_TILE_FORM float, false  // and the others:
#include "cuda/routing.cu"

namespace fastcaps::cuda {
FASTCAPS_INSTANTIATE(float, true)
FASTCAPS_INSTANTIATE(bfloat16, false)
FASTCAPS_INSTANTIATE(float16, false)
}  // namespace fastcaps::cuda

using namespace fastcaps;

namespace {
template <class Real>
void forward(const Routing<Real>& in, bool allow_tf32, void* out, Real* sums) {
  const int64_t bytes = cuda::forward_scratch(in);
  std::unique_ptr<char[]> scratch(bytes > 0 ? new char[bytes] : nullptr);  // as PyTorch's empty tensors
  std::memset(scratch.get(), 0xff, bytes);                                 // NaN
  cuda::forward(in, allow_tf32, out, sums, scratch.get(), nullptr);
}
template <class Real>
void backward(const Routing<Real>& in, bool allow_tf32, const Gradients<Real>& out) {
  const int64_t bytes = cuda::backward_scratch(in, out);
  std::unique_ptr<char[]> scratch(bytes > 0 ? new char[bytes] : nullptr);
  std::memset(scratch.get(), 0xff, bytes);
  cuda::backward(in, allow_tf32, out, scratch.get(), nullptr);
}

template <class Real>
void run(bool is_backward, const int64_t* n, void* const* p, double eps) {
  Routing<Real> in{};
  in.size = {n[0], n[1], n[2], n[3], n[4], n[5]};
  in.stored = Stored(n[6]);
  in.poses = p[0], in.weight = p[1];
  in.stride_i = n[7], in.stride_j = n[8], in.prior_stride_b = n[9];
  in.prior = static_cast<const Real*>(p[2]), in.bias = static_cast<const Real*>(p[3]);
  in.mask = static_cast<const bool*>(p[4]);
  in.leaky = n[10], in.detach = n[11], in.eps = Real(eps);
  const bool allow_tf32 = n[12];
  Gradients<Real> out{p[5], static_cast<const Real*>(p[6]), p[7],
                      p[8], static_cast<Real*>(p[9]),       static_cast<Real*>(p[10])};
  if (is_backward)
    backward(in, allow_tf32, out);
  else
    forward(in, allow_tf32, p[5], static_cast<Real*>(p[6]));
}
}  // namespace

// For kernels.cpp: the other order of threads, and one launch for each sweep, where it wants the other order of tasks.
#define FASTCAPS_ISA emulated_cuda
namespace fastcaps::emulated_cuda {
inline void choose(bool other) { emulated::backwards = other, emulated::resident_blocks = other ? 0 : 6; }
template <class Real>
void forward(const Routing<Real>& in, void* out, Real* sums, bool other) {
  choose(other);
  ::forward(in, false, out, sums);
}
template <class Real>
void backward(const Routing<Real>& in, const Gradients<Real>& out, bool other) {
  choose(other);
  ::backward(in, false, out);
}
}  // namespace fastcaps::emulated_cuda

// numbers: B, I, J, D_in, D_out, T, stored, stride_i, stride_j, prior_stride_b, leaky, detach, allow_tf32, descending,
// resident_blocks, multiprocessors. pointers: poses, weight, prior, bias, mask; then out and sums, or grad, sums and
// the four gradients. Returns how many kernels were launched.
extern "C" int64_t emulated_dynamic_routing(int is_double, int is_backward, const int64_t* numbers,
                                            void* const* pointers, double eps) {
  emulated::backwards = numbers[13], emulated::resident_blocks = numbers[14], emulated::multiprocessors = numbers[15];
  emulated::launches = 0;
  if (is_double)
    run<double>(is_backward, numbers, pointers, eps);
  else
    run<float>(is_backward, numbers, pointers, eps);
  return emulated::launches;
}

// ------------------------------------------------------------------------------------------------------- index maths

namespace {

// Every entry of a tile has one register, in agreement with the rows and columns of the matrix instruction.
template <class T>
const char* check_tile() {
  using namespace fastcaps::cuda;
  bool seen[T::JT][T::D][8] = {};
  for (int lane = 0; lane < 32; ++lane)
    for (int section = 0; section < T::sections; ++section)
      for (int n = 0; n < T::entries(section); ++n)
        for (int s = 0; s < 2; ++s) {
          const int r = T::reg(section, n, s), m = r / 4, g = lane / 4, row = fragment_row(lane, r % 4);
          const int j = T::capsule(section, g), e = T::first_entry(section, g) + n, b = 2 * (lane % 4) + s;
          if (T::row_capsule(m, row) != j || T::row_entry(m, row) != e) return "a register is of another row";
          if (fragment_column(lane, r % 4) != b) return "a register is of another column";
          if (seen[j][e][b]) return "an entry has two registers";
          seen[j][e][b] = true;
          // The same place in memory, here of the second batch tile and the third tile of output capsules of four.
          if (T::place(4 * T::JT - 1, 8 + b, 2 * T::JT + j, e) !=
              T::first_place(4 * T::JT, 1, 2) + m * 128 + lane * 4 + r % 4)
            return "V lies elsewhere than where it is read";
        }
  for (auto& capsule : seen)
    for (auto& entry : capsule)
      for (bool found : entry)
        if (!found) return "an entry has no register";
  const int64_t B = int64_t(1) << 31, J = 1000;
  if (T::place(J, B - 1, J - 1, 0) >= T::places(B, J) || T::place(J, B - 1, J - 1, 0) < T::places(B - 8, J))
    return "places past 2^31 are wrong";
  return nullptr;
}

// The matrix instruction's operands, from the index functions, against a plain product.
struct Product {
  const float *a, *b;
  float* c;
};
void multiply_by_a_warp(Product p) {
  using namespace fastcaps::cuda;
  const int lane = threadIdx.x;
  float a[4], b[2], c[4];
  for (int r = 0; r < 4; ++r) a[r] = p.a[a_row(lane, r) * 8 + a_entry(lane, r)];
  for (int r = 0; r < 2; ++r) b[r] = p.b[b_entry(lane, r) * 8 + b_column(lane)];
  multiply(c, a, b);
  multiply_add(c, a, b);
  for (int r = 0; r < 4; ++r) p.c[fragment_row(lane, r) * 8 + fragment_column(lane, r)] = c[r];
}
const char* check_product() {
  float a[16 * 8], b[8 * 8], c[16 * 8];
  for (int n = 0; n < 16 * 8; ++n) a[n] = n % 13 - 6;
  for (int n = 0; n < 8 * 8; ++n) b[n] = n % 7 - 3;
  emulated::launch(1, 32, 0, [&] { multiply_by_a_warp({a, b, c}); });
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 8; ++column) {
      float sum = 0;
      for (int k = 0; k < 8; ++k) sum += a[row * 8 + k] * b[k * 8 + column];
      if (c[row * 8 + column] != 2 * sum) return "the operands of a product lie elsewhere";
    }
  return nullptr;
}

// Shares cover everything once and differ by one at most, also far beyond 2^31.
const char* check_shares() {
  for (int64_t n : {int64_t(0), int64_t(1), int64_t(1152), int64_t(1) << 40})
    for (int64_t shares : {1, 2, 7, 33, 1000}) {
      if (fastcaps::cuda::share_begin(n, shares, 0) != 0 || fastcaps::cuda::share_begin(n, shares, shares) != n)
        return "shares do not cover everything";
      for (int64_t share = 0; share < shares; ++share) {
        const int64_t size =
            fastcaps::cuda::share_begin(n, shares, share + 1) - fastcaps::cuda::share_begin(n, shares, share);
        if (size < n / shares || size > n / shares + 1) return "shares are not of one size";
      }
    }
  return nullptr;
}

// Every item belongs to one block, the one that the sum of a split panel asks for; no two partial gradients have one
// slot.
const char* check_items() {
  for (int64_t panels : {1, 5, 288})
    for (int64_t tiles : {1, 7, 16})
      for (int64_t blocks : {1, 4, 264}) {
        if (blocks > panels * tiles) continue;
        const fastcaps::cuda::Items items{panels, tiles, blocks};
        std::vector<int> used(2 * blocks);
        for (int64_t block = 0, item = 0; block < blocks; ++block)
          for (; item < items.begin(block + 1); ++item) {
            if (items.block_of(item) != block) return "an item belongs to another block";
            const int64_t panel = item / tiles;
            if (item != items.begin(block) && item % tiles != 0) continue;  // in the middle of a run
            if (items.first_block(panel) == items.last_block(panel)) continue;
            ++used[items.slot(block, block == items.first_block(panel))];
            if ((block == items.first_block(panel)) != (item % tiles == 0)) return "a panel begins elsewhere";
          }
        for (int count : used)
          if (count > 1) return "two partial gradients have one slot";
      }
  const fastcaps::cuda::Items large{int64_t(1) << 30, int64_t(1) << 22, 264};
  if (large.block_of(large.begin(263)) != 263 || large.block_of(large.begin(263) - 1) != 262)
    return "large items are wrong";
  return nullptr;
}

}  // namespace

// What is wrong with the index maths, or null.
extern "C" const char* check_index_maths() {
  using namespace fastcaps::cuda;
  for (const char* found : {check_tile<Tile<8, 16>>(), check_tile<Tile<10, 16>>(), check_tile<Tile<5, 32>>(),
                            check_product(), check_shares(), check_items()})
    if (found) return found;
  return nullptr;
}
