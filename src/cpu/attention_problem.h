// What an attention call asks for, sequence by sequence: where its elements are and what becomes of its scores.
#pragma once

#include "attention_dropout.h"
#include "attention_lists.h"
#include "math.h"
#include "pack.h"
#include "parallel.h"
#include "attention_score.h"
#include "score_machine.h"

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
  Dropout dropout;
  Lists lists;
  ScoreMachine program, masked_program;

  explicit Problem(const AttentionParams& params)
      : p(params), dropout(params), lists(params, params.q.size[1], params.q.size[2], params.k.size[2]) {
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
    if (p.program.data) program.prepare(p, p.program, p.grad_out.data);
    if (p.masked_program.data) masked_program.prepare(p, p.masked_program, p.grad_out.data);
  }

  // What is added to scores, or a program in place of it.
  bool has_bias() const { return p.bias.data || p.distances.data || program.on(); }
  // The program of a tile, if there is one.
  const ScoreMachine& machine(bool mixed) const { return mixed && masked_program.on() ? masked_program : program; }
  // A tile's class where no table of classes has it.
  int kind() const { return p.dense.data || p.masked_program.data ? 2 : 1; }
  // Whether scores are formed in base e before they are weighed: a soft cap, a tensor bias or a program needs them so.
  bool in_base_e() const { return has_bias() || p.softcap > 0; }
  // Whether nothing but the scale stands between products and weights, which may then be formed in registers.
  bool direct() const { return !in_base_e() && !dropout.on(); }

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

// x = cap * tanh(x * size / cap) over the columns of one row, scores in base e; slope, if given, becomes
// 1 - tanh^2(x * size / cap), formed without a difference of nearly equal numbers.
FASTATTN_NOINLINE void cap_scores(float* x, const Columns& columns, float size, float cap, float* slope) {
  const float factor = size / cap;
  for (int64_t j = columns.begin; j < columns.end; j += 2 * W) {
    vf y[2], t[2], left[2], largest = splat(0.0f);
    FASTATTN_EACH(i, 2) {
      y[i] = load(x + j + i * W) * factor;
      largest = vmax(vabs(y[i]), largest);
      t[i] = tanh_small(y[i]);
      left[i] = 1.0f - t[i] * t[i];
    }
    // rare: a NaN is not seen by vmax, and stays one in tanh_small
    if (__builtin_expect(reduce_max(largest) >= kSmallTanh, 0)) FASTATTN_EACH(i, 2) {
        const vi small = vabs(y[i]) < splat(kSmallTanh);
        const vf e = exp2_bounded(vabs(y[i]) * (-2.0f * kLog2E)), whole = e + 1.0f;
        const vf large = (1.0f - e) / whole;
        t[i] = select(small, t[i], select(y[i] < 0.0f, -large, large));
        left[i] = select(small, left[i], 4.0f * e / (whole * whole));
      }
    FASTATTN_EACH(i, 2) store(x + j + i * W, t[i] * cap);
    if (slope) FASTATTN_EACH(i, 2) store(slope + j + i * W, left[i]);
  }
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

// What a row that store_row rounds loses by that.
FASTATTN_NOINLINE void store_residual(Matrix to, const float* from, int64_t columns, float factor) {
  with_dtype(to.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* out = (T*)to.data;
    const auto lost = [&](int64_t j) {
      const vf x = load(from + j) * factor, difference = x - rounded_to(x, out);
      return select(difference - difference == 0.0f, difference, vf{});  // an infinite output has none
    };
    int64_t j = 0;
    for (; j + W <= columns; j += W) store(out + j, lost(j));
    if (j < columns) store_n(out + j, lost(j), (int)(columns - j));
  });
}

// What multiplies a score once its row's maximum is off: a tensor bias leaves scores in base e.
FASTATTN_INLINE float exponent_of(const Problem& problem) { return problem.in_base_e() ? kLog2E : problem.c; }

// Rows of scaled products, `count` from `row` of a sequence on, for the program of their tile: x has those of its
// columns, its keys from `n` on, rows `stride` apart. What is kept of them begins at the same column.
FASTATTN_INLINE ScoreRows program_rows(const Problem& problem, const Sequence& s, int64_t head, int64_t row,
                                       int64_t count, int64_t n, const Columns& columns, float* x, int64_t stride) {
  const int64_t begin = columns.begin;
  return {s.batch, head, s.q_begin + row, s.k_begin + n + begin, count, columns.end - begin, x + begin, stride};
}

// Products of one row to scores, by the classes of the tiles that its columns are in, which those that decode do not go
// by.
FASTATTN_NOINLINE void run_by_class(const Problem& problem, const Sequence& s, int64_t head, int64_t row, int64_t n,
                                    const Columns& columns, float* x) {
  const AttentionParams& p = problem.p;
  const int64_t block_q = round_up(p.block_q, kRows), block_k = round_up(p.block_k, kPanel);
  for (int64_t j = columns.begin; j < columns.end; j += W) store(x + j, load(x + j) * problem.size);
  for (int64_t j = columns.begin, end; j < columns.end; j = end) {
    end = p.tile_class.data ? min64(columns.end, (n + j) / block_k * block_k + block_k - n) : columns.end;
    const uint8_t* of_tile = (const uint8_t*)plane(p.tile_class, s.batch, head, row / block_q, (n + j) / block_k, 1);
    const int kind = of_tile ? *of_tile : problem.kind();
    if (kind == 0)
      for (int64_t i = j; i < end; i += W) store(x + i, splat(-__builtin_inff()));
    else
      problem.machine(kind == 2).run(program_rows(problem, s, head, row, 1, n, Columns(j, end), x, 0));
  }
}

// Products of row `row` of a sequence, in place, to scores: x has those of the tile's columns, its keys from `n` on.
// Returns what multiplies them. slope: of the soft cap, as cap_scores gives it. Not those of a program, which has a
// tile's rows together.
FASTATTN_INLINE float make_scores(const Problem& problem, const Sequence& s, int64_t head, int64_t row, int64_t n,
                                  const Columns& columns, int64_t keys, float* x, float* slope = nullptr) {
  const AttentionParams& p = problem.p;
  float size = problem.size;
  if (p.softcap > 0) {
    cap_scores(x, columns, size, (float)p.softcap, slope);
    size = 1;
  }
  if (p.bias.data) {
    const int64_t width = p.bias.dtype == DType::f32 ? 4 : 2;
    add_bias(x, columns, size, plane(p.bias, s.batch, head, s.q_begin + row, s.k_begin + n, width), p.bias.dtype, keys);
  }
  if (p.distances.data) {  // the same numbers for the next row, shifted by one
    const float* of_head = (const float*)p.distances.data + head * p.distances.stride[2];
    const float* first = of_head + (n - row - s.offset + p.k.size[2] - 1);
    add_bias(x, columns, size, (const char*)first, DType::f32, keys);
  }
  return exponent_of(problem);
}

// Where the weights of a row stand among all that dropout draws for.
FASTATTN_INLINE DrawnRow drawn_row(const Problem& problem, const Sequence& s, int64_t head, int64_t row, int64_t n) {
  return {s.batch * problem.heads + head, s.q_begin + row, s.k_begin + n};
}

// log(e^a + e^b).
FASTATTN_INLINE double log_add(double a, double b) {
  const double top = a > b ? a : b, other = a > b ? b : a;
  if (top == -__builtin_inf() || top == __builtin_inf()) return top + (other != other ? other : 0);
  return top + __builtin_log1p(__builtin_exp(other - top));
}

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
  float factor = 1;  // of what is stored: the row's weights are divided by their sum, and those left by their share
  if (Score::kNormalised) {
    const bool nothing = Score::kGiven ? is_no_sum(sum) : sum == 0;
    factor = nothing ? 0.0f : 1 / sum;
    // -inf where nothing is attended; of given weights their sum
    double lse = Score::kGiven ? (nothing ? 0.0 : sum) : __builtin_log((double)sum);
    if (Score::kLimit && p.state.data) *row_state(p.state, s, head, row) = {-__builtin_inff(), (float)lse};
    if (Score::kMaximum) {
      const float c = exponent_of(problem);
      if (sum != 0) lse += divisor_exponent(top, c) * kLn2Double + s.bias;
      RowState state = row_state(top, c, sum);
      if (p.sink.data) {
        const double with_sink = log_add(lse, ((const float*)p.sink.data)[head * p.sink.stride[3]]);
        if (sum != 0) {
          factor *= (float)__builtin_exp(lse - with_sink);
          state.log_sum += (float)(with_sink - lse);
        }
        lse = with_sink;
      }
      if (p.state.data) *row_state(p.state, s, head, row) = state;
    }
    if (p.lse.data)
      ((float*)p.lse.data)[s.batch * p.lse.stride[1] + head * p.lse.stride[2] + s.q_begin + row] = (float)lse;
  }
  factor *= problem.dropout.scale;
  store_row(matrix(p.out, s.batch, head, s.q_begin + row), 0, from, columns, factor);
  if (p.residual.data) store_residual(matrix(p.residual, s.batch, head, s.q_begin + row), from, columns, factor);
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
