// Where things lie in the tiles of the CUDA kernels: arithmetic only, the same on the host, where tests check it.
#pragma once

#include <cstdint>

#include "numbers.h"

namespace fastcaps::cuda {

constexpr int kTileSamples = 8;  // of a batch tile: the columns of a matrix instruction
constexpr int kOctet = 8;        // entries of D_in that a matrix instruction sums over

// 0 .. n - 1 in shares that differ by one at most: where share number `share` begins, and the one before ends. n is at
// most 2^40 or so and there are at most some thousands of shares, so the product stays below 2^63.
FASTCAPS_INDEX int64_t share_begin(int64_t n, int64_t shares, int64_t share) { return n * share / shares; }

// The work of the last sweep: an item is a pair of a panel (a chunk of input capsules, an octet of D_in) and a batch
// tile, the tile running fastest. A block has an equal share of the items, so that no multiprocessor waits for others.
// Of a panel that several blocks have, each leaves a partial gradient, in one of its two slots: the block that begins
// the panel in its second, others in their first.
struct Items {
  int64_t panels, batch_tiles, blocks;

  FASTCAPS_INDEX int64_t begin(int64_t block) const { return share_begin(panels * batch_tiles, blocks, block); }
  FASTCAPS_INDEX int64_t block_of(int64_t item) const {
    return ceil_div((item + 1) * blocks, panels * batch_tiles) - 1;
  }
  FASTCAPS_INDEX int64_t first_block(int64_t panel) const { return block_of(panel * batch_tiles); }
  FASTCAPS_INDEX int64_t last_block(int64_t panel) const { return block_of((panel + 1) * batch_tiles - 1); }
  FASTCAPS_INDEX int64_t slot(int64_t block, bool begins) const { return 2 * block + begins; }
};

// mma.sync.m16n8k8, c [16, 8] += a [16, 8] b [8, 8]. Lane 4 g + t is lane t < 4 of quad g < 8.
//   c   register r: row g + 8 (r / 2), column 2 t + r % 2
//   a   registers 0 .. 3: rows g, g + 8, g, g + 8 of column slots t, t, t + 4, t + 4
//   b   registers 0, 1: row slots t, t + 4 of column g
// A product does not care which of the eight entries lies in which slot, as long as a and b agree: slot t is entry 2 t
// and slot t + 4 entry 2 t + 1, so that a lane's two are neighbours.
FASTCAPS_INDEX int fragment_row(int lane, int r) { return lane / 4 + 8 * (r / 2); }
FASTCAPS_INDEX int fragment_column(int lane, int r) { return 2 * (lane % 4) + r % 2; }
FASTCAPS_INDEX int a_row(int lane, int r) { return lane / 4 + 8 * (r % 2); }
FASTCAPS_INDEX int a_entry(int lane, int r) { return 2 * (lane % 4) + r / 2; }
FASTCAPS_INDEX int b_entry(int lane, int r) { return 2 * (lane % 4) + r; }
FASTCAPS_INDEX int b_column(int lane) { return lane / 4; }

// A warp's tile: 8 samples, the columns of c, times JT output capsules of D entries, the rows of M instructions one
// after the other. Its capsules are a section of 8 (or 4) and, if these are not all, a smaller one. Instruction m of a
// section of 8 leaves in registers 4 m .. 4 m + 3 of a lane:
//
//                               sample 0 1    2 3    4 5    6 7
//   row  0   capsule 0 |           lane  0      1      2      3  |  entry 2 m       registers 4 m, 4 m + 1
//   row  1   capsule 1 |           lane  4      5      6      7  |                  (even sample, odd sample)
//   ...                                                          |
//   row  7   capsule 7 |           lane 28     29     30     31  |
//   row  8   capsule 0 |           lane  0      1      2      3  |  entry 2 m + 1   registers 4 m + 2, 4 m + 3
//   ...                                                          |
//   row 15   capsule 7 |           lane 28     29     30     31  |
//
// So a lane has one capsule whole, for two samples: its agreement needs no other lane. In a section of P = 4, 2 or 1
// capsules 8 / P quads share one, and a lane has D P / 8 neighbouring entries of it.
template <int JT_, int D_>
struct Tile {
  static constexpr int JT = JT_, D = D_, M = JT * D / 16;
  static constexpr int first_size = JT >= 8 ? 8 : 4, last_size = JT - first_size;  // capsules of the sections
  static constexpr int sections = last_size > 0 ? 2 : 1;
  static_assert(last_size >= 0 && last_size < first_size && (last_size & (last_size - 1)) == 0);
  static_assert(D * first_size % 16 == 0 && D * last_size % 16 == 0);

  static FASTCAPS_INDEX int capsules(int section) { return section == 0 ? first_size : last_size; }
  static FASTCAPS_INDEX int first_capsule(int section) { return section * first_size; }
  static FASTCAPS_INDEX int first_m(int section) { return first_capsule(section) * D / 16; }
  static FASTCAPS_INDEX int quads(int section) {  // of one capsule
    return section == 0 ? 8 / first_size : 8 / (last_size > 0 ? last_size : 8);
  }
  static FASTCAPS_INDEX int entries(int section) { return D / quads(section); }  // of a capsule in a lane
  static FASTCAPS_INDEX int section_of_m(int m) { return m >= first_m(1) ? 1 : 0; }
  static FASTCAPS_INDEX int capsule(int section, int g) { return first_capsule(section) + g / quads(section); }
  static FASTCAPS_INDEX int first_entry(int section, int g) { return g % quads(section) * entries(section); }
  // Of entry n of a lane's entries and sample s of its two.
  static FASTCAPS_INDEX int reg(int section, int n, int s) { return 4 * (first_m(section) + n / 2) + 2 * (n % 2) + s; }

  // Row `row` of instruction m: capsule of the tile and entry.
  static FASTCAPS_INDEX int row_capsule(int m, int row) { return capsule(section_of_m(m), row % 8); }
  static FASTCAPS_INDEX int row_entry(int m, int row) {
    const int section = section_of_m(m);
    return first_entry(section, row % 8) + 2 * (m - first_m(section)) + row / 8;
  }

  // V, ds and partial sums lie in memory as in the registers, [B / 8, J / JT, M, 32 lanes, 4 registers], all rounded
  // up, so that a lane loads or stores an instruction's four at once: where a tile begins, and the place of entry e of
  // output capsule j of sample b.
  static FASTCAPS_INDEX int64_t first_place(int64_t J, int64_t batch_tile, int64_t tile) {
    return (batch_tile * ceil_div(J, JT) + tile) * M * 128;
  }
  static FASTCAPS_INDEX int64_t place(int J, int b, int j, int e) {
    const int jt = j % JT, section = jt >= first_size ? 1 : 0;
    const int n = e % entries(section), g = (jt - first_capsule(section)) * quads(section) + e / entries(section);
    const int lane = 4 * g + b % 8 / 2;
    return first_place(J, b / 8, j / JT) + (first_m(section) + n / 2) * 128 + 4 * lane + 2 * (n % 2) + b % 2;
  }
  static FASTCAPS_INDEX int64_t places(int64_t B, int64_t J) { return ceil_div(B, 8) * ceil_div(J, JT) * M * 128; }
};

}  // namespace fastcaps::cuda
