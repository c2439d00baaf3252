// Linear attention in chunks of tokens: code shared by forward and backward. Decay factors inside a chunk are products
// of factors in [0, 1], never exponentials of differences:
//
//   p_i = prod_{t <= i} a_t,  s_j = prod_{t > j} a_t,  D_ij = prod_{j < t <= i} a_t (i >= j)
//   A = scale * (q k^T o D),  M = k k^T o D below the diagonal
//   u = v - (p k) S - M w,  w = b u                        (u = v without the delta rule)
//   o = scale (p q) S + A w,  S' = p_C S + (s k)^T w
//
// Rows are tokens, in groups of kRows; columns of S, v and o are in panels as products read them (tile.h), and are
// independent of each other.
#pragma once

#include "linear_attention_channels.h"
#include "linear_divisor.h"

namespace fastattn {
namespace FASTATTN_ISA {

// A chunk's decays and write strengths for one value head, and keys and queries multiplied by them.
struct LinearHead {
  const LinearProblem& problem;
  float *factor, *from_start, *to_end, *beta;  // (kChunkRows) a, p, s, b
  float* between;                              // (kChunkRows, kPairs) D, 0 above the diagonal
  float *a, *m;                                // (kChunkRows, kPairs) A and -M
  float *q_start, *k_start, *k_end;            // (kChunkRows, key_stride) scale p q, -p k, s k
  float* kept;                                 // (state_rows) the factors of a state's rows after the chunk
  LinearChannels channels;                     // replaces a, p, s and D if each key channel has a decay

  LinearHead(const LinearProblem& problem, bool backward, Arena& arena)
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
        kept(arena.take<float>(problem.state_rows)),
        channels(problem, backward, arena) {}

  void load(const LinearTask& t, int64_t head, int64_t first, const LinearKeys& keys) {
    load_gates(t, head, t.sequence.begin + first, keys.rows);
    if (problem.p.channels.data)
      load_channels(t, head, first, keys);
    else
      load_factors(keys);
  }

 private:
  void load_channels(const LinearTask& t, int64_t head, int64_t first, const LinearKeys& keys) {
    const bool delta = problem.p.delta_rule;
    const float scale = (float)problem.p.scale;
    channels.load(plane_of(problem.p.channels, t.sequence.batch, head, t.sequence.begin + first), keys.rows);
    channels.multiply(keys, a, m, scale, delta);
    memcpy(kept, channels.from_start + (keys.rows - 1) * problem.key_stride, size_t(problem.state_rows) * 4);
    for (int64_t d = 0; d < keys.groups * kRows * problem.key_stride; d += W) {
      const vf key = FASTATTN_ISA::load(keys.k + d), from = FASTATTN_ISA::load(channels.from_start + d);
      store(q_start + d, FASTATTN_ISA::load(keys.q + d) * from * scale);
      store(k_end + d, key * FASTATTN_ISA::load(channels.to_end + d));
      if (delta) store(k_start + d, -(key * from));
    }
  }
  void load_factors(const LinearKeys& keys) {
    decays(keys.rows);
    const int64_t stride = problem.key_stride, groups = keys.groups;
    const float scale = (float)problem.p.scale;
    const bool delta = problem.p.delta_rule;
    for (int64_t i = 0; i < problem.state_rows; i++) kept[i] = from_start[keys.rows - 1];
    for (int64_t i = 0; i < groups * kRows; i++) {
      const float p = from_start[i], s = to_end[i];
      const int32_t last = i < keys.rows ? (int32_t)i : -1;  // a row that fills up a group has no pairs
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
        // entries that were not computed, or of later tokens, may be NaN: set them to 0 instead of multiplying by 0
        store(a + i * kPairs + j, keep(column <= last, FASTATTN_ISA::load(qk + j) * decay) * scale);
        if (delta) store(m + i * kPairs + j, -keep(column < last, FASTATTN_ISA::load(kk + j) * decay));
      }
    }
  }

  void load_gates(const LinearTask& t, int64_t head, int64_t token, int64_t rows) {
    const auto gate = [&](float* to, const Tensor& from, float missing) {
      const float* x =
          (const float*)from.data +
          (from.data ? t.sequence.batch * from.stride[1] + head * from.stride[2] + token * from.stride[3] : 0);
      for (int64_t i = 0; i < kChunkRows; i++) to[i] = i >= rows ? 0.0f : from.data ? x[i * from.stride[3]] : missing;
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

// acc += X y for group g's rows of pairs X (rows, tokens), which is 0 above the diagonal. Later tokens are not read.
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
// acc += X^T y for group g's rows. Earlier tokens are not read.
template <int V>
FASTATTN_INLINE void accumulate_later(vf (&acc)[kRows][V], const float* pairs, const float* y, int64_t g,
                                      int64_t groups) {
  const int64_t after = (g + 1) * kRows;
  if (g + 1 < groups)
    accumulate<Singles, V>(acc, pairs + after * kPairs + g * kRows, 1, kPairs, y + after * V * W,
                           groups * kRows - after);
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

// u and w of a chunk's rows; w overwrites the values. u may be absent.
template <int V, bool kDelta>
FASTATTN_NOINLINE void write_values(float* w, float* u, const LinearHead& head, const float* state, int64_t groups,
                                    RowsAhead& ahead) {
  constexpr int64_t kWidth = V * W;
  const int64_t stride = head.problem.key_stride;
  for (int64_t g = 0; g < groups; g++) {
    ahead.step();
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
                                   int64_t groups, RowsAhead& ahead) {
  constexpr int64_t kWidth = V * W;
  const int64_t stride = head.problem.key_stride;
  for (int64_t g = 0; g < groups; g++) {
    ahead.step();
    vf acc[kRows][V] = {};
    accumulate<Singles, V>(acc, head.q_start + g * kRows * stride, stride, 1, state, head.problem.key_dim);
    accumulate_earlier(acc, head.a, w, g);
    store_group(out + g * kRows * kWidth, kWidth, acc);
  }
}

// state = kept * state + x^T y, and + x2^T y2; x is (tokens, channels), y is (tokens, columns). kept null: 1.
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

// Sums (rows, columns) with their divisor in the last column: divides the sums by it and leaves it.
static void divide_rows(float* sums, int64_t rows, int64_t columns) {
  const int64_t last = columns - 1, padded = round_up(columns, W), first = last / kPanel * kPanel;
  const int64_t width = min64(kPanel, padded - first);
  const float* divisor = sums + first * kChunkRows + last - first;
  for_vectors(rows, columns, kChunkRows, [&](int64_t i, int64_t d, int64_t place) {
    const vf x = load(sums + place);
    store(sums + place, select(iota() + (int32_t)d < (int32_t)last, divided(x, divisor[i * width]), x));
  });
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
