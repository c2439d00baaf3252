// Classing the tiles of a dense mask once, so that kernels skip the empty ones and do not test the full ones.
#pragma once

#include "attention_problem.h"

namespace fastattn {
namespace FASTATTN_ISA {

static void classify_tiles(const TileClassParams& p) {
  const int64_t block_q = round_up(p.block_q, kRows), block_k = round_up(p.block_k, kPanel);
  const int64_t rows = p.dense.size[2], columns = p.dense.size[3];
  const int64_t bands = (rows + block_q - 1) / block_q, heads = p.dense.size[1];
  parallel_items(p.dense.size[0] * heads * bands, p.threads, [&](int64_t task, int) {
    const int64_t batch = task / (heads * bands), head = task / bands % heads, band = task % bands;
    const int64_t first = band * block_q, end = min64(first + block_q, rows);
    const uint8_t* mask = (const uint8_t*)plane(p.dense, batch, head, 0, 0, 1);
    uint8_t* to = (uint8_t*)p.classes.data + batch * p.classes.stride[0] + head * p.classes.stride[1] +
                  band * p.classes.stride[2];
    for (int64_t n = 0; n < columns; n += block_k, to++) {
      const int64_t width = min64(block_k, columns - n);
      int any = 0, all = 1;
      for (int64_t i = first; i < end; i++) {
        const uint8_t* x = mask + i * p.dense.stride[2] + n;
        int row_any = 0, row_all = 1;
        for (int64_t j = 0; j < width; j++) {
          row_any |= x[j];
          row_all &= x[j];
        }
        any |= row_any;
        all &= row_all;
      }
      *to = uint8_t(all ? 1 : any ? 2 : 0);
    }
  });
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
