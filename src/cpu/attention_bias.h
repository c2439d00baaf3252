// The gradient of a tensor bias: sums of dS over the dims in which the bias is 1.
//
// A bias with a number for each key: the pairs (sequence, key head) that add to the same elements are a unit. A unit's
// key blocks are tasks, so no other task adds to their elements. Sums are float32. They are formed in the gradient,
// where a unit's pairs may come in several waves; or, for a 16-bit gradient, in a panel of the task (rows, keys of the
// block), which is rounded once and needs a unit's pairs in one wave. With `bias_parts` a unit's pairs have several
// sums, which the caller adds.
//
// A distance table: each row of dS is added to the sums of the previous row, shifted by one. Each slice of a head has
// its own sums, as for dQ.
//
// A bias without a number for each key: dS is summed along the row, slice by slice as dQ. For softmax without a sink no
// sum is needed: the weights of a row sum to 1, so its dS sums to dlse.
#pragma once

#include "attention_problem.h"

namespace fastattn {
namespace FASTATTN_ISA {

// The pairs (sequence * key heads + key head) that add to the same elements. Without such a gradient each is a unit.
struct BiasUnits {
  int64_t kv_heads, parts;
  bool by_sequence, by_head;  // whether sequences and heads have elements of their own
  int64_t units, members;     // parts counted as units; members of one at most
  int64_t streams;            // units, were the documents one sequence
  bool rounds;                // sums are in panels

  explicit BiasUnits(const Problem& problem) : kv_heads(problem.kv_heads), parts(1) {
    const Tensor& to = problem.p.grad_bias;
    by_sequence = !to.data || problem.documents >= 0 || problem.p.q.size[0] == 1 || to.stride[0] != 0;
    by_head = !to.data || problem.heads == 1 || to.stride[1] != 0;
    rounds = to.data && to.dtype != DType::f32;
    const int64_t of_heads = by_head ? kv_heads : 1;
    const int64_t whole = (by_sequence ? problem.sequences : 1) * of_heads;
    all_ = whole == 0 ? 0 : problem.sequences * kv_heads / whole;
    if (to.data) parts = max64(1, min64(problem.p.bias_parts, all_));
    units = whole * parts;
    members = (all_ + parts - 1) / parts;
    streams = (by_sequence ? problem.p.k.size[0] : 1) * of_heads * parts;
  }

  // The `member`-th pair of a unit, or -1. Every unit has a first pair.
  int64_t pair(int64_t unit, int64_t member) const {
    const int64_t whole = unit / parts, m = member * parts + unit % parts;
    if (m >= all_) return -1;
    if (by_sequence) return by_head ? whole : whole * kv_heads + m;
    return by_head ? m * kv_heads + whole : m;
  }
  int64_t part(int64_t unit) const { return unit % parts; }

 private:
  int64_t all_;  // pairs of a unit, all parts
};

// The address of a tile's sums for one head: row m begins at to + m * row. If row is 0, all rows share their sums.
struct BiasSums {
  float* to = nullptr;
  int64_t row = 0;
};

// to += x over columns [begin, end).
FASTATTN_INLINE void add_columns(float* to, const float* x, int64_t begin, int64_t end) {
  int64_t j = begin;
  for (; j + W <= end; j += W) store(to + j, load(to + j) + load(x + j));
  if (j < end) store_n(to + j, load_n(to + j, int(end - j)) + load(x + j), int(end - j));
}

// The sums of a task, and dS of a strip of groups from the tiles of one key block.
struct BiasBlock {
  const Problem& problem;
  int64_t row, rows;    // floats between rows of a tile; rows of a panel
  bool by_key, by_row;  // the gradient has a number for each key; for each row too
  bool on;              // dS is kept: for the bias, or for the loads of a score program
  int64_t heads;        // panels
  float *panel, *ds;    // (heads, rows, row); (kStrip * kRows, row)
  float* cap_slopes;    // (kStrip * kRows, row), of the soft cap or a score program
  float* columns_sum;   // (row), of one tile's rows

  BiasBlock(const Problem& problem, const BiasUnits& units, int64_t capacity, int64_t row, bool row_sums, Arena& arena)
      : problem(problem), row(row) {
    const Tensor& to = problem.p.grad_bias;
    const bool by_distance = problem.p.grad_distances.data;
    by_key = to.data || by_distance;
    by_row = by_distance || (by_key && (to.stride[2] != 0 || to.size[2] == 1));
    on = by_key || row_sums || problem.p.grad_tables.data;
    heads = units.by_head ? problem.group : 1;
    rows = by_row ? capacity : 1;
    panel = arena.take<float>(units.rounds ? heads * rows * row : 0);
    ds = arena.take<float>(on ? kStrip * kRows * row : 0);
    const bool sloped = problem.program.on() || (on && problem.p.softcap > 0);
    cap_slopes = arena.take<float>(sloped ? kStrip * kRows * row : 0);
    columns_sum = arena.take<float>(by_key && !by_row ? row : 0);
  }
  static int64_t strip_row(int64_t g, int64_t i = 0) { return g % kStrip * kRows + i; }

  bool rounds() const { return problem.p.grad_bias.data && problem.p.grad_bias.dtype != DType::f32; }
  void begin_panel(const Sequence& s) const {
    if (!rounds()) return;
    for (int64_t h = 0; h < heads; h++) memset(panel + h * rows * row, 0, size_t((by_row ? s.q_length : 1) * row) * 4);
  }
  // Rounds the panels of keys [n, n + owned) of one key head.
  void end_panel(const Sequence& s, int64_t kv_head, int64_t n, int64_t owned) const {
    if (!rounds()) return;
    const Tensor& t = problem.p.grad_bias;
    for (int64_t h = 0; h < heads; h++) {
      const char* to = plane(t, s.batch, kv_head * problem.group + h, s.q_begin, s.k_begin + n, 2);
      for (int64_t i = 0; i < (by_row ? s.q_length : 1); i++)
        store_row({to, t.stride[2], t.dtype}, i, panel + (h * rows + i) * row, owned, 1.0f);
    }
  }
  // The sums of query head `member` of a key head. distances: the head's own sums of a distance table.
  BiasSums sums(const Sequence& s, int64_t head, int64_t member, int64_t n, int64_t part, float* distances) const {
    if (!by_key) return {};
    if (problem.p.grad_distances.data) return {distances + (n - s.offset + s.k_length - 1), -1};
    const Tensor& t = problem.p.grad_bias;
    if (rounds()) return {panel + (heads > 1 ? member : 0) * rows * row, by_row ? row : 0};
    float* to = (float*)plane(t, s.batch, head, s.q_begin, s.k_begin + n, 4) + part * problem.p.bias_part;
    return {to, by_row ? t.stride[2] : 0};
  }

  void begin_tile() const {
    if (by_key && !by_row) memset(columns_sum, 0, size_t(row) * 4);
  }
  void end_tile(const BiasSums& sums, int64_t there) const {
    if (by_key && !by_row) add_columns(sums.to, columns_sum, 0, there);
  }
  // Adds dS of group g, which has `count` rows from row m of the sequence on.
  void add(const BiasSums& sums, float* row_sums, int64_t g, const Columns& columns, int64_t m, int64_t count,
           int64_t there) const {
    const int64_t end = min64(columns.end, there);
    for (int64_t i = 0; i < count; i++) {
      const float* x = ds + strip_row(g, i) * row;
      if (!by_key)
        row_sums[m + i] += sum(x, columns.begin, end);
      else if (by_row)
        add_columns(sums.to + (m + i) * sums.row, x, columns.begin, end);
      else
        add_columns(columns_sum, x, columns.begin, end);
    }
  }

 private:
  static float sum(const float* x, int64_t begin, int64_t end) {
    vf total{};
    int64_t j = begin;
    for (; j + W <= end; j += W) total += load(x + j);
    if (j < end) total += load_n(x + j, int(end - j));
    return reduce_add(total);
  }
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
