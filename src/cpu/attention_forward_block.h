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

// How far, as a power of 2, a score may pass the maximum that its row's weights are relative to before that is raised:
// float32 and bf16 hold weights up to 2^16, and sums of them, as well as those up to 1.
constexpr float kPassed = 16;

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

// What a block of weights is in memory as.
enum class Formed { products, scores, weights };

template <class Unit, class Score>
struct ForwardBlock {
  using Word = typename Unit::Word;
  using Weight = std::conditional_t<Unit::kStep == 2, bf16, float>;
  using Short = std::conditional_t<Unit::kStep == 2, typename Score::template With<ShortArithmetic>, Score>;
  static constexpr bool kRounded = kSumsRounded<Score, Weight>;

  const Problem& problem;
  int64_t block_q, block_k, q_steps, out_columns;
  int64_t width;          // keys of the tile: block_k, or less where lists cut it
  Word* q;                // (block_q, q_steps)
  float* scores;          // (block_q, block_k)
  Weight* weights;        // (block_q, block_k), the scores' own memory when they are floats
  float* out;             // (block_q, out_columns)
  float* top;             // (block_q) what a row's weights are relative to: the maximum of x some keys ago
  float *shift, *limit;   // (block_q) of the scores x * c: what is taken off them; past it the maximum is raised
  int64_t* added;         // (block_q / kRows) the key up to which weighted values are in `out`
  float* sums;            // (block_q, W) running row sum, by lanes
  float* rounded_sums;    // (block_q, W) the same of rounded weights, where they are summed
  int64_t* top_keys;      // (block_q) the key of `top`, where it is wanted
  RowRanges ranges, all;  // of the tile; of every key, where blocks that are listed cut panels

  ForwardBlock(const Problem& problem, int64_t block_q, int64_t block_k, Arena& arena)
      : problem(problem),
        block_q(block_q),
        block_k(block_k),
        q_steps(steps_of<Unit>(problem.head_dim)),
        out_columns(round_up(problem.value_dim, W)),
        width(block_k),
        q(arena.take<Word>(block_q * q_steps)),
        scores(arena.take<float>(block_q * block_k)),
        weights(Unit::kStep == 2 ? arena.take<Weight>(block_q * block_k) : (Weight*)scores),
        out(arena.take<float>(block_q * out_columns)),
        top(arena.take<float>(block_q)),
        shift(arena.take<float>(block_q)),
        limit(arena.take<float>(block_q)),
        added(arena.take<int64_t>(block_q / kRows)),
        sums(arena.take<float>(block_q * W)),
        rounded_sums(arena.take<float>(kRounded ? block_q * W : 0)),
        top_keys(arena.take<int64_t>(problem.p.top_keys.data ? block_q : 0)),
        ranges(block_q, arena),
        all(problem.lists.cuts_panels() ? block_q : 0, arena) {}

  // Rows [first, first + rows) of one query head of a sequence, against its packed keys and values.
  void run(const Sequence& s, int64_t head, int64_t first, int64_t rows, const PackedHead<Unit>& packed) {
    const AttentionParams& p = problem.p;
    const int64_t groups = (rows + kRows - 1) / kRows;
    ranges.fill(s, first, rows);
    memset(out, 0, size_t(groups * kRows * out_columns) * 4);
    memset(sums, 0, size_t(groups * kRows * W) * 4);
    if (kRounded) memset(rounded_sums, 0, size_t(groups * kRows * W) * 4);
    for (int64_t i = 0; i < groups * kRows; i++) top[i] = limit[i] = -__builtin_inff(), shift[i] = 0;
    for (int64_t i = 0; i < rows && p.top_keys.data; i++) top_keys[i] = -1;
    if (ranges.begin < ranges.end)
      pack_rows<Unit>(q, q_steps, matrix(p.q, s.batch, head, s.q_begin + first), rows, problem.head_dim, problem.sign);
    const ScoreRow constants = Score::constants(s.bias);
    const uint8_t* classes = (const uint8_t*)plane(p.tile_class, s.batch, head, first / block_q, 0, 1);
    const bool cuts = problem.lists.cuts_panels();
    if (cuts) all.fill(s, first, rows);
    problem.lists.each_tile(s.batch, head, first, ranges.begin, ranges.end, block_k, [&](int64_t from, int64_t last) {
      const int64_t n = from / kPanel * kPanel;
      width = last - n;
      if (cuts) ranges.clip(all, rows, from, last);
      const int kind = classes ? classes[n / block_k] : problem.kind();
      if (kind == 0) return;
      for (int64_t g = 0; g < groups; g++) added[g] = n;
      const bool direct = kind == 1 && !problem.has_bias() && !problem.dropout.on();
      for (int64_t g = 0; g < groups && !direct; g += kStrip) {
        const int64_t end = min64(groups, g + kStrip);
        if (problem.program.on())
          score_tile<true>(n, g, end, packed.keys, s.keys);
        else
          score_tile<false>(n, g, end, packed.keys, s.keys);
        weigh_tile(s, head, first, g * kRows, min64(rows, end * kRows), n, constants, kind == 2);
      }
      if (direct) weigh_directly(s, head, first, rows, n, constants, packed);
      add_values(n, groups, packed.values, packed.capacity, s.keys, 0, added);
    });
    if (kRounded) undo_common_rounding(rows);
    for (int64_t i = 0; i < rows; i++)
      finish_row_or_limit<Score>(problem, s, head, first + i, out + i * out_columns, reduce_add(load(sums + i * W)),
                                 top[i]);
    if (p.top_keys.data) {
      const Tensor& t = p.top_keys;
      int64_t* to = (int64_t*)t.data + s.batch * t.stride[1] + head * t.stride[2] + s.q_begin + first;
      memcpy(to, top_keys, size_t(rows) * sizeof(int64_t));
    }
  }

  // The weights of a tile without dense mask, bias and dropout, made of scores in registers: no scores in memory but
  // those of blocks that raise a row's maximum, and of rows of large scores.
  void weigh_directly(const Sequence& s, int64_t head, int64_t first, int64_t rows, int64_t n,
                      const ScoreRow& constants, const PackedHead<Unit>& packed) {
    const int64_t groups = (rows + kRows - 1) / kRows;
    const int64_t end = min64(round_up(min64(ranges.end, s.keys), kPanel), n + width);
    for (int64_t j = n; j < end; j += kPanel)
      for (int64_t g = 0; g < groups; g++) {
        if (!ranges.meets(g, j)) continue;
        const Formed formed = ranges.covers(g, j) ? weigh_block<false>(g, j, n, constants, packed.keys)
                                                  : weigh_block<true>(g, j, n, constants, packed.keys);
        if (formed == Formed::weights) continue;
        add_values(n, g + 1, packed.values, packed.capacity, j, g, added);
        added[g] = j;
        const Columns columns(j - n, j - n + kPanel);
        for (int64_t i = g * kRows; i < min64(rows, (g + 1) * kRows); i++)
          weigh_columns(s, head, first, i, n, columns, constants, false, formed);
      }
  }

  // The weights of a panel of keys from j on for the rows of one group. Where some row's maximum has to be raised
  // first, the block's scores are in memory instead, and where some score is no small one of the soft cap's, its
  // products.
  template <bool kMasked>
  FASTATTN_NOINLINE_MEMBER Formed weigh_block(int64_t g, int64_t j, int64_t n, const ScoreRow& row, const Word* keys) {
    ScoreRow constants = row;
    Formed formed = Formed::weights;
    const int64_t stride = block_k;
    const float c = exponent_of(problem), cap = (float)problem.p.softcap;
    float* x_to = scores + g * kRows * stride + (j - n);
    Weight* w_to = weights + g * kRows * stride + (j - n);
    float *sum = sums + g * kRows * W, *rounded_sum = rounded_sums + g * kRows * W;
    const float *shifts = shift + g * kRows, *limits = limit + g * kRows;
    const int32_t *low = ranges.low + g * kRows, *high = ranges.high + g * kRows;
    product_block<Unit>(q + g * kRows * q_steps, q_steps, keys + j * q_steps, q_steps, [&](vf(&x)[kRows][kVecs]) {
      const auto attended = [&](int i, int v) {
        const vi key = iota() + (int32_t)(j + v * W);
        return (key >= low[i]) & (key < high[i]);
      };
      const auto leave = [&](Formed instead) {
        formed = instead;
        FASTATTN_UNROLL
        for (int i = 0; i < kRows; i++) {
          FASTATTN_UNROLL
          for (int v = 0; v < kVecs; v++) store(x_to + i * stride + v * W, x[i][v]);
        }
      };
      if (cap > 0 && !cap_small_scores(x, problem.size, cap)) return leave(Formed::products);
      if constexpr (Score::kMaximum) {
        vf passed = splat(-__builtin_inff());
        FASTATTN_UNROLL
        for (int i = 0; i < kRows; i++) {
          FASTATTN_UNROLL
          for (int v = 0; v < kVecs; v++)
            if (kMasked) x[i][v] = select(attended(i, v), x[i][v], splat(-__builtin_inff()));
          vf most = x[i][0];
          FASTATTN_UNROLL
          for (int v = 1; v < kVecs; v++) most = vmax(most, x[i][v]);
          passed = vmax(most * c - limits[i], passed);  // NaN, for a row of -inf before its first score, is none
        }
        if (__builtin_expect(reduce_max(passed) > 0.0f, 0)) return leave(Formed::scores);
      }
      FASTATTN_UNROLL
      for (int i = 0; i < kRows; i++) {
        if (Score::kMaximum) constants.shift = shifts[i];
        FASTATTN_UNROLL
        for (int v = 0; v < kVecs; v++) {
          x[i][v] = Short::weight(x[i][v], c, constants);
          if (kMasked && !Score::kMaximum) x[i][v] = keep(attended(i, v), x[i][v]);
        }
        vf total = x[i][0], rounded{};
        FASTATTN_UNROLL
        for (int v = 1; v < kVecs; v++) total += x[i][v];
        FASTATTN_UNROLL
        for (int v = 0; v < kVecs; v += 2) {
          Weight* to = w_to + i * stride + v * W;
          store_factors(to, x[i][v], x[i][v + 1]);
          if (kRounded) rounded += load(to) + load(to + W);
        }
        if (Score::kNormalised) store(sum + i * W, load(sum + i * W) + total);
        if (kRounded) store(rounded_sum + i * W, load(rounded_sum + i * W) + rounded);
      }
    });
    return formed;
  }

  // Products in registers to capped scores, as cap_scores has them, where every one is small enough for its short
  // formula; elsewhere they stay as they are.
  static FASTATTN_INLINE_MEMBER bool cap_small_scores(vf (&x)[kRows][kVecs], float size, float cap) {
    const float factor = size / cap;
    vf largest = splat(0.0f);
    FASTATTN_UNROLL
    for (int i = 0; i < kRows; i++) {
      FASTATTN_UNROLL
      for (int v = 0; v < kVecs; v++) largest = vmax(vabs(x[i][v]), largest);
    }
    if (__builtin_expect(!(reduce_max(largest) * factor < kSmallTanh), 0)) return false;
    FASTATTN_UNROLL
    for (int i = 0; i < kRows; i++) {
      FASTATTN_UNROLL
      for (int v = 0; v < kVecs; v++) x[i][v] = tanh_small(x[i][v] * factor) * cap;
    }
    return true;
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

  // Products of groups [begin, groups) to memory, of a program's scores as it has them.
  template <bool kScaled = false>
  FASTATTN_NOINLINE_MEMBER void score_tile(int64_t n, int64_t begin, int64_t groups, const Word* keys, int64_t count) {
    const int64_t end = min64(round_up(min64(ranges.end, count), kPanel), n + width);
    const float size = problem.size;
    for (int64_t j = n; j < end; j += kPanel) {
      const Word* panel = keys + j * q_steps;
      for (int64_t g = begin; g < groups; g++) {
        if (ranges.group_high[g] <= j || ranges.group_low[g] >= j + kPanel) continue;
        float* to = scores + g * kRows * block_k + (j - n);
        product<Unit>(q + g * kRows * q_steps, q_steps, panel, q_steps,
                      [&](int i, int v, vf x) { store(to + i * block_k + v * W, kScaled ? x * size : x); });
      }
    }
  }

  void weigh_tile(const Sequence& s, int64_t head, int64_t first, int64_t begin, int64_t rows, int64_t n,
                  const ScoreRow& constants, bool mixed) {
    const int64_t there = min64(width, s.keys - n);
    const ScoreMachine& machine = problem.machine(mixed);
    for (int64_t i = begin, end; i < rows; i = end) {  // groups of the same columns together
      const Columns columns(ranges, i / kRows, n, there);
      end = i + kRows;
      while (end < rows && columns == Columns(ranges, end / kRows, n, there)) end += kRows;
      end = min64(rows, end);
      if (columns.empty()) continue;
      if (machine.on())
        machine.run(program_rows(problem, s, head, first + i, end - i, n, columns, scores + i * block_k, block_k));
      for (int64_t r = i; r < end; r++)
        weigh_columns(s, head, first, r, n, columns, constants, mixed,
                      machine.on() ? Formed::scores : Formed::products);
    }
  }

  // Weights of row i's products, or scores, in memory over some columns of the tile at n.
  void weigh_columns(const Sequence& s, int64_t head, int64_t first, int64_t i, int64_t n, const Columns& columns,
                     ScoreRow constants, bool mixed, Formed formed = Formed::products) {
    const AttentionParams& p = problem.p;
    const int64_t there = min64(width, s.keys - n);
    float* x = scores + i * block_k;
    Weight* w = weights + i * block_k;
    const float c = formed == Formed::scores ? exponent_of(problem)
                                             : make_scores(problem, s, head, first + i, n, columns, there, x);
    const RowMask mask(p, s, ranges, head, first + i, i, n, there, mixed);
    const bool all = mask.all(columns);
    if constexpr (Score::kMaximum) {
      if (!all)
        for (int64_t j = columns.begin; j < columns.end; j += W)
          store(x + j, select(mask.at(j), load(x + j), splat(-__builtin_inff())));
      const float before = top[i];
      raise_top(x, columns, c, i);
      if (p.top_keys.data && top[i] > before) top_keys[i] = s.k_begin + n + key_of(x, columns, top[i]);
      constants.shift = shift_of(x, columns, top[i], c);
    }
    if (all || Score::kMaximum)
      weigh_row<Score, false>(x, w, columns, c, constants, mask, sums + i * W, rounded_sums + i * W);
    else
      weigh_row<Score, true>(x, w, columns, c, constants, mask, sums + i * W, rounded_sums + i * W);
    if (problem.dropout.on()) drop_row(problem.dropout, drawn_row(problem, s, head, first + i, n), w, columns);
  }

  // The first of a row's columns that has its maximum.
  static int64_t key_of(const float* x, const Columns& columns, float top) {
    int64_t j = columns.begin;
    while (j + 1 < columns.end && x[j] != top) j++;
    return j;
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
    // rows of large scores never become weights directly: every score passes the limit. Nor does a large score of
    // another row: what large scores are relative to is their maximum, as backward takes it for (subtract_top).
    const bool large = is_large(found, c);
    shift[i] = found * c;
    limit[i] = large ? -__builtin_inff() : __builtin_fminf(found * c + kPassed, kLargeScore);
  }

  // Adds the tile's weighted values up to key `count` to groups [first, groups), from key n or from[g] on.
  void add_values(int64_t n, int64_t groups, const Word* values, int64_t capacity, int64_t count, int64_t first = 0,
                  const int64_t* from = nullptr) {
    constexpr int64_t kStep = Unit::kStep;
    const int64_t weight_row = block_k / kStep;
    for (int64_t d = 0; d < out_columns; d += kPanel) {
      const int64_t wide = min64(kPanel, out_columns - d);
      const Word* panel = values + d * capacity;
      for (int64_t g = first; g < groups; g++) {
        const int64_t begin = max64(ranges.group_low[g], from ? from[g] : n) / kStep;
        const int64_t end = (min64(min64(ranges.group_high[g], count), n + width) + kStep - 1) / kStep;
        if (begin >= end) continue;
        add_product<Unit>(int(wide / W), out + g * kRows * out_columns + d, out_columns,
                          (const Word*)weights + g * kRows * weight_row + (begin - n / kStep), weight_row, 1,
                          panel + begin * wide, end - begin);
      }
    }
  }
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
