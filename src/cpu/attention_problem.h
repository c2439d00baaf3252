// What an attention call asks for, sequence by sequence: where its elements are and what becomes of its scores.
#pragma once

#include "attention_mask.h"
#include "math.h"
#include "pack.h"
#include "parallel.h"
#include "attention_score.h"

namespace fastattn {
namespace FASTATTN_ISA {

constexpr int64_t kStrip = 4;  // groups of rows whose scores become weights before the next ones', in the first cache

constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.69314718f;
constexpr double kLn2Double = 0.693147180559945309;

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
    documents = documents_of(p);
    sequences = documents < 0 ? p.q.size[0] : documents + 1;
    sign = p.scale > 0 ? 1.0f : p.scale < 0 ? -1.0f : 0.0f;
    size = p.scale == 0 ? 1.0f : (float)__builtin_fabs(p.scale);
    c = p.scale == 0 ? 1.0f : (float)(__builtin_fabs(p.scale) * 1.4426950408889634);
  }

  Sequence sequence(int64_t s) const {
    Sequence r = sequence_of(p, s, documents, p.q.size[2], p.k.size[2]);
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

// The packed operands of one key head.
template <class Unit>
struct PackedHead {
  using Word = typename Unit::Word;
  int64_t capacity;  // steps of keys
  Word *keys, *values;

  PackedHead(const Problem& problem, int64_t length, Arena& arena)
      : capacity(steps_of<Unit>(length)),
        keys(arena.take<Word>(round_up(length, kPanel) * steps_of<Unit>(problem.head_dim))),
        values(arena.take<Word>(capacity * round_up(problem.value_dim, W))) {}
};

// Whether a thread should pack and finish a sequence's key head alone: there are enough of them for every thread, and
// what is packed of one stays in the thread's own cache.
FASTATTN_INLINE bool small_pairs(int64_t pairs, int64_t packed_bytes, int threads) {
  return pairs >= 4 * threads && packed_bytes <= (256 << 10);
}

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

// What a row of normalised weights takes off x * c, unless its scores are large.
FASTATTN_INLINE float shift_of(const RowState& state, float c) {
  return (float)((double)state.top * c + state.log_sum / kLn2Double);
}
// Prepares a row of scores for its normalised weights: the shift to take off x * c.
FASTATTN_INLINE float shift_of(float* x, const Columns& columns, const RowState& state, float c) {
  if (is_large(state.top, c)) {
    subtract_top(x, columns, state.top);
    return state.log_sum * kLog2E;
  }
  return shift_of(state, c);
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
