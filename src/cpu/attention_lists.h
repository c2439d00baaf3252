// Block lists of a mask: which key blocks each block of queries attends. Without them every key is in one block.
#pragma once

#include "attention_mask.h"

namespace fastattn {
namespace FASTATTN_ISA {

// A length cut into blocks, and those into tiles of `step` at most: no tile has parts of two blocks.
struct Tiles {
  int64_t block, parts, step;

  // tile: the most elements of a tile, a multiple of `unit`, as blocks or else steps are.
  Tiles(int64_t length, int64_t block, int64_t tile, int64_t unit) : block(min64(block, max64(length, 1))) {
    parts = (this->block + tile - 1) / tile;
    step = parts == 1 ? this->block : round_up((this->block + parts - 1) / parts, unit);
  }
  int64_t count(int64_t length) const { return (length + block - 1) / block * parts; }
  int64_t first(int64_t tile) const { return tile / parts * block + tile % parts * step; }
  // Elements of a tile, 0 or less of one past its block's or the sequence's end.
  int64_t size(int64_t tile, int64_t length) const {
    return min64(min64(step, (tile / parts + 1) * block - first(tile)), length - first(tile));
  }
};

// Entries [begin, end) of a list.
struct List {
  const int32_t *begin, *end;
};

struct Lists {
  const MaskParams& mask;
  int64_t group;  // query heads of a list
  int64_t q_blocks, k_blocks;
  int64_t batch_stride;  // rows between batch entries, 0: all have the same

  Lists(const MaskParams& mask, int64_t heads, int64_t rows, int64_t keys)
      : mask(mask),
        group(heads / max64(mask.list_heads, 1)),
        q_blocks((rows + mask.list_q - 1) / mask.list_q),
        k_blocks((keys + mask.list_k - 1) / mask.list_k) {
    const int64_t all = mask.list_heads * q_blocks;
    batch_stride = mask.list_offsets.size[3] - 1 > all ? mask.list_heads : 0;
  }
  bool on() const { return mask.list_offsets.data; }
  // Whether a panel may have keys of a block that is not listed beside those of one that is.
  bool cuts_panels() const { return on() && mask.list_k % kPanel; }

  // The key blocks of the queries from `row` on of one query head.
  List of_queries(int64_t batch, int64_t head, int64_t row) const {
    return entry(mask.list_offsets, mask.list_keys,
                 (batch * batch_stride + head / group) * q_blocks + row / mask.list_q);
  }
  // The query blocks of one query head that list the key block of key `key`.
  List of_keys(int64_t batch, int64_t head, int64_t key) const {
    return entry(mask.list_starts, mask.list_queries,
                 (batch * batch_stride + head / group) * k_blocks + key / mask.list_k);
  }

  // f(first, last) for tiles of keys, within block_k of their first panel, that cover those of [begin, end) that the
  // queries from `row` on list; neighbouring blocks are one. Tiles start at a panel but for blocks that do not.
  template <class F>
  FASTATTN_INLINE_MEMBER void each_tile(int64_t batch, int64_t head, int64_t row, int64_t begin, int64_t end,
                                        int64_t block_k, const F& f) const {
    if (!on()) {
      for (int64_t n = begin / block_k * block_k; n < end; n += block_k) f(n, n + block_k);
      return;
    }
    if (begin >= end) return;
    const List list = of_queries(batch, head, row);
    const int64_t first = begin / kPanel * kPanel, last = round_up(end, kPanel);
    int64_t n = 0, stop = 0;  // of neighbours, not yet given to f
    const auto most = [&] { return n / kPanel * kPanel + block_k; };
    for (const int32_t* key = list.begin; key < list.end; key++) {
      const int64_t from = max64(*key * (int64_t)mask.list_k, first);
      const int64_t to = min64((*key + (int64_t)1) * mask.list_k, last);
      if (from >= to) continue;
      if (from != stop) {
        if (n < stop) f(n, stop);
        n = from;
      }
      stop = to;
      for (int64_t next = most(); stop >= next; n = next, next = most()) f(n, next);
    }
    if (n < stop) f(n, stop);
  }

 private:
  static List entry(const Tensor& offsets, const Tensor& keys, int64_t row) {
    const int32_t* at = (const int32_t*)offsets.data + row;
    return {(const int32_t*)keys.data + at[0], (const int32_t*)keys.data + at[1]};
  }
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
