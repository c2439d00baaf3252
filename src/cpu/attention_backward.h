// Tiled attention backward: dV = P^T dO, dS = slope * (dO V^T - delta), dK = scale * dS^T Q, dQ = scale * dS K, with
// the weights P recomputed from the row statistics. Keys are the outer loop: a task owns the key blocks of one slice of
// one key head, so nobody else writes their dK and dV, and adds its share of dQ to a buffer of its own; shares are
// summed in order.
#pragma once

#include "attention_queries.h"
#include "attention_tables.h"

namespace fastattn {
namespace FASTATTN_ISA {

template <class Unit, class Score>
struct BackwardBlock {
  using Word = typename Unit::Word;
  using Queries = PackedQueries<Unit>;
  static constexpr int64_t kStep = Unit::kStep;

  static constexpr bool kPairs = kStep == 2;

  const Problem& problem;
  const Queries& packed;
  const Tiles& tiles;                // of queries, packed block_q rows apart
  int64_t block_q, block_k, row;     // row: columns between rows of a tile
  Word *keys, *key_panels, *values;  // K^T and V^T to contract head dims, K to contract keys
  float *grad_keys, *grad_values;    // (block_k, head dims)
  Word *weights_t, *grads_t;         // P and dS (block_q / kStep, row), to contract rows
  Word* grads;                       // dS (block_q, row / kStep), to contract keys: grads_t's memory for floats
  float* weights;                    // P: weights_t's memory for floats, a strip of kStrip groups otherwise
  bool apart;                        // whether slopes are not the weights, or have a sign for what was dropped
  float* slopes;                     // a strip, or the weights' memory where they are the slopes
  float* cap_slopes;                 // (row) of the soft cap, for one row
  RowRanges ranges;
  BiasBlock bias;
  TableGradients tables;

  static int64_t padded_row(int64_t block_k) { return round_up(block_k, 2 * kRows); }
  // Where weights and slopes have the first row of group g.
  static int64_t weight_row(int64_t g) { return (kPairs ? g % kStrip : g) * kRows; }
  int64_t slope_row(int64_t g) const { return apart ? g % kStrip * kRows : weight_row(g); }

  // Takes every buffer from the arena and touches none.
  BackwardBlock(const Problem& problem, const Queries& packed, const Tiles& tiles, const BiasUnits& units,
                int64_t block_q, int64_t block_k, Arena& arena)
      : problem(problem),
        packed(packed),
        tiles(tiles),
        block_q(block_q),
        block_k(block_k),
        row(padded_row(block_k)),
        keys(arena.take<Word>(block_k * packed.q_steps)),
        key_panels(arena.take<Word>(steps_of<Unit>(block_k) * packed.q_columns)),
        values(arena.take<Word>(block_k * packed.o_steps)),
        grad_keys(arena.take<float>(row * packed.q_columns)),
        grad_values(arena.take<float>(row * packed.o_columns)),
        weights_t(arena.take<Word>(block_q / kStep * row)),
        grads_t(arena.take<Word>(block_q / kStep * row)),
        grads(kPairs ? arena.take<Word>(block_q / kStep * row) : grads_t),
        weights(kPairs ? arena.take<float>(kStrip * kRows * row) : (float*)weights_t),
        apart(Score::kSlope || problem.p.softcap > 0 || problem.dropout.on()),
        slopes(apart ? arena.take<float>(kStrip * kRows * row) : weights),
        cap_slopes(arena.take<float>(problem.p.softcap > 0 ? row : 0)),
        ranges(block_q, arena),
        bias(problem, units, packed.capacity, row, packed.row_words > 0, arena),
        tables(problem, row, arena) {}

  // Keys [n, n + width) of one key head against every row of its query heads, packed in blocks from `first` on.
  void run(const Sequence& s, int64_t kv_head, int64_t n, int64_t width, const Blocks& heads, int64_t first,
           int64_t slice, int64_t part) {
    const AttentionParams& p = problem.p;
    const int64_t owned = width, there = min64(owned, s.keys - n);
    memset(grad_keys, 0, size_t(row * packed.q_columns) * 4);
    memset(grad_values, 0, size_t(row * packed.o_columns) * 4);
    if (there > 0 && s.q_length > 0) {
      pack_keys(matrix(p.k, s.batch, kv_head, s.k_begin + n), matrix(p.v, s.batch, kv_head, s.k_begin + n), there);
      for (int64_t g = 0; g < problem.group; g++) {
        Arena memory = heads[first + g];
        const typename Queries::View queries = packed.view(memory);
        const int64_t head = kv_head * problem.group + g;
        const BiasSums sums = bias.sums(s, head, g, n, part, queries.distances + slice * packed.distances);
        each_query_tile(problem, tiles, s, head, n, [&](int64_t index) {
          const int64_t m = tiles.first(index), rows = tiles.size(index, s.q_length);
          if (rows <= 0 || s.first_key(m) >= n + there || s.end_key(m + rows - 1) <= n) return;
          tile(s, head, m, index * block_q, rows, n, there, queries, slice, sums);
        });
      }
    }
    // rows of masked keys may have met leftovers of another tile in the last group of rows
    for (int64_t j = max64(there, 0); j < owned; j++) {
      memset(grad_keys + j * packed.q_columns, 0, size_t(packed.q_columns) * 4);
      memset(grad_values + j * packed.o_columns, 0, size_t(packed.o_columns) * 4);
    }
    const Matrix dk = matrix(p.grad_k, s.batch, kv_head, s.k_begin + n),
                 dv = matrix(p.grad_v, s.batch, kv_head, s.k_begin + n);
    for (int64_t j = 0; j < owned; j++) {
      store_row(dk, j, grad_keys + j * packed.q_columns, problem.head_dim, (float)p.scale);
      store_row(dv, j, grad_values + j * packed.o_columns, problem.value_dim, problem.dropout.scale);
    }
  }

  void pack_keys(const Matrix& k, const Matrix& v, int64_t there) {
    pack_transposed<Unit>(keys, k, there, problem.head_dim);
    pack_transposed<Unit>(values, v, there, problem.value_dim);
    pack_panels<Unit>(key_panels, steps_of<Unit>(block_k), 0, k, there, problem.head_dim);
  }

  void tile(const Sequence& s, int64_t head, int64_t m, int64_t at, int64_t rows, int64_t n, int64_t there,
            const typename Queries::View& queries, int64_t slice, const BiasSums& sums) {
    const AttentionParams& p = problem.p;
    const uint8_t* classes = (const uint8_t*)plane(p.tile_class, s.batch, head, m / block_q, n / block_k, 1);
    const int kind = classes ? *classes : problem.kind();
    if (kind == 0) return;
    ranges.fill(s, m, rows);
    const ScoreMachine& machine = problem.machine(kind == 2);
    const Tile tile{
        s, head, m, at, rows, n, there, queries, machine, kind == 2, Score::kMaximum && decodes(problem, s)};
    const int64_t groups = (rows + kRows - 1) / kRows;
    bias.begin_tile();
    for (int64_t g = 0; g < groups; g += kStrip) {  // dS follows while the weights are in the first cache
      const int64_t end = min64(groups, g + kStrip);
      make_weights(tile, g, end);
      if (bias.on || tile.sloped())
        make_slopes<true, true>(tile, g, end);
      else if (problem.dropout.on())
        make_slopes<true, false>(tile, g, end);
      else
        make_slopes<false, false>(tile, g, end);
      for (int64_t i = g; i < end && bias.on; i++) {
        const Columns columns(ranges, i, n, there);
        const int64_t count = min64(kRows, rows - i * kRows);
        if (tables.on) {
          tables.add(machine.program, bias.ds, i, columns, count, there, s.k_begin + n);
          continue;
        }
        float* row_sums = queries.row_sums + slice * packed.row_words;
        bias.add(sums, row_sums, i, columns, m + i * kRows, count, there);
      }
    }
    bias.end_tile(sums, there);
    contract_rows(weights_t, queries.grad_panels, at, rows, groups, n, there, grad_values, packed.o_columns);
    contract_rows(grads_t, queries.panels, at, rows, groups, n, there, grad_keys, packed.q_columns);
    float* share = queries.shares + slice * packed.share_words + at * packed.q_columns;
    contract_keys(share, groups, n, there);
  }

  // Rows [m, m + rows) of one query head, packed from `at` on, against keys [n, n + there).
  struct Tile {
    const Sequence& s;
    int64_t head, m, at, rows, n, there;
    const typename Queries::View& queries;
    const ScoreMachine& machine;  // its score program, if there is one
    bool mixed;                   // the dense mask counts
    bool decoded;                 // the forward was: its order of sums counts
    bool sloped() const { return machine.on() && machine.has_slope; }
    int64_t used() const { return round_up(there, kPanel); }
  };

  // Whether the weights of group g can be made of its scores while they are in registers.
  bool direct(const Tile& t, int64_t g) const {
    if (t.mixed || t.decoded || !problem.direct()) return false;
    const float* statistic = t.queries.statistic + t.at + g * kRows;
    bool result = true;
    for (int i = 0; i < kRows; i++) {
      if (Score::kMaximum) result &= statistic[i] == statistic[i];
      if (Score::kLimit) result &= !(statistic[i] < 0);
    }
    return result;
  }

  // Weights and slopes of groups [begin, end), and the pairs of weights.
  FASTATTN_NOINLINE_MEMBER void make_weights(const Tile& t, int64_t begin, int64_t end) {
    const Word* q = t.queries.rows + t.at * packed.q_steps;
    const ScoreRow constants = Score::constants(t.s.bias);
    for (int64_t j = 0; j < t.there; j += kPanel)
      for (int64_t g = begin; g < end; g++) {
        const bool in_registers = direct(t, g);
        if (!ranges.meets(g, t.n + j)) {
          if (in_registers) clear_block(weights_t, g, j);
          continue;
        }
        if (t.decoded) continue;
        const Word *a = q + g * kRows * packed.q_steps, *b = keys + j * packed.q_steps;
        const float* statistic = t.queries.statistic + t.at + g * kRows;
        const auto weigh = [&](auto masked, vf(&x)[kRows][kVecs]) {
          weigh_block<decltype(masked)::value>(x, g, j, t.n, statistic, constants);
        };
        float* to = weights + weight_row(g) * row + j;
        if (t.machine.on()) {
          product<Unit>(a, packed.q_steps, b, packed.q_steps,
                        [&](int i, int v, vf x) { store(to + i * row + v * W, x * problem.size); });
        } else if (!in_registers) {
          product<Unit>(a, packed.q_steps, b, packed.q_steps,
                        [&](int i, int v, vf x) { store(to + i * row + v * W, x); });
        } else if (ranges.covers(g, t.n + j)) {
          product_block<Unit>(a, packed.q_steps, b, packed.q_steps,
                              [&](vf(&x)[kRows][kVecs]) { weigh(std::false_type{}, x); });
        } else {
          product_block<Unit>(a, packed.q_steps, b, packed.q_steps,
                              [&](vf(&x)[kRows][kVecs]) { weigh(std::true_type{}, x); });
        }
      }
    if (t.machine.on()) run_program(t, begin, end);
    for (int64_t g = begin; g < end; g++)
      if (!direct(t, g)) weigh_group(t, g);
  }

  // The scores of a block to weights and slopes, in registers, and to what the products read.
  template <bool kMasked>
  FASTATTN_INLINE_MEMBER void weigh_block(vf (&x)[kRows][kVecs], int64_t g, int64_t j, int64_t n,
                                          const float* statistic, ScoreRow constants) {
    float *w = weights + weight_row(g) * row + j, *slope = slopes + slope_row(g) * row + j;
    FASTATTN_UNROLL
    for (int i = 0; i < kRows; i++) {
      if (Score::kMaximum) constants.shift = statistic[i];
      if (Score::kNormalised && !Score::kMaximum) constants.factor = statistic[i];
      FASTATTN_UNROLL
      for (int v = 0; v < kVecs; v++) {
        vf t;
        x[i][v] = Score::weight_and_slope(x[i][v], problem.c, constants, &t);
        if (kMasked) {
          const vi key = iota() + (int32_t)(n + j + v * W);
          const vi attended = (key >= ranges.low[g * kRows + i]) & (key < ranges.high[g * kRows + i]);
          x[i][v] = keep(attended, x[i][v]);
          t = keep(attended, t);
        }
        if (!kPairs || !Score::kSlope) store(w + i * row + v * W, x[i][v]);
        if (Score::kSlope) store(slope + i * row + v * W, t);
        if (kPairs && i % 2 == 1) store_words(weights_t, g, j, i - 1, v, x[i - 1][v], x[i][v]);
      }
    }
  }

  // dS of groups [begin, end), as floats or as both pairs of rows and pairs of keys. kDropped: where a slope is
  // negative its weight was dropped, and the others' share of dP is scaled up; not of given weights, which are never
  // dropped and have slopes of any sign. kKept: kept for the bias too, before what is the soft cap's or the score
  // program's.
  template <bool kDropped, bool kKept>
  FASTATTN_NOINLINE_MEMBER void make_slopes(const Tile& t, int64_t begin, int64_t end) {
    const float scale_left = problem.dropout.scale;
    const bool keeps = kKept && bias.on, sloped = kKept && (problem.p.softcap > 0 || t.sloped());
    const Word* grad = t.queries.grad_rows + t.at * packed.o_steps;
    for (int64_t j = 0; j < t.there; j += kPanel)
      for (int64_t g = begin; g < end; g++) {
        if (!ranges.meets(g, t.n + j)) {
          clear_block(grads_t, g, j);
          continue;  // contract_keys does not read it
        }
        const float* slope = slopes + slope_row(g) * row + j;
        const float* delta = t.queries.delta + t.at + g * kRows;
        const int64_t kept = kKept ? BiasBlock::strip_row(g) * row + j : 0;
        product_block<Unit>(
            grad + g * kRows * packed.o_steps, packed.o_steps, values + j * packed.o_steps, packed.o_steps,
            [&](vf(&x)[kRows][kVecs]) {
              FASTATTN_UNROLL
              for (int i = 0; i < kRows; i++) {
                FASTATTN_UNROLL
                for (int v = 0; v < kVecs; v++) {
                  const vf slopes = load(slope + i * row + v * W);
                  if (kDropped && !Score::kGiven)
                    x[i][v] = vabs(slopes) * (keep(~((vi)slopes >> 31), x[i][v] * scale_left) - delta[i]);
                  else
                    x[i][v] = slopes * (x[i][v] - delta[i]);
                  if (keeps) store(bias.ds + kept + i * row + v * W, x[i][v]);
                  if (sloped) {  // the slope of a score that is not attended may be anything
                    const vf of_score = load(bias.cap_slopes + kept + i * row + v * W);
                    x[i][v] = select(x[i][v] == 0.0f, x[i][v], x[i][v] * of_score);
                  }
                  if (!kPairs) store((float*)grads + (g * kRows + i) * row + j + v * W, x[i][v]);
                  if (kPairs && v % 2 == 1)
                    store_factors((bf16*)grads + (g * kRows + i) * row + j + (v - 1) * W, x[i][v - 1], x[i][v]);
                  if (kPairs && i % 2 == 1) store_words(grads_t, g, j, i - 1, v, x[i - 1][v], x[i][v]);
                }
              }
            });
      }
  }

  // Rows i and i + 1 of group g as words of pairs: a tile of pairs has a word a column, (rows / 2, row).
  FASTATTN_INLINE_MEMBER void store_words(Word* tile, int64_t g, int64_t j, int i, int v, vf low, vf high) {
    if constexpr (kPairs) {
      const vu words = bf16_words(low, high);
      memcpy(tile + (g * kRows + i) / 2 * row + j + v * W, &words, sizeof words);
    }
  }
  // Zeros for a block that no row attends.
  void clear_block(Word* tile, int64_t g, int64_t j) {
    for (int64_t i = 0; i < kRows / kStep; i++) memset(tile + (g * kRows / kStep + i) * row + j, 0, kPanel * 4);
  }

  // Products of rows [begin, end), summed in the order of a forward that decodes: weights of products rounded in
  // another way than those of its row sum do not add up to 1, which in dQ leaves a share of what all keys have in
  // common.
  void decoded_products(const Tile& t, int64_t begin, int64_t end) {
    const AttentionParams& p = problem.p;
    const Matrix q = matrix(p.q, t.s.batch, t.head, t.s.q_begin + t.m),
                 k = matrix(p.k, t.s.batch, t.head / problem.group, t.s.k_begin + t.n);
    for (int64_t i = begin; i < end; i++) {
      float* x = weights + (weight_row(i / kRows) + i % kRows) * row;
      for (int64_t j = 0; j < t.there; j++) x[j] = dot_rows(q, i, k, j, problem.head_dim) * problem.sign;
      for (int64_t j = t.there; j < t.used(); j++) x[j] = 0;
    }
  }

  // Scores of a group in memory to normalised weights and slopes; what no row attends becomes zero.
  void weigh_group(const Tile& t, int64_t g) {
    const AttentionParams& p = problem.p;
    const Sequence& s = t.s;
    const int64_t used = t.used();
    ScoreRow constants = Score::constants(s.bias);
    const Columns columns(ranges, g, t.n, t.there);
    if (t.decoded && !t.machine.on()) decoded_products(t, g * kRows, min64(t.rows, (g + 1) * kRows));
    for (int64_t i = g * kRows; i < (g + 1) * kRows; i++) {
      float* x = weights + (weight_row(g) + i - g * kRows) * row;
      float* slope = slopes + (slope_row(g) + i - g * kRows) * row;
      if (i >= t.rows || columns.empty()) {
        memset(x, 0, size_t(used) * 4);
        if (slope != x) memset(slope, 0, size_t(used) * 4);
        continue;
      }
      const float statistic = t.queries.statistic[t.at + i];
      const bool limit = Score::kLimit && statistic < 0;
      if (limit && !t.machine.on()) decoded_products(t, i, i + 1);
      for (float* to : {x, slope}) {
        memset(to, 0, size_t(columns.begin) * 4);
        memset(to + columns.end, 0, size_t(used - columns.end) * 4);
      }
      float* const own_slopes =
          bias.on ? bias.cap_slopes + BiasBlock::strip_row(i / kRows, i % kRows) * row : cap_slopes;
      const float c = t.machine.on() ? exponent_of(problem)
                                     : make_scores(problem, s, t.head, t.m + i, t.n, columns, t.there, x, own_slopes);
      if (Score::kMaximum) constants.shift = shift_of(x, columns, *row_state(p.state, s, t.head, t.m + i), c);
      if (Score::kNormalised && !Score::kMaximum) constants.factor = statistic;
      const RowMask mask(p, s, ranges, t.head, t.m + i, i, t.n, t.there, t.mixed);
      if (limit) {
        constants.shift = shift_of(x, columns, *row_state(p.state, s, t.head, t.m + i), c);
        for (int64_t j = columns.begin; j < columns.end; j += W) {
          const vf w = keep(mask.at(j), SoftmaxScore<Arithmetic>::weight(load(x + j), c, constants));
          store(x + j, w);
          store(slope + j, w);
        }
        constants = Score::constants(s.bias);
      } else if (mask.all(columns)) {
        weigh_row<Score, false>(x, slope, columns, c, constants, mask);
      } else {
        weigh_row<Score, true>(x, slope, columns, c, constants, mask);
      }
      if (slope != x && !Score::kSlope)
        for (int64_t j = columns.begin; j < columns.end; j += W) store(slope + j, load(x + j));
      if (p.softcap > 0 && !bias.on)
        for (int64_t j = columns.begin; j < columns.end; j += W)
          store(slope + j, load(slope + j) * load(cap_slopes + j));
      if (problem.dropout.on())
        for_kept(problem.dropout, drawn_row(problem, s, t.head, t.m + i, t.n), columns, [&](int64_t j, vi kept) {
          store(x + j, keep(kept, load(x + j)));
          store(slope + j, select(kept, load(slope + j), -load(slope + j)));
        });
    }
    if constexpr (kPairs)
      for (int i = 0; i < kRows; i += 2)
        for (int64_t j = 0; j < used; j += W) {
          const float* from = weights + (weight_row(g) + i) * row + j;
          store_words(weights_t, g, j, i, 0, load(from), load(from + row));
        }
  }
  // Scores of groups [begin, end) by their program, those of the same columns together, and what is kept of them.
  void run_program(const Tile& t, int64_t begin, int64_t end) {
    for (int64_t g = begin, next; g < end; g = next) {
      const Columns columns(ranges, g, t.n, t.there);
      next = g + 1;
      while (next < end && columns == Columns(ranges, next, t.n, t.there)) next++;
      if (columns.empty()) continue;
      const int64_t first = g * kRows, last = min64(t.rows, next * kRows);
      float* x = weights + weight_row(g) * row;
      for (int64_t i = first; i < last; i++) {
        if (!t.decoded && !(Score::kLimit && t.queries.statistic[t.at + i] < 0)) continue;
        decoded_products(t, i, i + 1);
        for (int64_t j = columns.begin; j < columns.end; j += W) {
          float* at = x + (i - first) * row + j;
          store(at, load(at) * problem.size);
        }
      }
      ScoreRows rows = program_rows(problem, t.s, t.head, t.m + first, last - first, t.n, columns, x, row);
      const int64_t kept = BiasBlock::strip_row(g) * row + columns.begin;
      if (t.machine.has_slope) rows.slopes = bias.cap_slopes + kept;
      if (tables.on) rows.loads = tables.memory + kept, rows.apart = tables.apart;
      t.machine.run(rows);
    }
  }
  // to (keys, columns) += tile^T (keys, rows) * panels (rows, columns), over the rows that attend any of kRows keys.
  void contract_rows(const Word* tile_t, const Word* panels, int64_t at, int64_t rows, int64_t groups, int64_t n,
                     int64_t there, float* to, int64_t columns) {
    for (int64_t j = 0; j < there; j += kRows) {
      int64_t first = 0, end = groups;
      const auto misses = [&](int64_t g) {
        return ranges.group_high[g] <= n + j || ranges.group_low[g] >= n + j + kRows;
      };
      while (first < end && misses(first)) first++;
      while (first < end && misses(end - 1)) end--;
      const int64_t begin = first * kRows / kStep, steps = (min64(end * kRows, rows) + kStep - 1) / kStep - begin;
      if (steps <= 0) continue;
      for (int64_t d = 0; d < columns; d += kPanel) {
        const int64_t width = min64(kPanel, columns - d);
        add_product<Unit>(int(width / W), to + j * columns + d, columns, tile_t + begin * row + j, 1, row,
                          panels + d * steps_of<Unit>(packed.capacity) + (at / kStep + begin) * width, steps);
      }
    }
  }

  // dQ / scale += dS (rows, keys) * K (keys, columns).
  void contract_keys(float* to, int64_t groups, int64_t n, int64_t there) {
    const int64_t columns = packed.q_columns;
    for (int64_t d = 0; d < columns; d += kPanel) {
      const int64_t width = min64(kPanel, columns - d);
      for (int64_t g = 0; g < groups; g++) {
        const int64_t begin = max64(ranges.group_low[g] - n, 0) / kStep;
        const int64_t end = (min64(ranges.group_high[g] - n, there) + kStep - 1) / kStep;
        if (begin >= end) continue;
        add_product<Unit>(int(width / W), to + g * kRows * columns + d, columns,
                          grads + g * kRows * (row / kStep) + begin, row / kStep, 1,
                          key_panels + d * steps_of<Unit>(block_k) + begin * width, end - begin);
      }
    }
  }
};

template <class Unit, class Score>
static void backward_tiled(const AttentionParams& p) {
  const Problem problem(p);
  int64_t block_q = round_up(p.block_q, kRows), block_k = round_up(p.block_k, kPanel);
  int64_t longest_q = 0, longest_k = 0;
  for (int64_t i = 0; i < problem.sequences; i++) {
    const Sequence s = problem.sequence(i);
    longest_q = max64(longest_q, s.q_length);
    longest_k = max64(longest_k, s.k_length);
  }
  const bool lists = problem.lists.on();
  const Tiles tiles(longest_q, lists ? p.list_q : block_q, block_q, 1);
  const Tiles key_tiles(longest_k, lists ? p.list_k : block_k, block_k, kPanel);
  block_q = round_up(tiles.step, kRows);
  block_k = round_up(key_tiles.step, kPanel);
  const int64_t blocks = tiles.count(longest_q);
  const BiasUnits together(problem);
  const int64_t units = together.units, members = together.members;
  if (units * members == 0) return;
  // from what does not change with the documents, so that neither do their gradients
  const int64_t streams = together.streams;
  const int64_t least = streams >= 2 * p.threads ? 1 : (2 * p.threads + streams - 1) / streams;
  const int64_t slices = min64(even_parts(streams, p.threads, least), max64(1, key_tiles.count(p.k.size[2])));

  const bool row_sums = p.grad_row_bias.data && !(Score::kMaximum && !p.sink.data);
  const PackedQueries<Unit> packed(problem, blocks * block_q, slices, row_sums,
                                   p.grad_distances.data ? longest_q + longest_k : 0);
  const int64_t head_bytes = round_up(bytes_of([&](Arena& arena) { packed.view(arena); }), 64);
  const int64_t block_bytes = bytes_of(
      [&](Arena& arena) { BackwardBlock<Unit, Score>(problem, packed, tiles, together, block_q, block_k, arena); });
  const int64_t pair_bytes = problem.group * head_bytes;
  // Pairs packed at a time: some members of some units.
  const int64_t wave = max64(1, max64(p.pack_kib * 1024 / max64(pair_bytes, 1), p.threads / slices));
  const int64_t wave_members = together.rounds ? members : max64(1, min64(members, wave / units));
  int64_t wave_units = max64(1, min64(units, wave / wave_members));
  // in whole rounds of the threads: with 3 units, half of 2 threads would wait for the last one
  for (int64_t even = wave_units; wave_units < units && even * slices >= p.threads; even--)
    if (even * slices % p.threads == 0) {
      wave_units = even;
      break;
    }
  const bool small = slices == 1 && members == 1 && packed.distances == 0 && small_pairs(units, pair_bytes, p.threads);
  Blocks memory, queries;  // of each thread; packed, of each query head of each thread or of each pair of a wave
  with_scratch(0, [&](Arena& arena) {
    memory = arena.blocks(p.threads, block_bytes);
    queries = arena.blocks((small ? p.threads : wave_units * wave_members) * problem.group, head_bytes, 64);
  });
  memory.zero();

  // one tile of one of a pair's query heads, the `index`-th: view, sequence, query head, first row, packed row, rows
  const auto with_rows = [&](int64_t pair, int64_t index, int64_t slot, const auto& f) {
    const int64_t g = index / blocks, tile = index % blocks;
    const Sequence s = problem.sequence(pair / problem.kv_heads);
    const int64_t rows = tiles.size(tile, s.q_length);
    if (rows <= 0) return;
    Arena head = queries[slot * problem.group + g];
    f(packed.view(head), s, pair % problem.kv_heads * problem.group + g, tiles.first(tile), tile * block_q, rows);
  };
  const auto pack = [&](int64_t pair, int64_t index, int64_t slot) {
    with_rows(pair, index, slot,
              [&](const auto& view, const Sequence& s, int64_t head, int64_t first, int64_t at, int64_t rows) {
                pack_queries<Unit, Score>(problem, packed, view, s, head, first, at, rows);
                for (int64_t i = 0; i < slices; i++)
                  memset(view.shares + i * packed.share_words + at * packed.q_columns, 0,
                         size_t(round_up(rows, kRows) * packed.q_columns) * 4);
                if (first == 0) memset(view.distances, 0, size_t(slices * packed.distances) * 4);
                for (int64_t i = 0; i < slices && packed.row_words; i++)
                  memset(view.row_sums + i * packed.row_words + first, 0, size_t(rows) * 4);
              });
  };
  // the key blocks of one slice, each against a unit's members [first, first + count), packed from `slot` on
  const auto run = [&](int64_t unit, int64_t first, int64_t count, int64_t slice, int64_t slot, int thread,
                       int64_t copy) {
    Arena arena = memory[thread];
    BackwardBlock<Unit, Score> block(problem, packed, tiles, together, block_q, block_k, arena);
    block.tables.copy = copy;
    const int64_t one = together.pair(unit, 0);
    const Sequence s = problem.sequence(one / problem.kv_heads);
    for (int64_t tile = slice; tile < key_tiles.count(s.k_length); tile += slices) {
      const int64_t n = key_tiles.first(tile), width = key_tiles.size(tile, s.k_length);
      if (width <= 0) continue;
      block.bias.begin_panel(s);
      for (int64_t i = 0; i < count; i++) {
        const int64_t pair = together.pair(unit, first + i);
        if (pair < 0) continue;
        block.run(problem.sequence(pair / problem.kv_heads), pair % problem.kv_heads, n, width, queries,
                  (slot + i) * problem.group, slice, together.part(unit));
      }
      block.bias.end_panel(s, one % problem.kv_heads, n, width);
    }
  };
  const auto sum_shares = [&](int64_t pair, int64_t index, int64_t slot) {
    with_rows(
        pair, index, slot,
        [&](const auto& view, const Sequence& s, int64_t head, int64_t first, int64_t at, int64_t rows) {
          float* total = view.shares + at * packed.q_columns;
          for (int64_t i = 1; i < slices; i++)
            for (int64_t j = 0; j < rows * packed.q_columns; j += W)
              FASTATTN_ISA::store(total + j, load(total + j) + load(total + i * packed.share_words + j));
          const Matrix dq = matrix(p.grad_q, s.batch, head, s.q_begin + first);
          for (int64_t i = 0; i < rows; i++)
            store_row(dq, i, total + i * packed.q_columns, problem.head_dim, (float)p.scale);
          for (int64_t i = 0; i < rows && packed.row_words; i++) {
            float sum = 0;
            for (int64_t j = 0; j < slices; j++) sum += view.row_sums[j * packed.row_words + first + i];
            const Tensor& to = p.grad_row_bias;
            ((float*)to.data)[s.batch * to.stride[1] + head * to.stride[2] + (s.q_begin + first + i) * to.stride[3]] =
                sum;
          }
        });
  };

  // f(task, thread, copy): where gradients of tables are summed in copies, each has its tasks, in order
  const int64_t copies = p.grad_tables.data ? p.grad_tables.size[2] : INT64_MAX;
  const auto over_tasks = [&](int64_t count, const auto& f) {
    parallel_items(min64(count, copies), p.threads, [&](int64_t copy, int thread) {
      for (int64_t task = copy; task < count; task += min64(count, copies)) f(task, thread, copy);
    });
  };

  const int64_t pair_blocks = problem.group * blocks;
  if (small) {
    over_tasks(units, [&](int64_t unit, int thread, int64_t copy) {
      const int64_t pair = together.pair(unit, 0);
      for (int64_t i = 0; i < pair_blocks; i++) pack(pair, i, thread);
      run(unit, 0, 1, 0, thread, thread, copy);
      for (int64_t i = 0; i < pair_blocks; i++) sum_shares(pair, i, thread);
    });
    return;
  }
  for (int64_t first = 0; first < members; first += wave_members)
    for (int64_t begin = 0; begin < units; begin += wave_units) {
      const int64_t there = min64(wave_members, members - first), count = min64(wave_units, units - begin);
      const auto over_rows = [&](const auto& f) {
        parallel_items(count * there * pair_blocks, p.threads, [&](int64_t task, int) {
          const int64_t slot = task / pair_blocks, pair = together.pair(begin + slot / there, first + slot % there);
          if (pair >= 0) f(pair, task % pair_blocks, slot);
        });
      };
      over_rows(pack);
      over_tasks(count * slices, [&](int64_t task, int thread, int64_t copy) {
        run(begin + task / slices, first, there, task % slices, task / slices * there, thread, copy);
      });
      over_rows(sum_shares);
      // a head's sums along diagonals, sequence by sequence
      parallel_items(packed.distances ? problem.heads : 0, p.threads, [&](int64_t head, int) {
        for (int64_t slot = 0; slot < count * there; slot++) {
          const int64_t pair = together.pair(begin + slot / there, first + slot % there);
          if (pair < 0 || pair % problem.kv_heads != head / problem.group) continue;
          const Sequence s = problem.sequence(pair / problem.kv_heads);
          if (s.q_length == 0) continue;
          Arena arena = queries[slot * problem.group + head % problem.group];
          const float* from = packed.view(arena).distances;
          float* to = (float*)p.grad_distances.data + head * p.grad_distances.stride[2] + p.k.size[2] - s.k_length;
          for (int64_t i = 0; i < slices; i++)
            add_columns(to, from + i * packed.distances, 0, s.q_length + s.k_length - 1);
        }
      });
    }
}

template <class Unit>
static void backward_scored(const AttentionParams& p) {
  Scores<Arithmetic>::visit(p.score, [&](auto score) { backward_tiled<Unit, decltype(score)>(p); });
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
