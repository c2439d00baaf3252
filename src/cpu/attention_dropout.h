// The weights that dropout keeps, drawn by Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2,
// 3", 2011) from a weight's position, so that they do not depend on tiles, threads, instruction sets or devices.
//
// Eight numbers of 16 bits for keys 8g to 8g + 7: counter (g, row, batch * heads + head, lower half of the offset), key
// (lower half of the seed, its upper half xor the offset's). Key 8g + t has the lower half of word t & 3 for t < 4,
// else the upper half; it is kept if that number is not below `dropped`.
#pragma once

#include "attention_mask.h"
#include "convert.h"
#include "limits.h"

namespace fastattn {
namespace FASTATTN_ISA {

struct Dropout {
  uint32_t dropped;  // of 65536
  float scale;       // factor of the kept weights
  uint32_t key[2], offset;

  explicit Dropout(const AttentionParams& p) : dropped((uint32_t)p.dropped), scale(1), key{}, offset(0) {
    if (!on()) return;
    scale = dropped < limits::dropped ? float(limits::dropped) / (limits::dropped - dropped) : 0.0f;
    const uint64_t *state = (const uint64_t*)p.rng.data, seed = state[0], at = state[1];
    key[0] = (uint32_t)seed;
    key[1] = uint32_t(seed >> 32) ^ uint32_t(at >> 32);
    offset = (uint32_t)at;
  }
  bool on() const { return dropped > 0; }
};

// A row of weights: its plane (batch * heads + head), its row, and the key of its first column.
struct DrawnRow {
  int64_t plane, row, key;
};

FASTATTN_INLINE void philox_round(vu (&c)[4], uint32_t k0, uint32_t k1) {
  vu high[2], low[2];
  multiply_wide(c[0], 0xd2511f53u, &high[0], &low[0]);
  multiply_wide(c[2], 0xcd9e8d57u, &high[1], &low[1]);
  c[0] = high[1] ^ c[1] ^ splat_u(k0);
  c[1] = low[1];
  c[2] = high[0] ^ c[3] ^ splat_u(k1);
  c[3] = low[0];
}

// A byte for each of `groups` groups of eight keys from `first` on, rounded up to 2 W: bit t for key 8g + t.
FASTATTN_NOINLINE void draw_row(const Dropout& d, const DrawnRow& at, int64_t first, int64_t groups, uint8_t* bits) {
  typedef uint8_t vb __attribute__((vector_size(W)));
  for (int64_t g = 0; g < groups; g += 2 * W) {
    vu c[2][4];
    FASTATTN_EACH(u, 2) {
      c[u][0] = (vu)iota() + splat_u(uint32_t(first + g) + u * W);
      c[u][1] = splat_u((uint32_t)at.row);
      c[u][2] = splat_u((uint32_t)at.plane);
      c[u][3] = splat_u(d.offset);
    }
    uint32_t k0 = d.key[0], k1 = d.key[1];
    for (int round = 0; round < 10; round++, k0 += 0x9e3779b9u, k1 += 0xbb67ae85u)
      FASTATTN_EACH(u, 2) philox_round(c[u], k0, k1);
    FASTATTN_EACH(u, 2) {
      vi kept{};
      FASTATTN_EACH(t, 4) {
        kept |= ((vi)(c[u][t] & splat_u(0xffff)) >= (int32_t)d.dropped) & (1 << t);
        kept |= ((vi)(c[u][t] >> 16) >= (int32_t)d.dropped) & (16 << t);
      }
      const vb bytes = __builtin_convertvector(kept, vb);
      memcpy(bits + g + u * W, &bytes, sizeof bytes);
    }
  }
}

// Calls f(column, mask of the kept ones of W columns from it on) over the columns of a row.
template <class F>
FASTATTN_INLINE void for_kept(const Dropout& d, const DrawnRow& at, const Columns& columns, const F& f) {
  constexpr int64_t kAtOnce = 256;
  uint8_t bits[kAtOnce / 8 + 4 * W + 4];
  vi lane{};
  for (int i = 0; i < W; i++) lane[i] = 1 << i;
  for (int64_t begin = columns.begin; begin < columns.end; begin += kAtOnce) {
    const int64_t end = min64(begin + kAtOnce, columns.end), first = (at.key + begin) / 8;
    draw_row(d, at, first, (at.key + end + 7) / 8 - first, bits);
    for (int64_t j = begin; j < end; j += W) {
      const int64_t bit = at.key + j - 8 * first;
      uint32_t there;
      memcpy(&there, bits + bit / 8, sizeof there);
      f(j, ((int32_t)(there >> bit % 8) & lane) != 0);
    }
  }
}

// Sets the dropped weights to 0.
template <class T>
FASTATTN_NOINLINE void drop_row(const Dropout& d, const DrawnRow& at, T* weights, const Columns& columns) {
  for_kept(d, at, columns, [&](int64_t j, vi kept) { store(weights + j, keep(kept, load(weights + j))); });
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
