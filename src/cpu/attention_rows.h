// Blocks of query rows that keep whole rows of scores: for weights that depend on statistics of their row, and for
// backward passes that need all weights of a row.
#pragma once

#include "attention_problem.h"

namespace fastattn {
namespace FASTATTN_ISA {

// The rows of one block: `span` rows from `first` on of each of some consecutive heads, head by head.
struct BlockRows {
  int64_t head, first, span, count;
  int64_t head_of(int64_t r) const { return head + r / span; }
  int64_t row_of(int64_t r) const { return first + r % span; }
};

// Floats between rows of a score buffer: no multiple of a page, because such rows would share cache sets.
FASTATTN_INLINE int64_t score_stride(int64_t columns) { return columns % 512 == 0 ? columns + 16 : columns; }

// The most columns a block's rows may span, in whole tiles of block_k from a multiple of it on.
FASTATTN_INLINE int64_t block_columns(const MaskParams& mask, int64_t longest_k, int64_t block_q, int64_t block_k) {
  const int64_t columns = min64(longest_k, most_keys(mask, block_q, longest_k) + block_k);
  return round_up(columns, block_k) + block_k;
}

// Rows of a block whose scores take about `kib` kilobytes, at most `most`.
FASTATTN_INLINE int64_t block_rows(int64_t most, int64_t columns, int64_t kib) {
  return max64(kRows, min64(round_up(most, kRows), kib * 256 / max64(columns, 1) / kRows * kRows));
}

struct Longest {
  int64_t q = 0, k = 0;
  explicit Longest(const Problem& problem) {
    for (int64_t s = 0; s < problem.sequences; s++) {
      const Sequence r = problem.sequence(s);
      q = max64(q, r.q_length);
      k = max64(k, r.keys);
    }
  }
};

// Sum of squares of a row, in double where float32 would overflow or underflow.
template <class T>
FASTATTN_INLINE double square_norm(const T* x, int64_t n) {
  vf sum{};
  int64_t j = 0;
  for (; j + W <= n; j += W) sum += load(x + j) * load(x + j);
  if (j < n) sum += load_n(x + j, int(n - j)) * load_n(x + j, int(n - j));
  const float found = reduce_add(sum);
  if (found > 1e-25f && found < 1e30f) return found;
  double exact = 0;
  for (j = 0; j < n; j++) {
    const double v = load_n(x + j, 1)[0];
    exact += v * v;
  }
  return exact;
}

// 1 / |row| of `rows` rows, 0 for a row of norm at most 1e-12, and 0 up to `capacity`.
FASTATTN_NOINLINE void reciprocal_norms(float* to, Matrix src, int64_t rows, int64_t columns, int64_t capacity) {
  with_dtype(src.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t i = 0; i < rows; i++) {
      const double norm = __builtin_sqrt(square_norm((const T*)src.data + i * src.stride, columns));
      to[i] = norm > 1e-12 ? (float)(1 / norm) : 0.0f;
    }
  });
  for (int64_t i = rows; i < capacity; i++) to[i] = 0;
}

// The RowRanges of a block whose rows may belong to several heads.
FASTATTN_INLINE void fill_ranges(RowRanges& r, const Sequence& s, const BlockRows& rows) {
  r.begin = INT32_MAX;
  r.end = 0;
  for (int64_t g = 0; g * kRows < rows.count; g++) {
    int32_t lo = INT32_MAX, hi = 0;
    for (int64_t i = g * kRows; i < min64(rows.count, (g + 1) * kRows); i++) {
      s.interval(rows.row_of(i), r.low + i, r.high + i);
      lo = r.low[i] < lo ? r.low[i] : lo;
      hi = r.high[i] > hi ? r.high[i] : hi;
    }
    r.group_low[g] = lo;
    r.group_high[g] = hi;
    r.begin = lo < r.begin ? lo : r.begin;
    r.end = hi > r.end ? hi : r.end;
  }
}

template <class Unit>
FASTATTN_INLINE void pack_block(typename Unit::Word* to, int64_t stride, const Tensor& t, const Sequence& s,
                                const BlockRows& rows, int64_t columns) {
  for (int64_t r = 0; r < rows.count; r += rows.span)
    pack_rows<Unit>(to + r * stride, stride, matrix(t, s.batch, rows.head_of(r), s.q_begin + rows.first),
                    min64(rows.span, rows.count - r), columns, 1.0f);
}

// Which columns of the tile at key n row r of a block attends.
FASTATTN_INLINE RowMask row_mask(const MaskParams& mask, const RowRanges& ranges, const Sequence& s,
                                 const BlockRows& rows, int64_t r, int64_t n, int64_t there) {
  return RowMask(mask, s, ranges, rows.head_of(r), rows.row_of(r), r, n, there, true);
}

// Keys that row r attends.
FASTATTN_INLINE int64_t attended(const MaskParams& mask, const RowRanges& ranges, const Sequence& s,
                                 const BlockRows& rows, int64_t r) {
  const int64_t low = ranges.low[r], high = ranges.high[r];
  if (high <= low) return 0;
  const uint8_t* dense = dense_row(mask, s, rows.head_of(r), rows.row_of(r), 0);
  if (!dense) return high - low;
  int64_t n = 0;
  for (int64_t j = low; j < high; j++) n += dense[j] != 0;
  return n;
}

// Products of a block's rows with the panels of the tile at key n, for the groups of rows that need them: out(offset,
// product) with offsets into a tile whose rows are `stride` apart.
template <class Unit, class Out>
FASTATTN_INLINE void for_tile_products(int64_t stride, const typename Unit::Word* a, int64_t steps,
                                       const typename Unit::Word* panels, const RowRanges& ranges, int64_t groups,
                                       int64_t n, int64_t columns, const Out& out) {
  for (int64_t j = 0; j < columns; j += kPanel) {
    for (int64_t g = 0; g < groups; g++) {
      if (ranges.group_high[g] <= n + j || ranges.group_low[g] >= n + j + kPanel) continue;
      const int64_t block = g * kRows * stride + j;
      product<Unit>(a + g * kRows * steps, steps, panels + j * steps, steps,
                    [&](int i, int v, vf x) { out(block + i * stride + v * W, x); });
    }
  }
}
template <class Unit>
FASTATTN_NOINLINE void tile_products(float* to, int64_t stride, const typename Unit::Word* a, int64_t steps,
                                     const typename Unit::Word* panels, const RowRanges& ranges, int64_t groups,
                                     int64_t n, int64_t columns) {
  for_tile_products<Unit>(stride, a, steps, panels, ranges, groups, n, columns,
                          [&](int64_t at, vf x) { store(to + at, x); });
}

// The heads that one task handles together: `heads` query heads of up to `kv_heads` key heads of one sequence: whole
// key heads, or some query heads of a single key head.
struct Together {
  int64_t kv_heads = 1, heads = 1;

  Together() {}
  Together(const Problem& problem, int64_t most)
      : kv_heads(max64(1, min64(problem.kv_heads, most / problem.group))),
        heads(kv_heads > 1 ? kv_heads * problem.group : min64(most, problem.group)) {}
  // The number of sets of key heads of a sequence, and of sets of query heads of one of these.
  int64_t units(const Problem& problem) const { return (problem.kv_heads + kv_heads - 1) / kv_heads; }
  int64_t chunks(const Problem& problem) const { return (kv_heads * problem.group + heads - 1) / heads; }
};

// Panels of one key head, packed whole before any block runs.
template <class Unit>
struct PackedPanels {
  using Word = typename Unit::Word;
  const Word *keys, *values;
  const float* reciprocals;
  int64_t q_steps, capacity;

  const Word* key_panels(int64_t n) const { return keys + n * q_steps; }
  const float* key_reciprocals(int64_t n) const { return reciprocals + n; }
  void prepare_values(int64_t) const {}
  const Word* value_panel(int64_t n, int64_t d, int64_t width) const {
    return values + d * capacity + n / Unit::kStep * width;
  }
};

// Panels that the only block that reads them packs a tile at a time.
template <class Unit>
struct StreamedPanels {
  using Word = typename Unit::Word;
  Matrix k, v;
  int64_t keys, head_dim, value_dim, block_k;
  Word *key_words, *value_words;
  float* norms;

  StreamedPanels(const Problem& problem, const Sequence& s, int64_t head, int64_t block_k, Arena& arena)
      : k(matrix(problem.p.k, s.batch, head, s.k_begin)),
        v(matrix(problem.p.v, s.batch, head, s.k_begin)),
        keys(s.keys),
        head_dim(problem.head_dim),
        value_dim(problem.value_dim),
        block_k(block_k),
        key_words(arena.take<Word>(block_k * steps_of<Unit>(problem.head_dim))),
        value_words(arena.take<Word>(block_k * round_up(problem.value_dim, W))),
        norms(arena.take<float>(block_k)) {}

  Matrix rows_from(const Matrix& m, int64_t n) const {
    return {(const char*)m.data + n * m.stride * (m.dtype == DType::f32 ? 4 : 2), m.stride, m.dtype};
  }
  const Word* key_panels(int64_t n) const {
    const int64_t rows = min64(block_k, keys - n);
    pack_transposed<Unit>(key_words, rows_from(k, n), rows, head_dim);
    reciprocal_norms(norms, rows_from(k, n), rows, head_dim, block_k);
    return key_words;
  }
  const float* key_reciprocals(int64_t) const { return norms; }
  void prepare_values(int64_t n) const {
    pack_panels<Unit>(value_words, block_k / Unit::kStep, 0, rows_from(v, n), min64(block_k, keys - n), value_dim);
  }
  const Word* value_panel(int64_t, int64_t d, int64_t) const { return value_words + d * (block_k / Unit::kStep); }
};

// A packed key head, with 1 / |key| where the kernel normalises keys.
template <class Unit>
struct PackedKeys : PackedHead<Unit> {
  float* reciprocals;
  PackedKeys(const Problem& problem, int64_t length, bool norms, Arena& arena)
      : PackedHead<Unit>(problem, length, arena),
        reciprocals(arena.take<float>(norms ? round_up(length, kPanel) : 0)) {}
};

// Packs key heads of sequences in waves, then calls run(block rows, sequence, panels of the block's h-th head, thread
// memory) for blocks of query rows of some heads.
template <class Unit, class Run>
static void for_packed_blocks(const Problem& problem, const Longest& longest, int64_t block_q, int64_t block_bytes,
                              bool norms, const Together& together, const Run& run) {
  const AttentionParams& p = problem.p;
  const int64_t head_bytes = bytes_of([&](Arena& arena) { PackedKeys<Unit>(problem, longest.k, norms, arena); });
  const int64_t blocks = (longest.q + block_q - 1) / block_q, members = together.kv_heads;
  const int64_t in_sequence = together.units(problem), units = problem.sequences * in_sequence;
  const int64_t chunks = together.chunks(problem);
  const int64_t wave = max64(1, min64(units, p.pack_kib * 1024 / max64(head_bytes * members, 1)));
  Blocks memory, store;  // for each thread; for each key head of a wave
  with_scratch(0, [&](Arena& arena) {
    memory = arena.blocks(p.threads, block_bytes);
    store = arena.blocks(wave * members, head_bytes, 64);
  });
  const int64_t q_steps = steps_of<Unit>(problem.head_dim);

  constexpr int64_t kPackRows = 4 * kPanel;  // keys packed by one task
  const int64_t pack_tasks = (longest.k + kPackRows - 1) / kPackRows;
  for (int64_t begin = 0; begin < units; begin += wave) {
    const int64_t count = min64(wave, units - begin);
    parallel_items(count * members * pack_tasks, p.threads, [&](int64_t task, int) {
      const int64_t slot = task / pack_tasks, first = task % pack_tasks * kPackRows, unit = begin + slot / members;
      const Sequence s = problem.sequence(unit / in_sequence);
      const int64_t head = unit % in_sequence * members + slot % members, rows = min64(kPackRows, s.keys - first);
      if (rows <= 0 || head >= problem.kv_heads) return;
      Arena arena = store[slot];
      const PackedKeys<Unit> to(problem, longest.k, norms, arena);
      const Matrix keys = matrix(p.k, s.batch, head, s.k_begin + first);
      pack_transposed<Unit>(to.keys + first * q_steps, keys, rows, problem.head_dim);
      pack_panels<Unit>(to.values, to.capacity, first / Unit::kStep, matrix(p.v, s.batch, head, s.k_begin + first),
                        rows, problem.value_dim);
      if (norms) reciprocal_norms(to.reciprocals + first, keys, rows, problem.head_dim, round_up(rows, kPanel));
    });
    parallel_items(count * chunks * blocks, p.threads, [&](int64_t task, int thread) {
      const int64_t slot = task / (chunks * blocks), unit = begin + slot;
      const Sequence s = problem.sequence(unit / in_sequence);
      // the last rows of a causal sequence have the most keys, so they start first
      const int64_t first = (blocks - 1 - task % blocks) * block_q;
      const int64_t in_unit = task / blocks % chunks * together.heads;
      const int64_t head = unit % in_sequence * members * problem.group + in_unit;
      if (first >= s.q_length || head >= problem.heads) return;
      const int64_t rows = min64(block_q, s.q_length - first);
      const auto panels = [&](int64_t h) {
        Arena arena = store[slot * members + (in_unit + h) / problem.group];
        const PackedKeys<Unit> of(problem, longest.k, norms, arena);
        return PackedPanels<Unit>{of.keys, of.values, of.reciprocals, q_steps, of.capacity};
      };
      const int64_t heads = min64(together.heads, min64(problem.heads - head, members * problem.group - in_unit));
      run(BlockRows{head, first, rows, rows * heads}, s, panels, memory[thread]);
    });
  }
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
