// The mask of an attention call, sequence by sequence: the keys that each row may attend.
#pragma once

#include "arena.h"

namespace fastattn {
namespace FASTATTN_ISA {

// One batch element or one packed document. `keys` of its k_length keys may be attended at all.
struct Sequence {
  int64_t batch, q_begin, q_length, k_begin, k_length, keys, prefix;
  int64_t offset;  // from a row to the key on its diagonal
  bool causal;
  int64_t window_left, window_right;
  double bias;

  // Both never decrease with the row.
  int64_t first_key(int64_t i) const { return window_left < 0 ? 0 : max64(0, i + offset - window_left); }
  int64_t end_key(int64_t i) const {
    const int64_t diagonal = i + offset;
    int64_t end = keys;
    if (causal) end = min64(end, max64(diagonal + 1, prefix));
    if (window_right >= 0) end = min64(end, diagonal + window_right + 1);
    return end;
  }
  // Keys [low, high) that row i may attend; low > high when there are none.
  void interval(int64_t i, int32_t* low, int32_t* high) const {
    const int64_t first = first_key(i), end = end_key(i);
    *low = first < end ? (int32_t)first : INT32_MAX;
    *high = first < end ? (int32_t)end : 0;
  }
};

// Packed documents of a call, -1: not packed.
FASTATTN_INLINE int64_t documents_of(const MaskParams& mask) {
  return mask.cu_seqlens_q.data ? mask.cu_seqlens_q.size[3] - 1 : -1;
}

// Batch element or document s of a call with `rows` queries and `length` keys, its bias left open. Number `documents`
// has the rows and keys after the last document.
FASTATTN_INLINE Sequence sequence_of(const MaskParams& mask, int64_t s, int64_t documents, int64_t rows,
                                     int64_t length) {
  Sequence r;
  const auto index = [](const Tensor& t, int64_t i) { return (int64_t)((const int32_t*)t.data)[i]; };
  const bool after = s == documents;
  if (documents < 0) {
    r.batch = s;
    r.q_begin = r.k_begin = 0;
    r.q_length = rows;
    r.k_length = length;
  } else {
    r.batch = 0;
    r.q_begin = index(mask.cu_seqlens_q, s);
    r.k_begin = index(mask.cu_seqlens_k, s);
    r.q_length = (after ? rows : index(mask.cu_seqlens_q, s + 1)) - r.q_begin;
    r.k_length = (after ? length : index(mask.cu_seqlens_k, s + 1)) - r.k_begin;
  }
  r.keys = after ? 0 : r.k_length;
  r.offset = r.k_length - r.q_length;
  if (mask.key_lengths.data && !after) {
    const int64_t n = index(mask.key_lengths, s);
    r.keys = min64(r.keys, length_of(n));
    if (n < 0) r.offset = r.keys - r.q_length;
  }
  r.prefix = mask.prefix_lengths.data && !after ? index(mask.prefix_lengths, s) : 0;
  r.causal = mask.causal;
  r.window_left = mask.window_left;
  r.window_right = mask.window_right;
  return r;
}

// Each batch entry's rows attend its first keys, as many as `counts` (B,) says.
FASTATTN_INLINE void attend_first(MaskParams& mask, const Tensor& counts) { mask.key_lengths = counts; }

// The most keys that `rows` neighbouring rows attend together, of `longest` at most.
FASTATTN_INLINE int64_t most_keys(const MaskParams& mask, int64_t rows, int64_t longest) {
  const bool bounded = mask.window_right >= 0 || (mask.causal && !mask.prefix_lengths.data);
  if (mask.window_left < 0 || !bounded) return longest;
  return min64(longest, rows + mask.window_left + max64(mask.window_right, 0));
}

// One head's rows of a tensor broadcast to (B, H, Lq, Lk), null when absent.
FASTATTN_INLINE const char* plane(const Tensor& t, int64_t batch, int64_t head, int64_t row, int64_t column,
                                  int64_t width) {
  if (!t.data) return nullptr;
  return (const char*)t.data + (batch * t.stride[0] + head * t.stride[1] + row * t.stride[2] + column) * width;
}

// The dense mask of one row from key `n` of its sequence on, null when absent.
FASTATTN_INLINE const uint8_t* dense_row(const MaskParams& mask, const Sequence& s, int64_t head, int64_t row,
                                         int64_t n) {
  return (const uint8_t*)plane(mask.dense, s.batch, head, s.q_begin + row, s.k_begin + n, 1);
}

// The keys that the rows of one block attend: [low, high) of each row, and for each kRows rows the union of their keys
// and the keys that every one of them attends.
struct RowRanges {
  int32_t *low, *high;                // (rows), none for the rows of the last group that do not exist
  int32_t *group_low, *group_high;    // (rows / kRows)
  int32_t *common_low, *common_high;  // (rows / kRows)
  int32_t begin = 0, end = 0;         // union over the block

  RowRanges(int64_t capacity, Arena& arena)
      : low(arena.take<int32_t>(capacity)),
        high(arena.take<int32_t>(capacity)),
        group_low(arena.take<int32_t>(capacity / kRows)),
        group_high(arena.take<int32_t>(capacity / kRows)),
        common_low(arena.take<int32_t>(capacity / kRows)),
        common_high(arena.take<int32_t>(capacity / kRows)) {}
  void fill(const Sequence& s, int64_t first, int64_t rows) {
    take(rows, [&](int64_t i, int32_t* lo, int32_t* hi) { s.interval(first + i, lo, hi); });
  }
  // Those of `rows` rows that have these, of keys [from, to) alone.
  void clip(const RowRanges& all, int64_t rows, int64_t from, int64_t to) {
    take(rows, [&](int64_t i, int32_t* lo, int32_t* hi) {
      *lo = (int32_t)max64(all.low[i], from);
      *hi = (int32_t)min64(all.high[i], to);
      if (*lo >= *hi) *lo = INT32_MAX, *hi = 0;
    });
  }
  // Takes interval(i, low, high) of each row.
  template <class Interval>
  FASTATTN_INLINE_MEMBER void take(int64_t rows, const Interval& interval) {
    begin = INT32_MAX;
    end = 0;
    for (int64_t g = 0; g * kRows < rows; g++) {
      int32_t lo = INT32_MAX, hi = 0, common_lo = 0, common_hi = INT32_MAX;
      for (int64_t i = g * kRows; i < (g + 1) * kRows; i++) {
        if (i < rows)
          interval(i, low + i, high + i);
        else
          low[i] = INT32_MAX, high[i] = 0;
        lo = low[i] < lo ? low[i] : lo;
        hi = high[i] > hi ? high[i] : hi;
        common_lo = low[i] > common_lo ? low[i] : common_lo;
        common_hi = high[i] < common_hi ? high[i] : common_hi;
      }
      group_low[g] = lo;
      group_high[g] = hi;
      common_low[g] = common_lo;
      common_high[g] = common_hi;
      begin = lo < begin ? lo : begin;
      end = hi > end ? hi : end;
    }
  }
  // Whether the rows of group g attend some, or every one of them all, of the columns of the panel at key `key`.
  bool meets(int64_t g, int64_t key) const { return group_high[g] > key && group_low[g] < key + kPanel; }
  bool covers(int64_t g, int64_t key) const { return common_low[g] <= key && common_high[g] >= key + kPanel; }
};

// Columns [begin, end) of a tile of keys from `first` on that a group of rows needs, in whole panels.
struct Columns {
  int64_t begin, end;
  Columns(int64_t begin, int64_t end) : begin(begin), end(end) {}
  Columns(const RowRanges& r, int64_t g, int64_t first, int64_t keys) {
    const int64_t lo = max64(r.group_low[g] - first, 0), hi = min64(r.group_high[g] - first, keys);
    begin = lo < hi ? lo / kPanel * kPanel : 0;
    end = lo < hi ? round_up(hi, kPanel) : 0;
  }
  bool empty() const { return begin >= end; }
  bool operator==(const Columns& other) const { return begin == other.begin && end == other.end; }
};

// Which keys of a tile one row attends, by vectors of columns.
struct RowMask {
  int32_t low, high;     // in columns of the tile
  const uint8_t* dense;  // its row of the dense mask from the tile's first column on, or null
  int64_t keys;          // columns that exist

  // Row `row` of the sequence, at `index` of the ranges, in a tile of keys from `n` on; dense counts only in a mixed
  // tile.
  RowMask(const MaskParams& mask, const Sequence& s, const RowRanges& ranges, int64_t head, int64_t row, int64_t index,
          int64_t n, int64_t keys, bool mixed)
      : low(ranges.low[index] - (int32_t)n), high(ranges.high[index] - (int32_t)n), dense(nullptr), keys(keys) {
    if (mixed) dense = dense_row(mask, s, head, row, n);
  }
  bool all(const Columns& c) const { return !dense && low <= c.begin && high >= c.end; }
  vi at(int64_t column) const {
    const vi j = iota() + (int32_t)column;
    vi mask = (j >= low) & (j < high);
    if (dense) {
      if (column + W <= keys) {
        mask &= load_bools(dense + column);
      } else {
        uint8_t part[W] = {};
        if (column < keys) memcpy(part, dense + column, size_t(keys - column));
        mask &= load_bools(part);
      }
    }
    return mask;
  }
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
