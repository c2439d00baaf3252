// Grouped sparse attention backward: for each list P = exp(s - top - log sum), dS = P (dP - delta), and the five
// products of every tile with its gathered rows. One task for each key head owns its gradients in float32. With few key
// heads there are several tasks for each, with every n-th block of rows and gradients of their own, summed in order.
#pragma once

#include "attention_decode.h"
#include "attention_gradients.h"
#include "grouped.h"

namespace fastattn {
namespace FASTATTN_ISA {

FASTATTN_INLINE void add_row(float* to, const float* from, int64_t columns) {
  for (int64_t j = 0; j < columns; j += W) store(to + j, load(to + j) + load(from + j));
}

// Operands and gradients of one list of one key head, float32, and the head's own gradients.
struct GroupedGradients {
  const GroupedProblem& problem;
  const GroupedParams& p;
  int64_t capacity, block_q, head_dim, value_dim, head_columns, value_columns, queries, keys;
  float *keys_transposed, *values_transposed, *key_panels, *list_keys, *list_values;  // of the list
  float *grad_q, *grad_k, *grad_v;                                                    // of the head
  float *q, *grad_out, *q_panels, *grad_out_panels, *block_grad_q;                    // of a block of rows
  float *weights, *slopes, *delta;
  RowState* states;
  char* copy;
  RowRanges ranges;

  GroupedGradients(const GroupedProblem& problem, const Longest& longest, int64_t block_q, Arena& arena)
      : problem(problem),
        p(problem.g),
        capacity(round_up(longest.k, kGradientTile) + kGradientTile),
        block_q(block_q),
        head_dim(problem.head_dim),
        value_dim(problem.value_dim),
        head_columns(round_up(head_dim, W)),
        value_columns(round_up(value_dim, W)),
        queries(longest.q),
        keys(longest.k),
        keys_transposed(arena.take<float>(capacity * head_dim)),
        values_transposed(arena.take<float>(capacity * value_dim)),
        key_panels(arena.take<float>(capacity * head_columns)),
        list_keys(arena.take<float>(capacity * head_columns)),
        list_values(arena.take<float>(capacity * value_columns)),
        grad_q(arena.take<float>(queries * problem.group * head_columns)),
        grad_k(arena.take<float>(keys * head_columns)),
        grad_v(arena.take<float>(keys * value_columns)),
        q(arena.take<float>(block_q * head_dim)),
        grad_out(arena.take<float>(block_q * value_dim)),
        q_panels(arena.take<float>(block_q * head_columns)),
        grad_out_panels(arena.take<float>(block_q * value_columns)),
        block_grad_q(arena.take<float>(block_q * head_columns)),
        weights(arena.take<float>(block_q * kGradientTile)),
        slopes(arena.take<float>(block_q * kGradientTile)),
        delta(arena.take<float>(queries * problem.group)),
        states(arena.take<RowState>(block_q)),
        copy(arena.take<char>(max64(block_q, capacity) * max64(head_dim, value_dim) * 4)),
        ranges(block_q, arena) {}

  // The gradients, without their factors, of the part-th of `parts` sets of a key head's blocks of rows.
  void run(int64_t sequence, int64_t kv_head, int64_t part, int64_t parts) {
    const Sequence s = problem.sequence(sequence);
    memset(grad_q, 0, size_t(queries * problem.group * head_columns) * 4);
    memset(grad_k, 0, size_t(keys * head_columns) * 4);
    memset(grad_v, 0, size_t(keys * value_columns) * 4);
    for (int64_t h = 0; h < problem.group; h++) {
      const int64_t head = kv_head * problem.group + h;
      const Matrix gradient = matrix(p.grad_out, s.batch, head, s.q_begin),
                   out = matrix(p.out, s.batch, head, s.q_begin);
      for (int64_t i = 0; i < s.q_length; i++) delta[h * queries + i] = dot_rows(gradient, i, out, i, value_dim);
      take_grad_lse(delta + h * queries, p, s, head, 0, s.q_length);
    }
    int64_t blocks = 0;
    for (int number = 0; number <= problem.lists[sequence].total(); number++)
      run_list(ListView(problem, sequence, number), kv_head, part, parts, &blocks);
  }

  void add(const GroupedGradients& other) {
    add_row(grad_q, other.grad_q, queries * problem.group * head_columns);
    add_row(grad_k, other.grad_k, keys * head_columns);
    add_row(grad_v, other.grad_v, keys * value_columns);
  }

  void finish(int64_t sequence, int64_t kv_head) {
    const Sequence s = problem.sequence(sequence);
    const float scale = (float)p.scale;
    for (int64_t h = 0; h < problem.group; h++)
      store_gradients(matrix(p.grad_q, s.batch, kv_head * problem.group + h, s.q_begin),
                      grad_q + h * queries * head_columns, head_columns, s.q_length, s.q_length, head_dim, scale);
    store_gradients(matrix(p.grad_k, s.batch, kv_head, s.k_begin), grad_k, head_columns, s.keys, s.k_length, head_dim,
                    scale);
    store_gradients(matrix(p.grad_v, s.batch, kv_head, s.k_begin), grad_v, value_columns, s.keys, s.k_length, value_dim,
                    1.0f);
  }

  // `block` counts the head's blocks of rows; blocks whose number is `part` modulo `parts` are computed.
  void run_list(const ListView& view, int64_t kv_head, int64_t part, int64_t parts, int64_t* block) {
    const Sequence& s = view.s;
    const int64_t blocks = problem.group * ((view.rows + block_q - 1) / block_q), before = *block;
    *block += blocks;
    const int64_t own = (part - before % parts + parts) % parts;
    const bool scattered = view.list != nullptr;
    const auto key_at = [&](int64_t j) { return view.key(j); };
    if (view.keys == 0 || own >= blocks) return;
    const Matrix k = gather(copy, matrix(p.k, s.batch, kv_head, s.k_begin), 0, view.keys, head_dim, scattered, key_at);
    pack_transposed<Singles>(keys_transposed, k, view.keys, head_dim);
    pack_panels<Singles>(key_panels, capacity, 0, k, view.keys, head_dim);
    const Matrix v = gather(copy, matrix(p.v, s.batch, kv_head, s.k_begin), 0, view.keys, value_dim, scattered, key_at);
    pack_transposed<Singles>(values_transposed, v, view.keys, value_dim);
    const int64_t used = round_up(view.keys, kGradientTile);
    memset(list_keys, 0, size_t(used * head_columns) * 4);
    memset(list_values, 0, size_t(used * value_columns) * 4);
    for (int64_t i = own; i < blocks; i += parts) {
      const int64_t h = i % problem.group, first = i / problem.group * block_q;
      run_block(view, kv_head * problem.group + h, h, first, min64(block_q, view.rows - first));
    }
    for (int64_t j = 0; j < view.keys; j++) {
      add_row(grad_k + view.key(j) * head_columns, list_keys + j * head_columns, head_columns);
      add_row(grad_v + view.key(j) * value_columns, list_values + j * value_columns, value_columns);
    }
  }

  void run_block(const ListView& view, int64_t head, int64_t h, int64_t first, int64_t rows) {
    view.fill(ranges, first, rows);
    if (ranges.begin >= ranges.end) return;
    const Sequence& s = view.s;
    const bool scattered = view.list != nullptr;
    const auto row_at = [&](int64_t r) { return view.row(r); };
    const Matrix q_rows = gather(copy, matrix(p.q, s.batch, head, s.q_begin), first, rows, head_dim, scattered, row_at);
    pack_rows<Singles>(q, head_dim, q_rows, rows, head_dim, 1.0f);
    pack_panels<Singles>(q_panels, block_q, 0, q_rows, rows, head_dim);
    const Matrix o_rows =
        gather(copy, matrix(p.grad_out, s.batch, head, s.q_begin), first, rows, value_dim, scattered, row_at);
    pack_rows<Singles>(grad_out, value_dim, o_rows, rows, value_dim, 1.0f);
    pack_panels<Singles>(grad_out_panels, block_q, 0, o_rows, rows, value_dim);
    for (int64_t i = 0; i < rows; i++) states[i] = *row_state(p.state, view.s, head, view.row(first + i));
    const int64_t groups = (rows + kRows - 1) / kRows;
    memset(block_grad_q, 0, size_t(groups * kRows * head_columns) * 4);
    for (int64_t n = ranges.begin / kGradientTile * kGradientTile; n < ranges.end; n += kGradientTile) {
      const int64_t there = min64(kGradientTile, view.keys - n),
                    columns = round_up(min64(ranges.end - n, there), kPanel);
      tile_products<Singles>(weights, kGradientTile, q, head_dim, keys_transposed + n * head_dim, ranges, groups, n,
                             columns);
      tile_products<Singles>(slopes, kGradientTile, grad_out, value_dim, values_transposed + n * value_dim, ranges,
                             groups, n, columns);
      for (int64_t i = 0; i < rows; i++) weigh_row(view, h, first, i, n, there);
      add_transposed(list_values + n * value_columns, value_columns, weights, kGradientTile, grad_out_panels, block_q,
                     ranges, rows, n);
      add_transposed(list_keys + n * head_columns, head_columns, slopes, kGradientTile, q_panels, block_q, ranges, rows,
                     n);
      for (int64_t d = 0; d < head_columns; d += kPanel) {
        const int64_t width = min64(kPanel, head_columns - d);
        for (int64_t g = 0; g < groups; g++) {
          const int64_t begin = max64(ranges.group_low[g] - n, 0), end = min64(ranges.group_high[g] - n, there);
          if (begin >= end) continue;
          add_product<Singles>(int(width / W), block_grad_q + g * kRows * head_columns + d, head_columns,
                               slopes + g * kRows * kGradientTile + begin, kGradientTile, 1,
                               key_panels + d * capacity + (n + begin) * width, end - begin);
        }
      }
    }
    for (int64_t i = 0; i < rows; i++)
      add_row(grad_q + (h * queries + view.row(first + i)) * head_columns, block_grad_q + i * head_columns,
              head_columns);
  }

  // Turns scores and dP of one row into P and dS.
  void weigh_row(const ListView& view, int64_t h, int64_t first, int64_t i, int64_t n, int64_t there) {
    const Columns columns(ranges, i / kRows, n, there);
    float *w = weights + i * kGradientTile, *slope = slopes + i * kGradientTile;
    zero_outside(w, columns, kGradientTile);
    zero_outside(slope, columns, kGradientTile);
    if (columns.empty()) return;
    const RowMask mask(p, view.s, ranges, 0, 0, i, n, there, false);
    const float d = delta[h * queries + view.row(first + i)];
    const float top = states[i].top, log2_sum = states[i].log_sum * kLog2E;
    for (int64_t j = columns.begin; j < columns.end; j += W) {
      vi counts = mask.at(j);
      if (view.list && view.list->test) counts &= ListView::counted(*view.list, first + i, n + j);
      const vf weight =
          keep(counts, exp2_bounded(at_most(load(w + j) * problem.sign - top, 0.0f) * problem.c - log2_sum));
      store(w + j, weight);
      store(slope + j, keep(counts, weight * (load(slope + j) - d)));
    }
  }
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
