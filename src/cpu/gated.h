// Gated attention forward: causal softmax over scores whose distant part is gated by g = sigmoid(sharpness * a_i.a_j).
// A tile needs one more product, over groups; a block has the same rows of several heads, which share that product.
#pragma once

#include "attention_forward_block.h"
#include "attention_rows.h"

namespace fastattn {
namespace FASTATTN_ISA {

// The assignment of every sequence, packed once for all heads, for products over groups and for products over keys.
struct GatedProblem : Problem {
  const GatedParams& g;
  struct Packed {
    float *transposed, *panels;  // (groups, keys) in panels of keys; (keys, groups) in panels of groups
  };
  int64_t groups, group_columns;
  float sharpness;
  Packed* packed = nullptr;  // (sequences)

  explicit GatedProblem(const GatedParams& params)
      : Problem(params), g(params), groups(params.assignment.size[3]), group_columns(round_up(groups, W)) {
    sharpness = *(const float*)g.sharpness.data;
    with_scratch(1, [&](Arena& arena) {
      packed = arena.take<Packed>(sequences);
      for (int64_t i = 0; i < sequences; i++) {
        const int64_t keys = sequence(i).keys;
        float* transposed = arena.take<float>(round_up(keys, kPanel) * groups);
        float* panels = arena.take<float>(keys * group_columns);
        if (packed) packed[i] = {transposed, panels};
      }
    });
    for (int64_t i = 0; i < sequences; i++) {
      const Sequence s = sequence(i);
      pack_transposed<Singles>(packed[i].transposed, rows(s, s.k_begin), s.keys, groups);
      pack_panels<Singles>(packed[i].panels, s.keys, 0, rows(s, s.k_begin), s.keys, groups);
    }
  }
  Matrix rows(const Sequence& s, int64_t first) const {
    return {(const float*)g.assignment.data + s.batch * g.assignment.stride[1] + first * g.assignment.stride[2],
            g.assignment.stride[2], DType::f32};
  }
  const float* transposed(int64_t sequence) const { return packed[sequence].transposed; }
  const float* key_panels(int64_t sequence) const { return packed[sequence].panels; }
  int64_t index_of(const Sequence& s) const {
    if (documents < 0) return s.batch;
    int64_t low = 0;
    while (sequence(low).q_begin != s.q_begin || sequence(low).q_length != s.q_length) low++;
    return low;
  }

  // The begin and end of row i's window in a tile that starts at key n.
  int32_t near_column(const Sequence& s, int64_t i, int64_t n) const { return column(i + s.offset - g.window - n); }
  int32_t near_end(const Sequence& s, int64_t i, int64_t n) const { return column(i + s.offset + g.window + 1 - n); }
  static int32_t column(int64_t key) { return (int32_t)max64(min64(key, INT32_MAX / 2), -INT32_MAX / 2); }
};

constexpr int64_t kSharing = 4;  // heads that share a tile of gates, at most: their rows stay in the second-level cache

// The gates of one tile for rows of a sequence.
struct GateTile {
  const GatedProblem& problem;
  int64_t stride;  // columns
  float* gates;    // (block_q, stride) the gate, or log2 of it where it adds; 1 or 0 inside the window
  float* closed;   // (block_q, stride) 1 - gate, with its digits where the gate is all but 1; or null
  float* a;        // (block_q, groups)

  GateTile(const GatedProblem& problem, int64_t block_q, int64_t stride, bool with_closed, Arena& arena)
      : problem(problem),
        stride(stride),
        gates(arena.take<float>(block_q * stride)),
        closed(with_closed ? arena.take<float>(block_q * stride) : nullptr),
        a(arena.take<float>(block_q * problem.groups)) {}

  void load(const Sequence& s, int64_t first, int64_t rows) {
    pack_rows<Singles>(a, problem.groups, problem.rows(s, s.q_begin + first), rows, problem.groups, 1.0f);
  }

  // Gates of the tile of keys [n, n + there). Returns false if all attended pairs of the tile are inside the window.
  bool fill(const Sequence& s, int64_t sequence, const RowRanges& ranges, int64_t first, int64_t rows, int64_t n,
            int64_t there) {
    // without a prefix no key after a row is attended
    const bool after = problem.near_end(s, first, n) < min64(there, min64(s.prefix, ranges.end) - n);
    if (problem.near_column(s, first + rows - 1, n) <= 0 && !after) return false;
    tile_products<Singles>(gates, stride, a, problem.groups, problem.transposed(sequence) + n * problem.groups, ranges,
                           (rows + kRows - 1) / kRows, n, round_up(min64(there, ranges.end - n), kPanel));
    for (int64_t i = 0; i < rows; i++) {
      const Columns columns(ranges, i / kRows, n, there);
      const int32_t near = problem.near_column(s, first + i, n), end = problem.near_end(s, first + i, n);
      float *g = gates + i * stride, *h = closed ? closed + i * stride : nullptr;
      if (problem.g.gate == 0)
        after ? fill_row<false, true>(g, h, columns, near, end) : fill_row<false, false>(g, h, columns, near, end);
      else
        after ? fill_row<true, true>(g, h, columns, near, end) : fill_row<true, false>(g, h, columns, near, end);
    }
    return true;
  }

  template <bool kLogarithm, bool kAfter>
  void fill_row(float* g, float* h, const Columns& columns, int32_t near, int32_t end) const {
    for (int64_t j = columns.begin; j < columns.end; j += W) {
      const vi key = iota() + (int32_t)j;
      vi distant = key < near;
      if (kAfter) distant |= key >= end;
      const vf z = FASTATTN_ISA::load(g + j) * (problem.sharpness * -kLog2E);
      const vf odds = exp2_clamped(at_most(z, 124.0f));  // 1 / gate - 1, kept where reciprocal() holds
      const vf gate = reciprocal(1.0f + odds);
      if (kLogarithm)
        store(g + j, keep(distant, -log2_inverse(z)));
      else
        store(g + j, select(distant, gate, splat(1.0f)));
      if (h) store(h + j, keep(distant, odds * gate));
    }
  }
  // -log2(gate)
  FASTATTN_INLINE vf log2_inverse(vf z) {
    return SoftplusScore<Arithmetic>::softplus(z, exp2_clamped(-vabs(z))) * kLog2E;
  }
};

template <class Unit>
struct GatedBlock : ForwardBlock<Unit, SoftmaxScore<Arithmetic>> {
  using Base = ForwardBlock<Unit, SoftmaxScore<Arithmetic>>;
  const GatedProblem& gated;
  GateTile tile;
  Blocks heads;  // of each: rows of q, output, running sums and maxima

  GatedBlock(const GatedProblem& problem, int64_t block_q, int64_t block_k, int64_t count, Arena& arena)
      : Base(problem, block_q, block_k, arena), gated(problem), tile(problem, block_q, block_k, false, arena) {
    heads = arena.blocks(count, bytes_of([&](Arena& measure) { take_head(measure); }), 64);
  }

  void take_head(Arena& arena) {
    this->out = arena.take<float>(this->block_q * this->out_columns);
    this->sums = arena.take<float>(this->block_q * W);
    this->top = arena.take<float>(this->block_q);
    this->q = arena.take<typename Unit::Word>(this->block_q * this->q_steps);
  }
  // Switches the block to the h-th head.
  void turn_to(int64_t h) {
    Arena arena = heads[h];
    take_head(arena);
  }

  template <class Panels>
  void run(const BlockRows& block, const Sequence& s, int64_t sequence, const Panels& panels_of) {
    const AttentionParams& p = this->problem.p;
    const int64_t rows = block.span, count = block.count / rows, groups = (rows + kRows - 1) / kRows;
    this->ranges.fill(s, block.first, rows);
    for (int64_t h = 0; h < count; h++) {
      turn_to(h);
      memset(this->out, 0, size_t(groups * kRows * this->out_columns) * 4);
      memset(this->sums, 0, size_t(groups * kRows * W) * 4);
      for (int64_t i = 0; i < groups * kRows; i++) this->top[i] = -__builtin_inff();
      pack_rows<Unit>(this->q, this->q_steps, matrix(p.q, s.batch, block.head + h, s.q_begin + block.first), rows,
                      this->problem.head_dim, this->problem.sign);
    }
    tile.load(s, block.first, rows);
    for (int64_t n = this->ranges.begin / this->block_k * this->block_k; n < this->ranges.end; n += this->block_k) {
      const bool gates = tile.fill(s, sequence, this->ranges, block.first, rows, n, min64(this->block_k, s.keys - n));
      for (int64_t h = 0; h < count; h++) {
        const PackedPanels<Unit> panels = panels_of(h);
        turn_to(h);
        if (gates)
          score_gated_tile(n, groups, panels.key_panels(n), s.keys);
        else
          this->score_tile(n, 0, groups, panels.keys, s.keys);
        this->weigh_tile(s, block.head + h, block.first, 0, rows, n, ScoreRow{}, p.dense.data != nullptr);
        this->add_values(n, groups, panels.values, panels.capacity, s.keys);
      }
    }
    for (int64_t h = 0; h < count; h++) {
      turn_to(h);
      for (int64_t i = 0; i < rows; i++)
        finish_row<SoftmaxScore<Arithmetic>>(this->problem, s, block.head + h, block.first + i,
                                             this->out + i * this->out_columns, this->problem.value_dim,
                                             reduce_add(load(this->sums + i * W)), this->top[i]);
    }
  }

  void score_gated_tile(int64_t n, int64_t groups, const typename Unit::Word* panels, int64_t keys) {
    const int64_t columns = min64(round_up(min64(this->ranges.end, keys) - n, kPanel), this->block_k);
    float* to = this->scores;
    const float *gates = tile.gates, unit = 1 / this->problem.c;  // the score is multiplied by c later
    const auto products = [&](const auto& out) {
      for_tile_products<Unit>(this->block_k, this->q, this->q_steps, panels, this->ranges, groups, n, columns, out);
    };
    if (gated.g.gate == 0)
      products([&](int64_t at, vf x) { store(to + at, x * load(gates + at)); });
    else
      products([&](int64_t at, vf x) { store(to + at, x + load(gates + at) * unit); });
  }
};

template <class Unit>
static void gated_tiled(const GatedParams& p) {
  const GatedProblem problem(p);
  const Longest longest(problem);
  const int64_t block_q = round_up(p.block_q, kRows), block_k = round_up(p.block_k, kPanel);
  const int64_t blocks = problem.sequences * ((longest.q + block_q - 1) / block_q);
  int64_t most = kSharing;
  Together together(problem, most);
  while (most > 1 && blocks * together.units(problem) * together.chunks(problem) < 4 * p.threads)
    together = Together(problem, most /= 2);
  const int64_t bytes =
      bytes_of([&](Arena& arena) { GatedBlock<Unit>(problem, block_q, block_k, together.heads, arena); });
  for_packed_blocks<Unit>(
      problem, longest, block_q, bytes, false, together,
      [&](const BlockRows& rows, const Sequence& s, const auto& panels, Arena arena) {
        GatedBlock<Unit>(problem, block_q, block_k, together.heads, arena).run(rows, s, problem.index_of(s), panels);
      });
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
