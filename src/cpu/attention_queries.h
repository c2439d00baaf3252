// What the backward of tiled attention has of its queries: packed rows of q and dO, and the statistics of each row.
#pragma once

#include "attention_decode.h"

namespace fastattn {
namespace FASTATTN_ISA {

// The query side of one query head, packed: rows as the left operand and as the right one.
template <class Unit>
struct PackedQueries {
  using Word = typename Unit::Word;
  int64_t capacity, q_steps, o_steps, q_columns, o_columns, slices;
  int64_t share_words;  // floats of one slice's dQ
  int64_t row_words;    // floats of one slice's sums of dS along rows, 0: not asked for
  int64_t distances;    // and along diagonals

  PackedQueries(const Problem& problem, int64_t rows, int64_t slices, bool row_sums, int64_t distances)
      : capacity(rows),
        q_steps(steps_of<Unit>(problem.head_dim)),
        o_steps(steps_of<Unit>(problem.value_dim)),
        q_columns(round_up(problem.head_dim, W)),
        o_columns(round_up(problem.value_dim, W)),
        slices(slices),
        share_words(round_up(rows * q_columns, 16)),
        row_words(row_sums ? round_up(rows, 16) : 0),
        distances(round_up(distances, 16)) {}

  struct View {
    Word *rows, *grad_rows, *panels, *grad_panels;
    float* statistic;  // softmax: the shift of x * c, NaN where the row's scores are large; softplus: 1 / row sum, or
                       // -1 where the weights are softmax's; given weights: 1 / row sum
    float* delta;      // sum(dO * O) - dlse
    float* shares;     // (slices, capacity, q_columns) of dQ / scale
    float* row_sums;   // (slices, capacity) of dS, or nothing
    float* distances;  // (slices, distances) of dS, or nothing
  };
  View view(Arena& arena) const {
    View v;
    v.rows = arena.take<Word>(capacity * q_steps);
    v.grad_rows = arena.take<Word>(capacity * o_steps);
    v.panels = arena.take<Word>(steps_of<Unit>(capacity) * q_columns);
    v.grad_panels = arena.take<Word>(steps_of<Unit>(capacity) * o_columns);
    v.statistic = arena.take<float>(capacity);
    v.delta = arena.take<float>(capacity);
    v.shares = arena.take<float>(slices * share_words);
    v.row_sums = arena.take<float>(slices * row_words);
    v.distances = arena.take<float>(slices * distances);
    return v;
  }
};

// Rows [first, first + rows) of one head to its packed operands and statistics, from packed row `at` on.
template <class Unit, class Score>
static void pack_queries(const Problem& problem, const PackedQueries<Unit>& packed,
                         const typename PackedQueries<Unit>::View& to, const Sequence& s, int64_t head, int64_t first,
                         int64_t at, int64_t rows) {
  const AttentionParams& p = problem.p;
  const int64_t row = s.q_begin + first;
  const Matrix q = matrix(p.q, s.batch, head, row), grad = matrix(p.grad_out, s.batch, head, row);
  pack_rows<Unit>(to.rows + at * packed.q_steps, packed.q_steps, q, rows, problem.head_dim, problem.sign);
  pack_rows<Unit>(to.grad_rows + at * packed.o_steps, packed.o_steps, grad, rows, problem.value_dim, 1.0f);
  const int64_t capacity = steps_of<Unit>(packed.capacity);
  pack_panels<Unit>(to.panels, capacity, at / Unit::kStep, q, rows, problem.head_dim);
  pack_panels<Unit>(to.grad_panels, capacity, at / Unit::kStep, grad, rows, problem.value_dim);
  const int64_t padded = round_up(rows, kRows);
  memset(to.statistic + at, 0, size_t(padded) * 4);
  memset(to.delta + at, 0, size_t(padded) * 4);
  if (!Score::kNormalised) return;
  const Matrix out = matrix(p.out, s.batch, head, row);
  const auto statistic = [&](const Tensor& t) {
    return (float*)t.data + s.batch * t.stride[1] + head * t.stride[2] + row * t.stride[3];
  };
  const float* lse = statistic(p.lse);
  for (int64_t i = 0; i < rows; i++) {
    const double z = lse[i * p.lse.stride[3]];
    const bool nothing = Score::kGiven ? z == 0 : z == -__builtin_inf();
    float delta = nothing ? 0.0f : dot_rows(grad, i, out, i, problem.value_dim);
    if (p.residual.data && !nothing)
      delta += dot_rows(grad, i, matrix(p.residual, s.batch, head, row), i, problem.value_dim);
    if (p.grad_lse.data && !nothing) delta -= statistic(p.grad_lse)[i * p.grad_lse.stride[3]];
    to.delta[at + i] = delta;
    if (p.grad_sink.data) {  // -delta is what the sink's score, whose value is 0, has as dS / P
      const double weight = nothing ? 0 : __builtin_exp(((const float*)p.sink.data)[head * p.sink.stride[3]] - z);
      statistic(p.grad_sink)[i * p.grad_sink.stride[3]] = (float)(-weight * delta);
    }
    if (p.grad_row_bias.data && packed.row_words == 0)
      statistic(p.grad_row_bias)[i * p.grad_row_bias.stride[3]] =
          p.grad_lse.data && !nothing ? statistic(p.grad_lse)[i * p.grad_lse.stride[3]] : 0.0f;
    if (Score::kGiven) {
      to.statistic[first + i] = nothing ? 0.0f : (float)(1 / z);
    } else if (Score::kMaximum) {
      const RowState& state = *row_state(p.state, s, head, first + i);
      const float c = exponent_of(problem);
      to.statistic[at + i] = is_large(state.top, c) ? __builtin_nanf("") : shift_of(state, c);
    } else {
      const bool limit = Score::kLimit && row_state(p.state, s, head, first + i)->top > -__builtin_inff();
      to.statistic[at + i] = nothing ? 0.0f : limit ? -1.0f : (float)__builtin_exp(-z);
    }
  }
}

// Scores of one row to its weights and, where the score has them apart, slopes.
template <class Score, bool kMasked>
FASTATTN_INLINE void weigh_row(float* x, float* slope, const Columns& columns, float c, const ScoreRow& constants,
                               const RowMask& mask) {
  for (int64_t j = columns.begin; j < columns.end; j += W) {
    vf t, w = Score::weight_and_slope(load(x + j), c, constants, &t);
    if (kMasked) {
      const vi attended = mask.at(j);
      w = keep(attended, w);
      t = keep(attended, t);
    }
    store(x + j, w);
    if (Score::kSlope) store(slope + j, t);
  }
}

// f(tile) for those of the queries of one head that may attend the keys from n on.
template <class F>
FASTATTN_INLINE void each_query_tile(const Problem& problem, const Tiles& tiles, const Sequence& s, int64_t head,
                                     int64_t n, const F& f) {
  if (!problem.lists.on()) {
    for (int64_t tile = 0; tile < tiles.count(s.q_length); tile++) f(tile);
    return;
  }
  const List list = problem.lists.of_keys(s.batch, head, n);
  for (const int32_t* block = list.begin; block < list.end; block++)
    for (int64_t part = 0; part < tiles.parts; part++) f(*block * tiles.parts + part);
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
