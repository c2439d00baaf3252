// What an attention call asks for, sequence by sequence: the keys each row may attend and where its elements are.
#pragma once

#include "../common/score.h"
#include "arena.h"
#include "pack.h"
#include "parallel.h"

namespace fastattn {
namespace FASTATTN_ISA {

struct Arithmetic {
  typedef vf V;
  static constexpr float kRound = FASTATTN_ISA::kRound;
  FASTATTN_INLINE vf exp2_bounded(vf x) { return FASTATTN_ISA::exp2_bounded(x); }
  FASTATTN_INLINE vf exp2_fraction(vf x) { return FASTATTN_ISA::exp2_fraction(x); }
  FASTATTN_INLINE vf scale_by_rounded(vf p, vf t) { return FASTATTN_ISA::scale_by_rounded(p, t); }
  FASTATTN_INLINE vf at_least(vf x, float low) { return FASTATTN_ISA::at_least(x, low); }
  FASTATTN_INLINE vf at_most(vf x, float high) { return FASTATTN_ISA::at_most(x, high); }
  FASTATTN_INLINE vf abs(vf x) { return vabs(x); }
  FASTATTN_INLINE vf select_negative(vf x, vf a, vf b) { return select(x < 0.0f, a, b); }
  FASTATTN_INLINE vf reciprocal(vf x) { return FASTATTN_ISA::reciprocal(x); }
};

constexpr int64_t kStrip = 4;  // groups of rows whose scores become weights before the next ones', in the first cache

constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.69314718f;
constexpr double kLn2Double = 0.693147180559945309;

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

struct Problem {
  const AttentionParams& p;
  int64_t heads, kv_heads, group, head_dim, value_dim;
  int64_t documents;  // -1: not packed
  int64_t sequences;  // packed: one more, the rows and keys after the last document
  float size;         // |scale|, or 1 for a scale of 0
  float c;            // size * log2(e)
  float sign;         // of the scale, or 0

  explicit Problem(const AttentionParams& params) : p(params) {
    heads = p.q.size[1];
    kv_heads = p.k.size[1];
    group = heads / kv_heads;
    head_dim = p.q.size[3];
    value_dim = p.v.size[3];
    documents = p.cu_seqlens_q.data ? p.cu_seqlens_q.size[3] - 1 : -1;
    sequences = documents < 0 ? p.q.size[0] : documents + 1;
    sign = p.scale > 0 ? 1.0f : p.scale < 0 ? -1.0f : 0.0f;
    size = p.scale == 0 ? 1.0f : (float)__builtin_fabs(p.scale);
    c = p.scale == 0 ? 1.0f : (float)(__builtin_fabs(p.scale) * 1.4426950408889634);
  }

  Sequence sequence(int64_t s) const {
    Sequence r;
    const auto index = [](const Tensor& t, int64_t i) { return (int64_t)((const int32_t*)t.data)[i]; };
    const bool after = s == documents;
    if (documents < 0) {
      r.batch = s;
      r.q_begin = r.k_begin = 0;
      r.q_length = p.q.size[2];
      r.k_length = p.k.size[2];
    } else {
      r.batch = 0;
      r.q_begin = index(p.cu_seqlens_q, s);
      r.k_begin = index(p.cu_seqlens_k, s);
      r.q_length = (after ? p.q.size[2] : index(p.cu_seqlens_q, s + 1)) - r.q_begin;
      r.k_length = (after ? p.k.size[2] : index(p.cu_seqlens_k, s + 1)) - r.k_begin;
    }
    r.keys = after ? 0 : r.k_length;
    r.offset = r.k_length - r.q_length;
    if (p.key_lengths.data && !after) {
      const int64_t n = index(p.key_lengths, s);
      r.keys = min64(r.keys, length_of(n));
      if (n < 0) r.offset = r.keys - r.q_length;
    }
    r.prefix = p.prefix_lengths.data && !after ? index(p.prefix_lengths, s) : 0;
    r.causal = p.causal;
    r.window_left = p.window_left;
    r.window_right = p.window_right;
    r.bias = p.default_bias ? -__builtin_log((double)max64(r.keys, 1)) : p.bias_value;
    return r;
  }
};

// Rows from `row` on of one head.
FASTATTN_INLINE Matrix matrix(const Tensor& t, int64_t batch, int64_t head, int64_t row) {
  const int64_t offset = batch * t.stride[0] + head * t.stride[1] + row * t.stride[2];
  const int64_t width = t.dtype == DType::f32 ? 4 : 2;
  return {(const char*)t.data + offset * width, t.stride[2], t.dtype};
}

// Whether a thread should pack and finish a sequence's key head alone: there are enough of them for every thread, and
// what is packed of one stays in the thread's own cache.
FASTATTN_INLINE bool small_pairs(int64_t pairs, int64_t packed_bytes, int threads) {
  return pairs >= 4 * threads && packed_bytes <= (256 << 10);
}

// The keys that the rows of one block attend: [low, high) of each row, and their union for each kRows rows.
struct RowRanges {
  int32_t *low, *high;              // (rows)
  int32_t *group_low, *group_high;  // (rows / kRows)
  int32_t begin = 0, end = 0;       // union over the block

  RowRanges(int64_t capacity, Arena& arena)
      : low(arena.take<int32_t>(capacity)),
        high(arena.take<int32_t>(capacity)),
        group_low(arena.take<int32_t>(capacity / kRows)),
        group_high(arena.take<int32_t>(capacity / kRows)) {}
  void fill(const Sequence& s, int64_t first, int64_t rows) {
    begin = INT32_MAX;
    end = 0;
    for (int64_t g = 0; g * kRows < rows; g++) {
      int32_t lo = INT32_MAX, hi = 0;
      for (int64_t i = g * kRows; i < min64(rows, (g + 1) * kRows); i++) {
        s.interval(first + i, low + i, high + i);
        lo = low[i] < lo ? low[i] : lo;
        hi = high[i] > hi ? high[i] : hi;
      }
      group_low[g] = lo;
      group_high[g] = hi;
      begin = lo < begin ? lo : begin;
      end = hi > end ? hi : end;
    }
  }
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
};

// One head's rows of a tensor broadcast to (B, H, Lq, Lk), null when absent.
FASTATTN_INLINE const char* plane(const Tensor& t, int64_t batch, int64_t head, int64_t row, int64_t column,
                                  int64_t width) {
  if (!t.data) return nullptr;
  return (const char*)t.data + (batch * t.stride[0] + head * t.stride[1] + row * t.stride[2] + column) * width;
}

// Which keys of a tile one row attends, by vectors of columns.
struct RowMask {
  int32_t low, high;     // in columns of the tile
  const uint8_t* dense;  // its row of the dense mask from the tile's first column on, or null
  int64_t keys;          // columns that exist

  // Row `row` of the sequence, at `index` of the ranges, in a tile of keys from `n` on; dense counts only in a mixed
  // tile.
  RowMask(const AttentionParams& p, const Sequence& s, const RowRanges& ranges, int64_t head, int64_t row,
          int64_t index, int64_t n, int64_t keys, bool mixed)
      : low(ranges.low[index] - (int32_t)n), high(ranges.high[index] - (int32_t)n), dense(nullptr), keys(keys) {
    if (mixed) dense = (const uint8_t*)plane(p.dense, s.batch, head, s.q_begin + row, s.k_begin + n, 1);
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

// x = x * size + bias over the columns of one row, scores in base e, so that what tells large biases apart is not
// rounded away; `bias` starts at the tile's first column.
FASTATTN_NOINLINE void add_bias(float* x, const Columns& columns, float size, const char* bias, DType dtype,
                                int64_t keys) {
  with_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* b = (const T*)bias;
    for (int64_t j = columns.begin; j < columns.end; j += W) {
      const vf add = j + W <= keys ? load(b + j) : j < keys ? load_n(b + j, (int)(keys - j)) : vf{};
      // -FLT_MAX, a finite mask, stays finite, times log2(e) too: rows of nothing else are the mean of the values, -inf
      // alone is nothing
      const vf finite = at_most(at_least(add, -2e38f), 2e38f);
      store(x + j, load(x + j) * size + select(add - add == vf{}, finite, add));
    }
  });
}

// Weights are 2^(x * c - top * c), `top` the row's maximum of x. Elsewhere one fused operation, whose rounded top * c
// is a factor of the whole row; a row of large scores, of which that factor would show, takes top off x first, exactly.
constexpr float kLargeScore = 64;
FASTATTN_INLINE bool is_large(float top, float c) {
  return !(__builtin_fabsf(top * c) <= kLargeScore) && __builtin_fabsf(top) < __builtin_inff();
}
// x - top, at most 0: another kernel's products may be rounded another way, and of 1e9 the last bit is 64.
FASTATTN_NOINLINE void subtract_top(float* x, const Columns& columns, float top) {
  for (int64_t j = columns.begin; j < columns.end; j += W) store(x + j, at_most(load(x + j) - top, 0.0f));
}
// log2 of what either way divides a row's weights by, to the last bit.
FASTATTN_INLINE double divisor_exponent(float top, float c) {
  return is_large(top, c) ? (double)top * c : (double)(top * c);
}
// Prepares a row of scores for weights relative to its maximum: the shift to take off x * c.
FASTATTN_INLINE float shift_of(float* x, const Columns& columns, float top, float c) {
  if (is_large(top, c)) {
    subtract_top(x, columns, top);
    return 0;
  }
  return top == -__builtin_inff() ? 0.0f : top * c;
}

// A row of `columns` floats times `factor` to memory of any dtype.
FASTATTN_NOINLINE void store_row(Matrix to, int64_t row, const float* from, int64_t columns, float factor) {
  with_dtype(to.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* out = (T*)to.data + row * to.stride;
    int64_t j = 0;
    for (; j + W <= columns; j += W) store(out + j, load(from + j) * factor);
    if (j < columns) store_n(out + j, load(from + j) * factor, (int)(columns - j));
  });
}

// What multiplies a score once its row's maximum is off: a tensor bias leaves scores in base e.
FASTATTN_INLINE float exponent_of(const Problem& problem) { return problem.p.bias.data ? kLog2E : problem.c; }

// A row's log-sum-exp in two numbers, its maximum of x and the logarithm of its sum of weights relative to it.
struct RowState {
  float top, log_sum;
};
FASTATTN_INLINE RowState* row_state(const Tensor& t, const Sequence& s, int64_t head, int64_t row) {
  return (RowState*)((float*)t.data + s.batch * t.stride[0] + head * t.stride[1] + (s.q_begin + row) * t.stride[2]);
}
// From the sum of weights as `divisor_exponent` has them divided; every weight of an empty row is 2^-inf.
FASTATTN_INLINE RowState row_state(float top, float c, double sum) {
  if (sum == 0) return {0, __builtin_inff()};
  return {top, (float)(__builtin_log(sum) + (divisor_exponent(top, c) - (double)top * c) * kLn2Double)};
}

// The output, log-sum-exp and state of one row of a sequence, from its weighted values, row sum and the maximum they
// are relative to.
template <class Score>
FASTATTN_INLINE void finish_row(const Problem& problem, const Sequence& s, int64_t head, int64_t row, const float* from,
                                int64_t columns, float sum, float top) {
  const AttentionParams& p = problem.p;
  float factor = 1;
  if (Score::kNormalised) {
    factor = sum == 0 ? 0.0f : 1 / sum;
    double lse = __builtin_log((double)sum);  // -inf where nothing is attended
    if (Score::kLimit && p.state.data) *row_state(p.state, s, head, row) = {-__builtin_inff(), (float)lse};
    if (Score::kMaximum) {
      const float c = exponent_of(problem);
      if (sum != 0) lse += divisor_exponent(top, c) * kLn2Double + s.bias;
      if (p.state.data) *row_state(p.state, s, head, row) = row_state(top, c, sum);
    }
    if (p.lse.data)
      ((float*)p.lse.data)[s.batch * p.lse.stride[1] + head * p.lse.stride[2] + s.q_begin + row] = (float)lse;
  }
  store_row(matrix(p.out, s.batch, head, s.q_begin + row), 0, from, columns, factor);
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
