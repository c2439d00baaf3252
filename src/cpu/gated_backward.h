// Gated attention backward: softmax's backward with gates that a block's heads share. The gradient of the agreement
// a_i.a_j is summed over heads before the products that give the gradients of assignments.
#pragma once

#include "gated.h"
#include "attention_gradients.h"
#include "row_lse.h"

namespace fastattn {
namespace FASTATTN_ISA {

struct GatedGradientBlock {
  const GatedProblem& problem;
  const GatedParams& p;
  int64_t block_q;
  RowRanges ranges;                  // of every head
  GateTile tile;                     // gates of the tile, and the gradient of the agreement summed over heads
  float *weights, *slopes, *shares;  // (block_q, kGradientTile): P, dS to the products, that gradient
  float* a_panels;                   // assignments of the rows as panels contracted over rows
  float* grad_a;                     // (block_q, group_columns)
  RowState* states;                  // (heads, block_q)
  Blocks blocks;                     // memory of a GradientBlock each head

  GatedGradientBlock(const GatedProblem& problem, int64_t block_q, int64_t heads, Arena& arena)
      : problem(problem),
        p(problem.g),
        block_q(block_q),
        ranges(block_q, arena),
        tile(problem, block_q, kGradientTile, true, arena),
        weights(arena.take<float>(block_q * kGradientTile)),
        slopes(arena.take<float>(block_q * kGradientTile)),
        shares(arena.take<float>(block_q * kGradientTile)),
        a_panels(arena.take<float>(block_q * problem.group_columns)),
        grad_a(arena.take<float>(block_q * problem.group_columns)),
        states(arena.take<RowState>(heads * block_q)),
        blocks(arena.blocks(heads, bytes_of([&](Arena& measure) { GradientBlock(problem, block_q, measure); }), 64)) {}

  GradientBlock of_head(int64_t h) const {
    Arena arena = blocks[h];
    GradientBlock block(problem, block_q, arena);
    block.ranges = ranges;
    return block;
  }

  template <class Heads>
  void run(const BlockRows& rows, const Sequence& s, int64_t sequence, const Heads& head_of) {
    const int64_t count = rows.span, heads = rows.count / count, columns_a = problem.group_columns;
    const int64_t row = s.q_begin + rows.first, groups = (count + kRows - 1) / kRows;
    ranges.fill(s, rows.first, count);
    for (int64_t h = 0; h < heads; h++) {
      GradientBlock block = of_head(h);
      block.load(p, s, BlockRows{rows.head + h, rows.first, count, count});
      take_grad_lse(block.delta, p, s, rows.head + h, rows.first, count);
      for (int64_t i = 0; i < count; i++)
        states[h * block_q + i] = *row_state(p.state, s, rows.head + h, rows.first + i);
    }
    tile.load(s, rows.first, count);
    pack_panels<Singles>(a_panels, block_q, 0, problem.rows(s, row), count, problem.groups);
    memset(grad_a, 0, size_t(groups * kRows * columns_a) * 4);
    for (int64_t n = ranges.begin < ranges.end ? ranges.begin / kGradientTile * kGradientTile : 0; n < ranges.end;
         n += kGradientTile) {
      const int64_t there = min64(kGradientTile, s.keys - n);
      const bool gates = tile.fill(s, sequence, ranges, rows.first, count, n, there);
      for (int64_t h = 0; h < heads; h++) {
        GradientBlock block = of_head(h);
        const GradientHead head = head_of(h);
        add_head(block, head, s, BlockRows{rows.head + h, rows.first, count, count}, states + h * block_q, n, there,
                 gates, h == 0);
      }
      if (gates) add_assignment(head_of(0), sequence, s, count, n, there);
    }
    for (int64_t h = 0; h < heads; h++) {
      const GradientBlock block = of_head(h);
      store_gradients(matrix(p.grad_q, s.batch, rows.head + h, row), block.grad_q, block.head_columns, count, count,
                      problem.head_dim, (float)p.scale);
    }
    float* sharpness = (float*)p.grad_sharpness.data +
                       (s.batch * p.grad_sharpness.size[2] + rows.head) * p.grad_sharpness.size[3] + row;
    for (int64_t i = 0; i < count; i++) {  // the sum over j of shares times a_i.a_j
      float sum = 0;
      for (int64_t g = 0; g < problem.groups; g++) sum += tile.a[i * problem.groups + g] * grad_a[i * columns_a + g];
      sharpness[i] = sum;
    }
    store_gradients(matrix(p.grad_query_assignment, s.batch, rows.head, row), grad_a, columns_a, count, count,
                    problem.groups, problem.sharpness);
  }

  void add_head(GradientBlock& block, const GradientHead& head, const Sequence& s, const BlockRows& rows,
                const RowState* state, int64_t n, int64_t there, bool gates, bool starts) {
    const int64_t count = rows.count, groups = (count + kRows - 1) / kRows;
    const int64_t columns = round_up(min64(ranges.end - n, there), kPanel);
    int64_t first, last;
    block.rows_of_tile(count, n, kGradientTile, &first, &last);
    tile_products<Singles>(weights, kGradientTile, block.q, block.head_dim, head.keys_transposed + n * block.head_dim,
                           ranges, groups, n, columns);
    tile_products<Singles>(slopes, kGradientTile, block.grad_out, block.value_dim,
                           head.values_transposed + n * block.value_dim, ranges, groups, n, columns);
    for (int64_t r = first; r < last; r++) {
      const Columns columns(ranges, r / kRows, n, there);
      zero_outside(weights + r * kGradientTile, columns, kGradientTile);
      zero_outside(slopes + r * kGradientTile, columns, kGradientTile);
      if (gates && starts) {
        zero_outside(shares + r * kGradientTile, columns, kGradientTile);
        for (int64_t j = columns.begin; j < columns.end; j += W) store(shares + r * kGradientTile + j, vf{});
      }
      if (columns.empty()) continue;
      const RowMask mask = row_mask(p, ranges, s, rows, r, n, there);
      if (!gates)
        weigh_row<false, false>(r, columns, mask, state[r], block.delta[r]);
      else if (p.gate == 0)
        weigh_row<true, false>(r, columns, mask, state[r], block.delta[r]);
      else
        weigh_row<true, true>(r, columns, mask, state[r], block.delta[r]);
    }
    add_transposed(head.grad_values + n * head.value_columns, head.value_columns, weights, kGradientTile,
                   block.grad_out_panels, block_q, ranges, count, n);
    block.add_queries(head, slopes, kGradientTile, groups, n, there);
    add_transposed(head.grad_keys + n * head.head_columns, head.head_columns, slopes, kGradientTile, block.q_panels,
                   block_q, ranges, count, n);
  }

  // Turns one head's scores and dP of row r into P and dS, and adds its part of the agreement's gradient to shares.
  template <bool kGated, bool kLogarithm>
  void weigh_row(int64_t r, const Columns& columns, const RowMask& mask, const RowState& state, float d) {
    float *w = weights + r * kGradientTile, *slope = slopes + r * kGradientTile, *share = shares + r * kGradientTile;
    const float* gates = tile.gates + r * kGradientTile;
    const float sign = problem.sign, c = problem.c, unit = 1 / c, log2_sum = state.log_sum * kLog2E;
    const auto vectors = [&](auto masked) {
      for (int64_t j = columns.begin; j < columns.end; j += W) {
        const vf x = load(w + j), gate = kGated ? load(gates + j) : vf{};
        vf y = x * sign;
        if (kGated) y = kLogarithm ? y + gate * unit : y * gate;
        vf weight = exp2_bounded(at_most(y - state.top, 0.0f) * c - log2_sum);
        vf ds = weight * (load(slope + j) - d);
        vf part = kLogarithm ? ds : ds * gate * x;
        if constexpr (masked) {
          const vi attends = mask.at(j);
          weight = keep(attends, weight);
          ds = keep(attends, ds);
          part = keep(attends, part);
        }
        if (kGated) store(share + j, load(share + j) + part);
        store(w + j, weight);
        store(slope + j, kGated && !kLogarithm ? ds * gate : ds);
      }
    };
    if (mask.all(columns))
      vectors(std::false_type{});
    else
      vectors(std::true_type{});
  }

  // Gradients of the assignments from the tile's shares.
  void add_assignment(const GradientHead& head, int64_t sequence, const Sequence& s, int64_t count, int64_t n,
                      int64_t there) {
    const int64_t columns_a = problem.group_columns;
    const float factor = p.gate == 0 ? (float)p.scale : 1.0f;
    for (int64_t r = 0; r < count; r++) {
      const Columns columns(ranges, r / kRows, n, there);
      float* share = shares + r * kGradientTile;
      for (int64_t j = columns.begin; j < columns.end; j += W)
        store(share + j, load(share + j) * (load(tile.closed + r * kGradientTile + j) * factor));
    }
    add_transposed(head.extra + n * columns_a, columns_a, shares, kGradientTile, a_panels, block_q, ranges, count, n);
    for (int64_t d = 0; d < columns_a; d += kPanel) {
      const int64_t width = min64(kPanel, columns_a - d);
      for (int64_t g = 0; g * kRows < count; g++) {
        const int64_t begin = max64(ranges.group_low[g] - n, 0), end = min64(ranges.group_high[g] - n, there);
        if (begin >= end) continue;
        add_product<Singles>(int(width / W), grad_a + g * kRows * columns_a + d, columns_a,
                             shares + g * kRows * kGradientTile + begin, kGradientTile, 1,
                             problem.key_panels(sequence) + d * s.keys + (n + begin) * width, end - begin);
      }
    }
  }
};

// The largest number of key heads in a block for which the busiest thread gets no more heads than with one.
static Together gradient_heads_together(const Problem& problem, int64_t blocks) {
  const int64_t threads = problem.p.threads, pairs = problem.sequences * problem.kv_heads;
  int64_t most = kSharing;
  for (; most >= 2 * problem.group; most--) {
    const Together together(problem, most);
    const int64_t units = problem.sequences * together.units(problem);
    if ((units + threads - 1) / threads * together.kv_heads <= (pairs + threads - 1) / threads) return together;
  }
  const int64_t parts = threads / max64(pairs, 1);  // of one key head
  Together together(problem, most);
  while (most > 1 && blocks * together.chunks(problem) < 2 * parts) together = Together(problem, most /= 2);
  return together;
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
