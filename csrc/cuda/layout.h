// Where things lie in the tiles of the CUDA kernels: arithmetic only, the same on the host, where tests check it.
#pragma once

#include <cstdint>

#if defined(__CUDACC__) || defined(FASTCAPS_EMULATED)
#define FASTCAPS_INDEX __host__ __device__ constexpr
#else
#define FASTCAPS_INDEX constexpr
#endif

namespace fastcaps::cuda {

FASTCAPS_INDEX int64_t pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Part p of 0 .. n - 1 is begin(p) .. begin(p + 1) - 1: parts differ by one at most.
FASTCAPS_INDEX int64_t part_begin(int64_t n, int64_t parts, int64_t part) {
  // n * part may pass 2^63 for nobody: n is at most 2^40 or so, parts at most some thousands.
  return n * part / parts;
}

// The last sweep's items are all pairs of a group (of input capsules) and a batch tile, the tile running fastest; a
// block has an equal share of them, so that no multiprocessor waits for others. Of a group that several blocks have,
// each leaves its part of the gradients: the block that begins the group in its second place for a part, others in
// their first.
struct Items {
  int64_t groups, batch_tiles, blocks;

  FASTCAPS_INDEX int64_t begin(int64_t block) const { return part_begin(groups * batch_tiles, blocks, block); }
  FASTCAPS_INDEX int64_t block_of(int64_t item) const { return pieces((item + 1) * blocks, groups * batch_tiles) - 1; }
  FASTCAPS_INDEX int64_t first_block(int64_t group) const { return block_of(group * batch_tiles); }
  FASTCAPS_INDEX int64_t last_block(int64_t group) const { return block_of((group + 1) * batch_tiles - 1); }
  FASTCAPS_INDEX int64_t part(int64_t block, bool begins) const { return 2 * block + begins; }
};

// mma.sync.m16n8k8, c [16, 8] += a [16, 8] b [8, 8], lane = 4 g + t, g < 8, t < 4. Register r of c: row g + 8 (r / 2),
// column 2 t + r % 2. Registers of a: rows g, g + 8, g, g + 8 of column slots t, t, t + 4, t + 4. Registers of b: row
// slots t, t + 4 of column g. A product does not care which of the eight entries lies in which slot, as long as a and b
// agree: slot t is entry 2 t and slot t + 4 entry 2 t + 1, so that a lane's two are neighbours.
FASTCAPS_INDEX int fragment_row(int lane, int r) { return lane / 4 + 8 * (r / 2); }
FASTCAPS_INDEX int fragment_column(int lane, int r) { return 2 * (lane % 4) + r % 2; }
FASTCAPS_INDEX int a_row(int lane, int r) { return lane / 4 + 8 * (r % 2); }
FASTCAPS_INDEX int a_entry(int lane, int r) { return 2 * (lane % 4) + r / 2; }
FASTCAPS_INDEX int b_entry(int lane, int r) { return 2 * (lane % 4) + r; }
FASTCAPS_INDEX int b_column(int lane) { return lane / 4; }

// A warp's tile: 8 samples, the columns of c, times JT output capsules of D entries, the rows of M instructions one
// after the other. The capsules are a block of 8 or 4 and, if that is not all, a smaller one. Of a block of 8 a lane
// has one capsule whole, for two samples, so that its agreement needs no other lane; of a block of P = 4, 2 or 1 the 8
// / P values of g that share a capsule have D P / 8 neighbouring entries each. Register 4 m + r of a lane belongs to
// instruction m.
template <int JT_, int D_>
struct Tile {
  static constexpr int JT = JT_, D = D_, M = JT * D / 16;
  static constexpr int first_block = JT >= 8 ? 8 : 4, last_block = JT - first_block, blocks = last_block > 0 ? 2 : 1;
  static_assert(last_block >= 0 && last_block < first_block && (last_block & (last_block - 1)) == 0);
  static_assert(D * first_block % 16 == 0 && D * last_block % 16 == 0);

  static FASTCAPS_INDEX int capsules(int block) { return block == 0 ? first_block : last_block; }  // P
  static FASTCAPS_INDEX int first_capsule(int block) { return block * first_block; }
  static FASTCAPS_INDEX int first_m(int block) { return first_capsule(block) * D / 16; }
  static FASTCAPS_INDEX int sharing(int block) {  // values of g for one capsule
    return block == 0 ? 8 / first_block : 8 / (last_block > 0 ? last_block : 8);
  }
  static FASTCAPS_INDEX int entries(int block) { return D / sharing(block); }  // of a capsule in a lane
  static FASTCAPS_INDEX int block_of_m(int m) { return m >= first_m(1) ? 1 : 0; }
  static FASTCAPS_INDEX int capsule(int block, int g) { return first_capsule(block) + g / sharing(block); }
  static FASTCAPS_INDEX int first_entry(int block, int g) { return g % sharing(block) * entries(block); }
  // Of entry n of a lane's entries and sample s of its two.
  static FASTCAPS_INDEX int reg(int block, int n, int s) { return 4 * (first_m(block) + n / 2) + 2 * (n % 2) + s; }

  // Row `row` of instruction m: capsule of the tile and entry.
  static FASTCAPS_INDEX int row_capsule(int m, int row) { return capsule(block_of_m(m), row % 8); }
  static FASTCAPS_INDEX int row_entry(int m, int row) {
    const int block = block_of_m(m);
    return first_entry(block, row % 8) + 2 * (m - first_m(block)) + row / 8;
  }

  // V and ds as the kernels read them, [B / 8, J / JT, M, 32 lanes, 4 registers], all rounded up: where a tile begins,
  // and the place of a vector's entry e of capsule j of sample b.
  static FASTCAPS_INDEX int64_t first_place(int64_t J, int64_t batch_tile, int64_t tile) {
    return (batch_tile * pieces(J, JT) + tile) * M * 128;
  }
  static FASTCAPS_INDEX int64_t place(int J, int b, int j, int e) {
    const int jt = j % JT, block = jt >= first_block ? 1 : 0;
    const int n = e % entries(block), g = (jt - first_capsule(block)) * sharing(block) + e / entries(block);
    const int lane = 4 * g + b % 8 / 2;
    return first_place(J, b / 8, j / JT) + (first_m(block) + n / 2) * 128 + 4 * lane + 2 * (n % 2) + b % 2;
  }
  static FASTCAPS_INDEX int64_t places(int64_t B, int64_t J) { return pieces(B, 8) * pieces(J, JT) * M * 128; }
};

}  // namespace fastcaps::cuda
