// A block of query rows against packed keys and values: scores, weights and their sums, tile by tile.
#pragma once

#include "attention_decode.h"

namespace fastattn {
namespace FASTATTN_ISA {

// Whether a row is divided by the sum of the rounded weights that its values were multiplied by. Where the largest
// weight is 1, which bf16 holds, there is no need; elsewhere a row of few keys, or of equal weights, would be off by
// their common rounding.
template <class Score, class Out>
constexpr bool kSumsRounded = Score::kNormalised && !Score::kMaximum && std::is_same_v<Out, bf16>;

// Weights of one row of scores over the columns, in place of them or as bf16; adds them to the row sum, and as they are
// rounded to that of rounded weights.
template <class Score, bool kMasked, class Out>
FASTATTN_INLINE void weigh_row(const float* x, Out* out, const Columns& columns, float c, const ScoreRow& constants,
                               const RowMask& mask, float* sum, float* rounded_sum) {
  vf total = Score::kNormalised ? load(sum) : vf{}, rounded{};
  static_assert(kPanel % (2 * W) == 0);
  for (int64_t j = columns.begin; j < columns.end; j += 2 * W) {
    vf w[2];
    FASTATTN_EACH(i, 2) {
      w[i] = Score::weight(load(x + j + i * W), c, constants);
      if (kMasked && !Score::kMaximum) w[i] = keep(mask.at(j + i * W), w[i]);
      if (Score::kNormalised) total += w[i];
    }
    store_factors(out + j, w[0], w[1]);
    if (kSumsRounded<Score, Out>) rounded += load(out + j) + load(out + j + W);
  }
  if (Score::kNormalised) store(sum, total);
  if (kSumsRounded<Score, Out>) store(rounded_sum, load(rounded_sum) + rounded);
}

template <class Unit, class Score>
struct ForwardBlock {
  using Word = typename Unit::Word;
  using Weight = std::conditional_t<Unit::kStep == 2, bf16, float>;
  static constexpr bool kRounded = kSumsRounded<Score, Weight>;

  const Problem& problem;
  int64_t block_q, block_k, q_steps, out_columns;
  Word* q;              // (block_q, q_steps)
  float* scores;        // (block_q, block_k)
  Weight* weights;      // (block_q, block_k), the scores' own memory when they are floats
  float* out;           // (block_q, out_columns)
  float* top;           // (block_q) running maximum of x
  float* sums;          // (block_q, W) running row sum, by lanes
  float* rounded_sums;  // (block_q, W) the same of rounded weights, where they are summed
  RowRanges ranges;

  ForwardBlock(const Problem& problem, int64_t block_q, int64_t block_k, Arena& arena)
      : problem(problem),
        block_q(block_q),
        block_k(block_k),
        q_steps(steps_of<Unit>(problem.head_dim)),
        out_columns(round_up(problem.value_dim, W)),
        q(arena.take<Word>(block_q * q_steps)),
        scores(arena.take<float>(block_q * block_k)),
        weights(Unit::kStep == 2 ? arena.take<Weight>(block_q * block_k) : (Weight*)scores),
        out(arena.take<float>(block_q * out_columns)),
        top(arena.take<float>(block_q)),
        sums(arena.take<float>(block_q * W)),
        rounded_sums(arena.take<float>(kRounded ? block_q * W : 0)),
        ranges(block_q, arena) {}

  // Rows [first, first + rows) of one query head of a sequence, against its packed keys and values.
  void run(const Sequence& s, int64_t head, int64_t first, int64_t rows, const PackedHead<Unit>& packed) {
    const AttentionParams& p = problem.p;
    const int64_t groups = (rows + kRows - 1) / kRows;
    ranges.fill(s, first, rows);
    memset(out, 0, size_t(groups * kRows * out_columns) * 4);
    memset(sums, 0, size_t(groups * kRows * W) * 4);
    if (kRounded) memset(rounded_sums, 0, size_t(groups * kRows * W) * 4);
    for (int64_t i = 0; i < groups * kRows; i++) top[i] = -__builtin_inff();
    if (ranges.begin < ranges.end)
      pack_rows<Unit>(q, q_steps, matrix(p.q, s.batch, head, s.q_begin + first), rows, problem.head_dim, problem.sign);
    const ScoreRow constants = Score::constants(s.bias);
    const uint8_t* classes = (const uint8_t*)plane(p.tile_class, s.batch, head, first / block_q, 0, 1);
    for (int64_t n = ranges.begin / block_k * block_k; n < ranges.end; n += block_k) {
      const int kind = classes ? classes[n / block_k] : p.dense.data ? 2 : 1;
      if (kind == 0) continue;
      for (int64_t g = 0; g < groups; g += kStrip) {
        const int64_t end = min64(groups, g + kStrip);
        score_tile(n, g, end, packed.keys, s.keys);
        weigh_tile(s, head, first, g * kRows, min64(rows, end * kRows), n, constants, kind == 2);
      }
      add_values(n, groups, packed.values, packed.capacity, s.keys);
    }
    if (kRounded) undo_common_rounding(rows);
    for (int64_t i = 0; i < rows; i++)
      finish_row_or_limit<Score>(problem, s, head, first + i, out + i * out_columns, reduce_add(load(sums + i * W)),
                                 top[i]);
  }

  // So that division by a row's sum is division by the sum of its rounded weights.
  void undo_common_rounding(int64_t rows) {
    for (int64_t i = 0; i < rows; i++) {
      const float sum = reduce_add(load(sums + i * W)), rounded = reduce_add(load(rounded_sums + i * W));
      const float factor = rounded == 0 ? 0.0f : sum / rounded;
      float* o = out + i * out_columns;
      for (int64_t j = 0; j < out_columns; j += W) store(o + j, load(o + j) * factor);
    }
  }

  FASTATTN_NOINLINE_MEMBER void score_tile(int64_t n, int64_t begin, int64_t groups, const Word* keys, int64_t count) {
    const int64_t end = min64(round_up(min64(ranges.end, count), kPanel), n + block_k);
    for (int64_t j = n; j < end; j += kPanel) {
      const Word* panel = keys + j * q_steps;
      for (int64_t g = begin; g < groups; g++) {
        if (ranges.group_high[g] <= j || ranges.group_low[g] >= j + kPanel) continue;
        float* to = scores + g * kRows * block_k + (j - n);
        product<Unit>(q + g * kRows * q_steps, q_steps, panel, q_steps,
                      [&](int i, int v, vf x) { store(to + i * block_k + v * W, x); });
      }
    }
  }

  void weigh_tile(const Sequence& s, int64_t head, int64_t first, int64_t begin, int64_t rows, int64_t n,
                  ScoreRow constants, bool mixed) {
    const AttentionParams& p = problem.p;
    const int64_t there = min64(block_k, s.keys - n);
    for (int64_t i = begin; i < rows; i++) {
      const Columns columns(ranges, i / kRows, n, there);
      if (columns.empty()) continue;
      float* x = scores + i * block_k;
      Weight* w = weights + i * block_k;
      float c = problem.c;
      if (p.bias.data) {
        const char* bias =
            plane(p.bias, s.batch, head, s.q_begin + first + i, s.k_begin + n, p.bias.dtype == DType::f32 ? 4 : 2);
        add_bias(x, columns, problem.size, bias, p.bias.dtype, there);
        c = kLog2E;
      }
      const RowMask mask(p, s, ranges, head, first + i, i, n, there, mixed);
      const bool all = mask.all(columns);
      if constexpr (Score::kMaximum) {
        if (!all)
          for (int64_t j = columns.begin; j < columns.end; j += W)
            store(x + j, select(mask.at(j), load(x + j), splat(-__builtin_inff())));
        raise_top(x, columns, c, i);
        constants.shift = shift_of(x, columns, top[i], c);
      }
      if (all || Score::kMaximum)
        weigh_row<Score, false>(x, w, columns, c, constants, mask, sums + i * W, rounded_sums + i * W);
      else
        weigh_row<Score, true>(x, w, columns, c, constants, mask, sums + i * W, rounded_sums + i * W);
    }
  }

  // The running maximum takes the row's scores in; what is summed so far is rescaled to a larger one.
  void raise_top(const float* x, const Columns& columns, float c, int64_t i) {
    vf a = splat(-__builtin_inff()), b = a;
    for (int64_t j = columns.begin; j < columns.end; j += 2 * W) {
      a = vmax(a, load(x + j));
      b = vmax(b, load(x + j + W));
    }
    const float found = reduce_max(vmax(a, b));
    if (!(found > top[i])) return;
    if (top[i] != -__builtin_inff()) {
      const float drop = (float)(divisor_exponent(top[i], c) - divisor_exponent(found, c));
      const vf factor = splat(exp2_bounded(splat(drop))[0]);
      float* o = out + i * out_columns;
      for (int64_t j = 0; j < out_columns; j += W) store(o + j, load(o + j) * factor);
      store(sums + i * W, load(sums + i * W) * factor);
    }
    top[i] = found;
  }

  void add_values(int64_t n, int64_t groups, const Word* values, int64_t capacity, int64_t count) {
    constexpr int64_t kStep = Unit::kStep;
    const int64_t weight_row = block_k / kStep;
    for (int64_t d = 0; d < out_columns; d += kPanel) {
      const int64_t width = min64(kPanel, out_columns - d);
      const Word* panel = values + d * capacity;
      for (int64_t g = 0; g < groups; g++) {
        const int64_t begin = max64(ranges.group_low[g], n) / kStep;
        const int64_t end = (min64(min64(ranges.group_high[g], count), n + block_k) + kStep - 1) / kStep;
        if (begin >= end) continue;
        add_product<Unit>(int(width / W), out + g * kRows * out_columns + d, out_columns,
                          (const Word*)weights + g * kRows * weight_row + (begin - n / kStep), weight_row, 1,
                          panel + begin * width, end - begin);
      }
    }
  }
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
