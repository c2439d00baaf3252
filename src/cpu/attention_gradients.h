// Backward passes of kernels that keep a block's whole rows. One task for each key head owns its gradients of keys and
// values in float32. With fewer heads than threads a head is divided into parts, which are summed in order.
#pragma once

#include "attention_rows.h"

namespace fastattn {
namespace FASTATTN_ISA {

constexpr int64_t kGradientTile = (W == 16 ? 3 : 6) * kPanel;  // keys: whole panels and whole groups of kRows
static_assert(kGradientTile % kRows == 0);

// Operands and gradients of one key head, all float32.
struct GradientHead {
  int64_t capacity, head_columns, value_columns, extra_columns;
  float *keys_transposed, *values_transposed, *keys;  // panels over keys, and (capacity, head dim) in panels
  float *grad_keys, *grad_values, *extra;             // (capacity, columns)
  float* reciprocals;                                 // (capacity) 1 / |key|

  // extra_columns: the columns of a further gradient of each key.
  GradientHead(const Problem& problem, int64_t longest_k, int64_t extra_columns, Arena& arena)
      : capacity(round_up(longest_k, kGradientTile) + kGradientTile),
        head_columns(round_up(problem.head_dim, W)),
        value_columns(round_up(problem.value_dim, W)),
        extra_columns(extra_columns),
        keys_transposed(arena.take<float>(capacity * problem.head_dim)),
        values_transposed(arena.take<float>(capacity * problem.value_dim)),
        keys(arena.take<float>(capacity * head_columns)),
        grad_keys(arena.take<float>(capacity * head_columns)),
        grad_values(arena.take<float>(capacity * value_columns)),
        extra(arena.take<float>(capacity * extra_columns)),
        reciprocals(arena.take<float>(capacity)) {}

  void load(const Problem& problem, const Sequence& s, int64_t head) {
    const Matrix k = matrix(problem.p.k, s.batch, head, s.k_begin), v = matrix(problem.p.v, s.batch, head, s.k_begin);
    pack_transposed<Singles>(keys_transposed, k, s.keys, problem.head_dim);
    pack_transposed<Singles>(values_transposed, v, s.keys, problem.value_dim);
    pack_panels<Singles>(keys, capacity, 0, k, s.keys, problem.head_dim);
    reciprocal_norms(reciprocals, k, s.keys, problem.head_dim, round_up(s.keys, kGradientTile));
    const int64_t used = round_up(s.keys, kGradientTile);
    memset(grad_keys, 0, size_t(used * head_columns) * 4);
    memset(grad_values, 0, size_t(used * value_columns) * 4);
    memset(extra, 0, size_t(used * extra_columns) * 4);
  }

  void add(const GradientHead& other, int64_t keys_used) {
    const auto sum = [](float* to, const float* from, int64_t n) {
      for (int64_t i = 0; i < n; i += W) store(to + i, FASTATTN_ISA::load(to + i) + FASTATTN_ISA::load(from + i));
    };
    sum(grad_keys, other.grad_keys, keys_used * head_columns);
    sum(grad_values, other.grad_values, keys_used * value_columns);
    sum(extra, other.extra, keys_used * extra_columns);
  }
};

// gradient (keys of the tile at n, columns) += weights^T (kGradientTile, rows) * panels of the block's `count` rows:
// weights have rows `stride` apart and are 0 where a row does not attend. Each kRows of keys use the rows from the
// first to the last that attends one of them.
FASTATTN_INLINE void add_transposed(float* gradient, int64_t columns, const float* weights, int64_t stride,
                                    const float* panels, int64_t capacity, const RowRanges& ranges, int64_t count,
                                    int64_t n) {
  const int64_t groups = (count + kRows - 1) / kRows;
  int64_t first = 0;
  for (int64_t j = 0; j < kGradientTile; j += kRows) {
    int64_t last = groups;
    while (first < last && ranges.group_high[first] <= n + j) first++;
    while (first < last && ranges.group_low[last - 1] >= n + j + kRows) last--;
    const int64_t row = first * kRows, rows = min64(count, last * kRows) - row;
    if (rows <= 0) continue;
    for (int64_t d = 0; d < columns; d += kPanel) {
      const int64_t width = min64(kPanel, columns - d);
      add_product<Singles>(int(width / W), gradient + j * columns + d, columns, weights + row * stride + j, 1, stride,
                           panels + d * capacity + row * width, rows);
    }
  }
}

// Rows of queries with their panels and those of the incoming gradient, float32.
struct GradientBlock {
  int64_t block_q, head_dim, value_dim, head_columns, value_columns;
  float *q, *grad_out;                // (block_q, D), (block_q, Dv)
  float *q_panels, *grad_out_panels;  // the same, as panels contracted over rows
  float* grad_q;                      // (block_q, head_columns)
  float* delta;                       // (block_q) grad_out . out
  RowRanges ranges;

  GradientBlock(const Problem& problem, int64_t block_q, Arena& arena)
      : block_q(block_q),
        head_dim(problem.head_dim),
        value_dim(problem.value_dim),
        head_columns(round_up(head_dim, W)),
        value_columns(round_up(value_dim, W)),
        q(arena.take<float>(block_q * head_dim)),
        grad_out(arena.take<float>(block_q * value_dim)),
        q_panels(arena.take<float>(block_q * head_columns)),
        grad_out_panels(arena.take<float>(block_q * value_columns)),
        grad_q(arena.take<float>(block_q * head_columns)),
        delta(arena.take<float>(block_q)),
        ranges(block_q, arena) {}

  void load(const AttentionParams& p, const Sequence& s, const BlockRows& rows) {
    fill_ranges(ranges, s, rows);
    const int64_t row = s.q_begin + rows.first;
    const Matrix q_rows = matrix(p.q, s.batch, rows.head, row);
    const Matrix gradient = matrix(p.grad_out, s.batch, rows.head, row), out = matrix(p.out, s.batch, rows.head, row);
    pack_rows<Singles>(q, head_dim, q_rows, rows.count, head_dim, 1.0f);
    pack_rows<Singles>(grad_out, value_dim, gradient, rows.count, value_dim, 1.0f);
    pack_panels<Singles>(q_panels, block_q, 0, q_rows, rows.count, head_dim);
    pack_panels<Singles>(grad_out_panels, block_q, 0, gradient, rows.count, value_dim);
    memset(grad_q, 0, size_t(round_up(rows.count, kRows) * head_columns) * 4);
    with_dtype(out.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      for (int64_t r = 0; r < rows.count; r++) {
        const T* o = (const T*)out.data + r * out.stride;
        const float* g = grad_out + r * value_dim;
        vf sum{};
        int64_t j = 0;
        for (; j + W <= value_dim; j += W) sum += FASTATTN_ISA::load(o + j) * FASTATTN_ISA::load(g + j);
        if (j < value_dim) sum += load_n(o + j, int(value_dim - j)) * load_n(g + j, int(value_dim - j));
        delta[r] = reduce_add(sum);
      }
    });
  }

  // grad_q += weights (rows, keys of the tile at n) * keys
  void add_queries(const GradientHead& head, const float* weights, int64_t stride, int64_t groups, int64_t n,
                   int64_t there) {
    for (int64_t d = 0; d < head_columns; d += kPanel) {
      const int64_t width = min64(kPanel, head_columns - d);
      for (int64_t g = 0; g < groups; g++) {
        const int64_t begin = max64(ranges.group_low[g] - n, 0), end = min64(ranges.group_high[g] - n, there);
        if (begin >= end) continue;
        add_product<Singles>(int(width / W), grad_q + g * kRows * head_columns + d, head_columns,
                             weights + g * kRows * stride + begin, stride, 1,
                             head.keys + d * head.capacity + (n + begin) * width, end - begin);
      }
    }
  }

  // Rows of the block, in whole groups, that attend some key of [n, n + keys): [*first, *last).
  void rows_of_tile(int64_t count, int64_t n, int64_t keys, int64_t* first, int64_t* last) const {
    *first = count;
    *last = 0;
    for (int64_t g = 0; g * kRows < count; g++) {
      if (ranges.group_high[g] <= n || ranges.group_low[g] >= n + keys) continue;
      *first = min64(*first, g * kRows);
      *last = min64(count, (g + 1) * kRows);
    }
  }
};

FASTATTN_INLINE void zero_outside(float* row, const Columns& columns, int64_t width) {
  if (columns.begin > 0) memset(row, 0, size_t(columns.begin) * 4);
  if (columns.end < width) memset(row + columns.end, 0, size_t(width - columns.end) * 4);
}

// Stores rows of gradients, 0 from row `used` on.
FASTATTN_INLINE void store_gradients(Matrix to, const float* from, int64_t columns_padded, int64_t used, int64_t rows,
                                     int64_t columns, float factor) {
  for (int64_t i = 0; i < rows; i++) {
    if (i < used)
      store_row(to, i, from + i * columns_padded, columns, factor);
    else
      with_dtype(to.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        memset((T*)to.data + i * to.stride, 0, size_t(columns) * sizeof(T));
      });
  }
}

// Calls run(block rows, sequence, key head of the block's h-th head, thread memory) for every block of some heads, then
// finish(key head, sequence, its gradients). `extra`: floats for each key besides the gradients of keys and values.
template <class Run, class Finish>
static void for_gradient_heads(const Problem& problem, const Longest& longest, int64_t block_q, int64_t block_bytes,
                               int64_t extra, const Together& together, const Run& run, const Finish& finish) {
  const int64_t threads = problem.p.threads, members = together.kv_heads, in_sequence = together.units(problem);
  const int64_t units = problem.sequences * in_sequence, parts = max64(1, threads / max64(units, 1));
  const int64_t slots = parts > 1 ? units * parts : min64(threads, units);
  const int64_t head_bytes = bytes_of([&](Arena& arena) { GradientHead(problem, longest.k, extra, arena); });
  Blocks memory, gradients;  // for each thread; for each key head of a slot
  with_scratch(0, [&](Arena& arena) {
    memory = arena.blocks(threads, block_bytes);
    gradients = arena.blocks(slots * members, head_bytes);
  });
  const int64_t blocks = (longest.q + block_q - 1) / block_q, items = blocks * together.chunks(problem);
  const auto head_at = [&](int64_t slot, int64_t member) {
    Arena arena = gradients[slot * members + member];
    return GradientHead(problem, longest.k, extra, arena);
  };
  parallel_items(units * parts, (int)threads, [&](int64_t task, int thread) {
    const int64_t unit = task / parts, part = task % parts, slot = parts > 1 ? task : thread;
    const Sequence s = problem.sequence(unit / in_sequence);
    const int64_t kv_head = unit % in_sequence * members, there = min64(members, problem.kv_heads - kv_head);
    for (int64_t m = 0; m < there; m++) head_at(slot, m).load(problem, s, kv_head + m);
    for (int64_t item = part; item < items; item += parts) {
      const int64_t first = item % blocks * block_q, in_unit = item / blocks * together.heads;
      const int64_t heads = min64(together.heads, there * problem.group - in_unit);
      if (first >= s.q_length || heads <= 0) continue;
      const int64_t rows = min64(block_q, s.q_length - first);
      run(
          BlockRows{kv_head * problem.group + in_unit, first, rows, rows * heads}, s,
          [&](int64_t h) { return head_at(slot, (in_unit + h) / problem.group); }, memory[thread]);
    }
    if (parts > 1) return;
    for (int64_t m = 0; m < there; m++) finish(kv_head + m, s, head_at(slot, m));
  });
  if (parts == 1) return;
  parallel_items(units * members, (int)threads, [&](int64_t task, int) {
    const int64_t unit = task / members, member = task % members;
    const int64_t kv_head = unit % in_sequence * members + member;
    if (kv_head >= problem.kv_heads) return;
    const Sequence s = problem.sequence(unit / in_sequence);
    GradientHead head = head_at(unit * parts, member);
    for (int64_t part = 1; part < parts; part++) head.add(head_at(unit * parts + part, member), s.keys);
    finish(kv_head, s, head);
  });
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
