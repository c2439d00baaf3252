// Linear attention in chunks of tokens: what the forward and the backward share. Decay factors inside a chunk are
// products of factors in [0, 1], never exponentials of differences:
//
//   p_i = prod_{t <= i} a_t,  s_j = prod_{t > j} a_t,  D_ij = prod_{j < t <= i} a_t (i >= j)
//   A = scale * (q k^T o D),  M = k k^T o D below the diagonal
//   u = v - (p k) S - M w,  w = b u                        (u = v without the delta rule)
//   o = scale (p q) S + A w,  S' = p_C S + (s k)^T w
//
// Rows are tokens, in groups of kRows; columns of S, v and o are in panels as products read them (tile.h), and are
// independent of each other.
#pragma once

#include "arena.h"
#include "limits.h"
#include "math.h"
#include "pack.h"
#include "parallel.h"

namespace fastattn {
namespace FASTATTN_ISA {

constexpr int64_t kChunk = limits::chunk;
constexpr int64_t kChunkRows = (kChunk + kRows - 1) / kRows * kRows;
constexpr int64_t kPairs = (kChunkRows + W - 1) / W * W;  // floats between rows of a matrix of pairs of tokens
static_assert(kChunk % kPanel == 0);

// One head's plane of a tensor (A, B, rows, columns), from a row on.
FASTATTN_INLINE Matrix plane_of(const Tensor& t, int64_t a, int64_t b, int64_t row) {
  if (!t.data) return {nullptr, 0, t.dtype};
  const int64_t offset = a * t.stride[0] + b * t.stride[1] + row * t.stride[2];
  const int64_t width = t.dtype == DType::f32 ? 4 : 2;
  return {(const char*)t.data + offset * width, t.stride[2], t.dtype};
}

// Calls f(panel's first column, constant of its vectors) for each panel of [0, columns), a multiple of W.
template <class F>
FASTATTN_INLINE void for_panels(int64_t columns, const F& f) {
  for (int64_t d = 0; d < columns; d += kPanel) {
    const int64_t vecs = min64(kPanel, columns - d) / W;
    if constexpr (kVecs == 4) {
      if (vecs == 4) f(d, std::integral_constant<int, 4>{});
      if (vecs == 3) f(d, std::integral_constant<int, 3>{});
    }
    if (vecs == 2) f(d, std::integral_constant<int, 2>{});
    if (vecs == 1) f(d, std::integral_constant<int, 1>{});
  }
}

// f(row, column, place) for vectors of rows of `columns` columns that are kept as panels
// of `capacity` rows.
template <class F>
FASTATTN_INLINE void for_vectors(int64_t rows, int64_t columns, int64_t capacity, const F& f) {
  const int64_t padded = round_up(columns, W);
  for (int64_t d = 0; d < padded; d += kPanel) {
    const int64_t width = min64(kPanel, padded - d);
    for (int64_t i = 0; i < rows; i++)
      for (int64_t j = 0; j < width; j += W)
        f(i, d + j, d * capacity + i * width + j);
  }
}

// Rows of one dtype to panels: columns [first, first + columns) of `given`, the one after them 1 where `one`, others 0.
static void load_panels(float* to, int64_t capacity, const Matrix& from, int64_t rows, int64_t first, int64_t columns,
                        int64_t given, bool one) {
  with_dtype(from.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* data = (const T*)from.data;
    for_vectors(rows, columns, capacity, [&](int64_t i, int64_t d, int64_t place) {
      const int64_t left = given - first - d;
      const T* x = data + i * from.stride + first + d;
      vf value = left >= W ? load(x) : left > 0 ? load_n(x, (int)left) : vf{};
      if (one && left >= 0 && left < W) value = select(iota() == (int32_t)left, splat(1.0f), value);
      store(to + place, value);
    });
  });
}
// The other way; columns from `given` on are left out.
static void store_panels(const Matrix& to, const float* from, int64_t capacity, int64_t rows, int64_t first,
                         int64_t columns, int64_t given) {
  with_dtype(to.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* data = (T*)to.data;
    for_vectors(rows, columns, capacity, [&](int64_t i, int64_t d, int64_t place) {
      const int64_t left = min64(given - first, columns) - d;
      T* x = data + i * to.stride + first + d;
      if (left >= W)
        store(x, load(from + place));
      else if (left > 0)
        store_n(x, load(from + place), (int)left);
    });
  });
}

// The transpose of panels (rows, columns): as panels of kPanel rows, each (columns, kPanel), zero beyond `rows`.
static void transpose_panels(float* to, const float* from, int64_t capacity, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < round_up(rows, kPanel); r += W) {
    float* panel = to + r / kPanel * kPanel * columns + r % kPanel;
    for (int64_t d = 0; d < columns; d += W) {
      const int64_t first = d / kPanel * kPanel, width = min64(kPanel, columns - first);
      vf block[W];
      FASTATTN_UNROLL
      for (int i = 0; i < W; i++)
        block[i] = r + i < rows ? load(from + first * capacity + (r + i) * width + (d - first)) : vf{};
      transpose(block);
      FASTATTN_UNROLL
      for (int i = 0; i < W; i++) store(panel + (d + i) * kPanel, block[i]);
    }
  }
}

// A document of a batch: `length` tokens from `begin` on, its state's number, and the first of its kept states.
struct LinearSequence {
  int64_t batch, begin, length, state, kept;
};

// What one task computes: value heads [head, head + heads) of a key head, columns [column, column + columns) of their
// states, which part of the whole that is, and of the columns.
struct LinearTask {
  LinearSequence sequence;
  int64_t key_head, head, heads, column, columns, part, value_part;
};

struct LinearProblem {
  const LinearAttentionParams& p;
  int64_t key_heads, group, length, key_dim, value_dim, columns, sequences, kept;
  int64_t key_stride;  // floats between rows of a chunk's keys; beyond key_dim they are 0
  int64_t state_rows;  // of a state's panels
  int64_t part_columns;

  explicit LinearProblem(const LinearAttentionParams& p)
      : p(p),
        key_heads(p.q.size[1]),
        group(key_heads ? p.v.size[1] / key_heads : 0),
        length(p.q.size[2]),
        key_dim(p.q.size[3]),
        value_dim(p.v.size[3]),
        columns(value_dim + (p.normalize ? 1 : 0)),
        sequences(p.offsets.data ? p.offsets.size[3] - 1 : p.q.size[0]),
        kept(p.states.data && p.v.size[1] ? p.states.size[1] / p.v.size[1] : 0),
        key_stride(round_up(max64(round_up(key_dim, kPanel), round_up(key_dim, kRows)), W)),
        state_rows(round_up(key_dim, kRows)) {
    const int64_t panels = (columns + kPanel - 1) / kPanel;
    part_columns = (panels + p.value_parts - 1) / p.value_parts * kPanel;
  }

  int64_t tasks() const { return sequences * key_heads * p.head_parts * p.value_parts; }
  int64_t heads_of_part() const { return (group + p.head_parts - 1) / p.head_parts; }

  LinearSequence sequence(int64_t n) const {
    if (!p.offsets.data) return {n, 0, length, n, 0};
    const int64_t* cut = (const int64_t*)p.offsets.data + n;
    return {0, cut[0], cut[1] - cut[0], n, p.causal ? cut[0] / kChunk + n : n};
  }
  LinearTask task(int64_t n) const {
    const int64_t value_part = n % p.value_parts, head_part = n / p.value_parts % p.head_parts;
    const int64_t key_head = n / (p.value_parts * p.head_parts) % key_heads;
    LinearTask task;
    task.sequence = sequence(n / (p.value_parts * p.head_parts * key_heads));
    task.key_head = key_head;
    const int64_t first = group * head_part / p.head_parts, end = group * (head_part + 1) / p.head_parts;
    task.head = key_head * group + first;
    task.heads = end - first;
    task.column = min64(value_part * part_columns, columns);
    task.columns = min64(part_columns, columns - task.column);
    task.part = head_part * p.value_parts + value_part;
    task.value_part = value_part;
    return task;
  }
  // A head's kept state after `chunk` of the sequence's chunks.
  Matrix kept_state(const LinearSequence& s, int64_t head, int64_t chunk) const {
    return plane_of(p.states, s.batch, head * kept + s.kept + chunk, 0);
  }
  int64_t padded_columns() const { return round_up(min64(part_columns, columns), W); }
  int threads() const { return threads_for(p.threads, p.v.size[0] * p.v.size[1] * length * key_dim * value_dim); }

  // A task's columns of a state (dk, columns) in memory as panels; 0 of one that is absent.
  void load_state(float* to, const LinearTask& t, const Matrix& from) const {
    const int64_t padded = round_up(t.columns, W);
    memset(to, 0, size_t(state_rows * padded) * 4);
    if (from.data) load_panels(to, state_rows, from, key_dim, t.column, t.columns, columns, false);
  }
  void store_state(const Matrix& to, const float* from, const LinearTask& t) const {
    store_panels(to, from, state_rows, key_dim, t.column, t.columns, columns);
  }
  // A task's columns of a chunk's rows of v or its output's gradient as panels, 0 up to a whole group of rows.
  void load_values(float* to, const Tensor& from, const LinearTask& t, int64_t head, int64_t first, int64_t rows,
                   bool ones) const {
    const int64_t padded = round_up(t.columns, W);
    load_panels(to, kChunkRows, plane_of(from, t.sequence.batch, head, t.sequence.begin + first), rows, t.column,
                t.columns, value_dim, ones);
    for (int64_t d = 0; d < padded; d += kPanel) {
      const int64_t width = min64(kPanel, padded - d);
      memset(to + d * kChunkRows + rows * width, 0, size_t((round_up(rows, kRows) - rows) * width) * 4);
    }
  }
  // Panels to a chunk's rows of a tensor as v.
  void store_values(const Tensor& to, const float* from, const LinearTask& t, int64_t head, int64_t first,
                    int64_t rows) const {
    store_panels(plane_of(to, t.sequence.batch, head, t.sequence.begin + first), from, kChunkRows, rows, t.column,
                 t.columns, value_dim);
  }
};

// One thread's copy of a chunk's queries and keys, and what of it is the same for all value heads of a key head.
struct LinearKeys {
  const LinearProblem& problem;
  float *q, *k;                // (kChunkRows, key_stride)
  float *q_factor, *k_factor;  // (kChunkRows) of qk_norm
  float* transposed;           // k as panels of tokens, contracted over channels
  float *qk, *kk;              // (kChunkRows, kPairs) products, at and below the diagonal
  int64_t rows = 0, groups = 0;

  LinearKeys(const LinearProblem& problem, Arena& arena)
      : problem(problem),
        q(arena.take<float>(kChunkRows * problem.key_stride)),
        k(arena.take<float>(kChunkRows * problem.key_stride)),
        q_factor(arena.take<float>(kChunkRows)),
        k_factor(arena.take<float>(kChunkRows)),
        transposed(arena.take<float>(kChunk * problem.key_dim)),
        qk(arena.take<float>(kChunkRows * kPairs)),
        kk(arena.take<float>(kChunkRows * kPairs)) {}

  void load(const LinearTask& t, int64_t first, int64_t count) {
    const LinearAttentionParams& p = problem.p;
    rows = count, groups = (count + kRows - 1) / kRows;
    load_rows(q, q_factor, plane_of(p.q, t.sequence.batch, t.key_head, t.sequence.begin + first));
    load_rows(k, k_factor, plane_of(p.k, t.sequence.batch, t.key_head, t.sequence.begin + first));
  }
  // Products of all pairs at or below the diagonal.
  void multiply() {
    pack_transposed<Singles>(transposed, {k, problem.key_stride, DType::f32}, rows, problem.key_dim);
    products(qk, q);
    if (problem.p.delta_rule) products(kk, k);
  }

  static void scale_row(float* x, int64_t columns, float factor) {
    for (int64_t d = 0; d < columns; d += W) store(x + d, FASTATTN_ISA::load(x + d) * factor);
  }

 private:
  void load_rows(float* to, float* factors, const Matrix& from) {
    pack_rows<Singles>((float*)to, problem.key_stride, from, rows, problem.key_dim, 1.0f);
    if (!problem.p.qk_norm) return;
    for (int64_t i = 0; i < rows; i++) {
      float* x = to + i * problem.key_stride;
      vf sum{};
      for (int64_t d = 0; d < problem.key_dim; d += W) sum += FASTATTN_ISA::load(x + d) * FASTATTN_ISA::load(x + d);
      factors[i] = 1.0f / __builtin_sqrtf(reduce_add(sum) + 1e-6f);
      scale_row(x, problem.key_dim, factors[i]);
    }
  }
  FASTATTN_NOINLINE_MEMBER void products(float* to, const float* x) {
    const int64_t stride = problem.key_stride;
    for (int64_t j = 0; j < rows; j += kPanel)
      for (int64_t g = j / kRows; g < groups; g++)
        product<Singles>(x + g * kRows * stride, stride, transposed + j * problem.key_dim, problem.key_dim,
                         [&](int i, int v, vf value) { store(to + (g * kRows + i) * kPairs + j + v * W, value); });
  }
};

// What a chunk's decays and write strengths make of keys and queries for one value head.
struct LinearHead {
  const LinearProblem& problem;
  float *factor, *from_start, *to_end, *beta;  // (kChunkRows) a, p, s, b
  float* between;                              // (kChunkRows, kPairs) D, 0 above the diagonal
  float *a, *m;                                // (kChunkRows, kPairs) A and -M
  float *q_start, *k_start, *k_end;            // (kChunkRows, key_stride) scale p q, -p k, s k
  float* kept;                                 // (state_rows) what is left of a state's rows after the chunk

  LinearHead(const LinearProblem& problem, Arena& arena)
      : problem(problem),
        factor(arena.take<float>(kChunkRows)),
        from_start(arena.take<float>(kChunkRows)),
        to_end(arena.take<float>(kPairs)),
        beta(arena.take<float>(kChunkRows)),
        between(arena.take<float>(kChunkRows * kPairs)),
        a(arena.take<float>(kChunkRows * kPairs)),
        m(arena.take<float>(kChunkRows * kPairs)),
        q_start(arena.take<float>(kChunkRows * problem.key_stride)),
        k_start(arena.take<float>(kChunkRows * problem.key_stride)),
        k_end(arena.take<float>(kChunkRows * problem.key_stride)),
        kept(arena.take<float>(problem.state_rows)) {}

  void load(const LinearTask& t, int64_t head, int64_t first, const LinearKeys& keys) {
    load_gates(t, head, t.sequence.begin + first, keys.rows);
    decays(keys.rows);
    const int64_t stride = problem.key_stride, groups = keys.groups;
    const float scale = (float)problem.p.scale;
    const bool delta = problem.p.delta_rule;
    for (int64_t i = 0; i < problem.state_rows; i++) kept[i] = from_start[keys.rows - 1];
    for (int64_t i = 0; i < groups * kRows; i++) {
      const float p = from_start[i], s = to_end[i];
      for (int64_t d = i * stride; d < (i + 1) * stride; d += W) {
        const vf key = FASTATTN_ISA::load(keys.k + d);
        store(q_start + d, FASTATTN_ISA::load(keys.q + d) * (scale * p));
        store(k_end + d, key * s);
        if (delta) store(k_start + d, key * -p);
      }
      const float *d_row = between + i * kPairs, *qk = keys.qk + i * kPairs, *kk = keys.kk + i * kPairs;
      for (int64_t j = 0; j < kPairs; j += W) {
        const vi column = iota() + (int32_t)j;
        const vf decay = FASTATTN_ISA::load(d_row + j);
        // where nothing was computed, and what later tokens hold, is no number to multiply by 0
        const vi pair = column <= (int32_t)i;
        store(a + i * kPairs + j, keep(pair, FASTATTN_ISA::load(qk + j) * decay) * scale);
        if (delta) store(m + i * kPairs + j, -keep(column < (int32_t)i, FASTATTN_ISA::load(kk + j) * decay));
      }
    }
  }

 private:
  void load_gates(const LinearTask& t, int64_t head, int64_t token, int64_t rows) {
    const auto gate = [&](float* to, const Tensor& from, float missing) {
      const float* x = (const float*)from.data +
                       (from.data ? t.sequence.batch * from.stride[1] + head * from.stride[2] + token * from.stride[3] : 0);
      for (int64_t i = 0; i < kChunkRows; i++)
        to[i] = i >= rows ? 0.0f : from.data ? x[i * from.stride[3]] : missing;
    };
    gate(beta, problem.p.beta, 1.0f);
    gate(factor, problem.p.decay, 0.0f);
    if (problem.p.decay.data)
      for (int64_t i = 0; i < kChunkRows; i++) factor[i] = exp(splat(factor[i]))[0];
    else
      for (int64_t i = 0; i < kChunkRows; i++) factor[i] = 1.0f;
  }
  void decays(int64_t rows) {
    memset(between, 0, sizeof(float) * kPairs);
    between[0] = 1;
    for (int64_t i = 1; i < kChunkRows; i++) {
      float *row = between + i * kPairs, a = factor[i];
      for (int64_t j = 0; j < kPairs; j += W) store(row + j, FASTATTN_ISA::load(row - kPairs + j) * a);
      row[i] = 1;
    }
    for (int64_t i = 0; i < kChunkRows; i++) from_start[i] = factor[0] * between[i * kPairs];
    memcpy(to_end, between + (rows - 1) * kPairs, sizeof(float) * kPairs);
  }
};

// --- products of a panel of columns ----------------------------------------------------------------------------------

// acc += X y for group g's rows of pairs X (rows, tokens), 0 above the diagonal: of no later token, whatever it holds.
template <int V>
FASTATTN_INLINE void accumulate_earlier(vf (&acc)[kRows][V], const float* pairs, const float* y, int64_t g) {
  const float* x = pairs + g * kRows * kPairs;
  if (g > 0) accumulate<Singles, V>(acc, x, kPairs, 1, y, g * kRows);
  FASTATTN_UNROLL
  for (int j = 0; j < kRows; j++) {
    vf value[V];
    FASTATTN_UNROLL
    for (int v = 0; v < V; v++) value[v] = load(y + ((g * kRows + j) * V + v) * W);
    FASTATTN_UNROLL
    for (int i = j; i < kRows; i++) {
      FASTATTN_UNROLL
      for (int v = 0; v < V; v++) acc[i][v] += splat(x[i * kPairs + g * kRows + j]) * value[v];
    }
  }
}
// acc += X^T y for group g's rows: of no earlier token.
template <int V>
FASTATTN_INLINE void accumulate_later(vf (&acc)[kRows][V], const float* pairs, const float* y, int64_t g,
                                      int64_t groups) {
  const int64_t after = (g + 1) * kRows;
  if (g + 1 < groups)
    accumulate<Singles, V>(acc, pairs + after * kPairs + g * kRows, 1, kPairs, y + after * V * W, groups * kRows - after);
  FASTATTN_UNROLL
  for (int j = 0; j < kRows; j++) {
    vf value[V];
    FASTATTN_UNROLL
    for (int v = 0; v < V; v++) value[v] = load(y + ((g * kRows + j) * V + v) * W);
    FASTATTN_UNROLL
    for (int i = 0; i <= j; i++) {
      FASTATTN_UNROLL
      for (int v = 0; v < V; v++) acc[i][v] += splat(pairs[(g * kRows + j) * kPairs + g * kRows + i]) * value[v];
    }
  }
}

template <int V>
FASTATTN_INLINE void load_group(vf (&acc)[kRows][V], const float* x, int64_t stride) {
  FASTATTN_UNROLL
  for (int i = 0; i < kRows; i++) {
    FASTATTN_UNROLL
    for (int v = 0; v < V; v++) acc[i][v] = load(x + i * stride + v * W);
  }
}
template <int V>
FASTATTN_INLINE void store_group(float* x, int64_t stride, const vf (&acc)[kRows][V]) {
  FASTATTN_UNROLL
  for (int i = 0; i < kRows; i++) {
    FASTATTN_UNROLL
    for (int v = 0; v < V; v++) store(x + i * stride + v * W, acc[i][v]);
  }
}

// u and w of a chunk's rows, w in place of the values. u may be absent.
template <int V, bool kDelta>
FASTATTN_NOINLINE void write_values(float* w, float* u, const LinearHead& head, const float* state, int64_t groups) {
  constexpr int64_t kWidth = V * W;
  const int64_t stride = head.problem.key_stride;
  for (int64_t g = 0; g < groups; g++) {
    float *rows = w + g * kRows * kWidth, *raw = u ? u + g * kRows * kWidth : nullptr;
    vf acc[kRows][V];
    load_group(acc, rows, kWidth);
    const float* m = head.m + g * kRows * kPairs;
    if (kDelta) {
      accumulate<Singles, V>(acc, head.k_start + g * kRows * stride, stride, 1, state, head.problem.key_dim);
      if (g > 0) accumulate<Singles, V>(acc, m, kPairs, 1, w, g * kRows);
    }
    FASTATTN_UNROLL
    for (int i = 0; i < kRows; i++) {
      FASTATTN_UNROLL
      for (int v = 0; v < V; v++) {
        if (u) store(raw + i * kWidth + v * W, acc[i][v]);
        acc[i][v] = acc[i][v] * head.beta[g * kRows + i];
        store(rows + i * kWidth + v * W, acc[i][v]);
      }
      if (kDelta) {
        FASTATTN_UNROLL
        for (int j = i + 1; j < kRows; j++) {
          const vf factor = splat(m[j * kPairs + g * kRows + i]);
          FASTATTN_UNROLL
          for (int v = 0; v < V; v++) acc[j][v] += factor * acc[i][v];
        }
      }
    }
  }
}

// The outputs of a chunk's rows.
template <int V>
FASTATTN_NOINLINE void read_values(float* out, const LinearHead& head, const float* state, const float* w,
                                   int64_t groups) {
  constexpr int64_t kWidth = V * W;
  const int64_t stride = head.problem.key_stride;
  for (int64_t g = 0; g < groups; g++) {
    vf acc[kRows][V] = {};
    accumulate<Singles, V>(acc, head.q_start + g * kRows * stride, stride, 1, state, head.problem.key_dim);
    accumulate_earlier(acc, head.a, w, g);
    store_group(out + g * kRows * kWidth, kWidth, acc);
  }
}

// state = kept * state + x^T y, and + x2^T y2: x of (tokens, channels), y of (tokens, columns). kept null: 1.
template <int V>
FASTATTN_NOINLINE void update_state(float* state, int64_t state_rows, const float* kept, const float* x, int64_t stride,
                                    const float* y, int64_t tokens, const float* x2 = nullptr,
                                    const float* y2 = nullptr) {
  constexpr int64_t kWidth = V * W;
  for (int64_t r = 0; r < state_rows; r += kRows) {
    vf acc[kRows][V];
    FASTATTN_UNROLL
    for (int i = 0; i < kRows; i++) {
      FASTATTN_UNROLL
      for (int v = 0; v < V; v++) {
        acc[i][v] = load(state + (r + i) * kWidth + v * W);
        if (kept) acc[i][v] *= kept[r + i];
      }
    }
    accumulate<Singles, V>(acc, x + r, 1, stride, y, tokens);
    if (x2) accumulate<Singles, V>(acc, x2 + r, 1, stride, y2, tokens);
    store_group(state + r * kWidth, kWidth, acc);
  }
}

// out = factor * x state for rows of channels.
template <int V>
FASTATTN_NOINLINE void read_state(float* out, const float* x, int64_t stride, const float* state, int64_t key_dim,
                                  int64_t groups, float factor) {
  constexpr int64_t kWidth = V * W;
  for (int64_t g = 0; g < groups; g++) {
    vf acc[kRows][V] = {};
    accumulate<Singles, V>(acc, x + g * kRows * stride, stride, 1, state, key_dim);
    FASTATTN_UNROLL
    for (int i = 0; i < kRows; i++) {
      FASTATTN_UNROLL
      for (int v = 0; v < V; v++) store(out + (g * kRows + i) * kWidth + v * W, acc[i][v] * factor);
    }
  }
}

// Sums (rows, columns) and their divisor in the last column: the sums become what they are divided by it, and the
// divisor its reciprocal, 0 where it is 0.
static void divide_rows(float* sums, int64_t rows, int64_t columns) {
  const int64_t last = columns - 1, padded = round_up(columns, W), first = last / kPanel * kPanel;
  const int64_t width = min64(kPanel, padded - first);
  float* divisor = sums + first * kChunkRows + last - first;
  for (int64_t i = 0; i < rows; i++) {
    float& x = divisor[i * width];
    x = x == 0 ? 0.0f : 1.0f / x;
  }
  for_vectors(rows, columns, kChunkRows, [&](int64_t i, int64_t d, int64_t place) {
    const vf scaled = load(sums + place) * divisor[i * width];
    store(sums + place, select(iota() + (int32_t)d < (int32_t)last, scaled, load(sums + place)));
  });
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
