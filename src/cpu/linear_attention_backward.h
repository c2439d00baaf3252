// Linear attention backward, from a document's last chunk to its first. A chunk's matrices, u and w are recomputed from
// the state before it. With dS the gradient of the state after it:
//
//   z = dw - M^T (b z),  dw = A^T do + (s k) dS,  dv = b z,  db_i = sum u_i z_i
//   dA = scale * (do w^T at and below the diagonal),  dM = -(b z) w^T below it
//   dq = scale p (do S^T) + (dA o D) k
//   dk = -p ((b z) S^T) + s (w dS^T) + (dA o D)^T q + (dM o D + (dM o D)^T) k
//   dS before = p_C dS + scale (p q)^T do - (p k)^T (b z)
//
// The gradient of token t's decay sums the gradients of all products that contain it: pairs D_ij with j < t <= i, p_i
// of tokens i >= t (reads of the state before the chunk), s_j of tokens j < t (writes to the state after it), and p_C
// (the former state in the latter). No two large sums are subtracted, and where a = 0 every term is 0.
#pragma once

#include "linear_attention.h"

namespace fastattn {
namespace FASTATTN_ISA {

// y = b z of a chunk's rows, and beta's gradient z * u, summed by lanes.
template <int V, bool kDelta>
FASTATTN_NOINLINE void value_gradients(float* y, float* beta_lanes, const LinearHead& head, const float* d_out,
                                       const float* d_state, const float* u, int64_t groups, RowsAhead& ahead) {
  constexpr int64_t kWidth = V * W;
  const int64_t stride = head.problem.key_stride;
  for (int64_t g = groups - 1; g >= 0; g--) {
    ahead.step();
    vf acc[kRows][V] = {};
    accumulate<Singles, V>(acc, head.k_end + g * kRows * stride, stride, 1, d_state, head.problem.key_dim);
    accumulate_later(acc, head.a, d_out, g, groups);
    const int64_t after = (g + 1) * kRows;
    if (kDelta && g + 1 < groups)
      accumulate<Singles, V>(acc, head.m + after * kPairs + g * kRows, 1, kPairs, y + after * kWidth,
                             groups * kRows - after);
    const float* m = head.m + g * kRows * kPairs + g * kRows;
    FASTATTN_UNROLL
    for (int i = kRows - 1; i >= 0; i--) {
      const int64_t row = g * kRows + i;
      vf sum = load(beta_lanes + row * W);
      FASTATTN_UNROLL
      for (int v = 0; v < V; v++) {
        sum += acc[i][v] * load(u + row * kWidth + v * W);
        acc[i][v] = acc[i][v] * head.beta[row];
        store(y + row * kWidth + v * W, acc[i][v]);
      }
      store(beta_lanes + row * W, sum);
      if (kDelta) {
        FASTATTN_UNROLL
        for (int j = 0; j < i; j++) {
          const vf factor = splat(m[i * kPairs + j]);
          FASTATTN_UNROLL
          for (int v = 0; v < V; v++) acc[j][v] += factor * acc[i][v];
        }
      }
    }
  }
}

// acc += x y for group g of x, panels of `columns` columns, and a panel of y, whose panels have as many rows.
FASTATTN_INLINE void accumulate_panels(vf (&acc)[kRows][kVecs], const float* x, int64_t g, const float* y,
                                       int64_t columns) {
  for (int64_t d = 0; d < columns; d += kPanel) {
    const int64_t width = min64(kPanel, columns - d);
    accumulate<Singles, kVecs>(acc, x + d * kChunkRows + g * kRows * width, width, 1, y + d * kPanel, width);
  }
}

struct LinearBackward {
  const LinearProblem& problem;
  const LinearAttentionParams& p;
  int64_t padded, state_size, key_columns;
  LinearKeys keys;
  LinearHead head;
  float* grad_states;               // (value heads, state_size)
  float* state;                     // state_size, before the chunk
  float *state_t, *grad_state_t;    // (padded) as panels of channels
  float *w, *u, *d_out, *y, *sums;  // (kChunkRows, padded) as panels
  float* w_t;                       // (padded) as panels of tokens
  float *q_panels, *k_panels;       // (kChunkRows, key_columns) as panels
  float *grad_q, *grad_k;           // (kChunkRows, key_stride)
  float *grad_a, *grad_m;           // (kChunkRows, kPairs) dA and -dM of one value head
  float *pairs_a, *pairs_m;         // dA o D and dM o D, summed over value heads
  float* beta_lanes;                // (kChunkRows, W) of each row's gradient
  int64_t gate_columns;             // columns of a decay's gradient: channels, or W lanes to be summed
  float *read_rows, *write_rows;    // (kChunkRows, gate_columns) gradients of p (reads of the state before) and
                                    // of s (writes to the state after) of each row
  float* past;                      // (kChunkRows, gate_columns) gradients of the pairs whose D contains a row's decay
  float* carried;                   // (state_rows) gradient of p_C for each row of the state

  RowsAhead ahead;

  LinearBackward(const LinearProblem& problem, Arena& arena)
      : problem(problem),
        p(problem.p),
        padded(problem.padded_columns()),
        state_size(problem.state_rows * padded),
        key_columns(round_up(problem.key_dim, kPanel)),
        keys(problem, arena),
        head(problem, true, arena),
        grad_states(arena.take<float>(problem.heads_of_part() * state_size)),
        state(arena.take<float>(state_size)),
        state_t(arena.take<float>(padded * key_columns)),
        grad_state_t(arena.take<float>(padded * key_columns)),
        w(arena.take<float>(kChunkRows * padded)),
        u(arena.take<float>(kChunkRows * padded)),
        d_out(arena.take<float>(kChunkRows * padded)),
        y(arena.take<float>(kChunkRows * padded)),
        sums(arena.take<float>(problem.p.normalize ? kChunkRows * padded : 0)),
        w_t(arena.take<float>(kChunk * padded)),
        q_panels(arena.take<float>(kChunkRows * key_columns)),
        k_panels(arena.take<float>(kChunkRows * key_columns)),
        grad_q(arena.take<float>(kChunkRows * problem.key_stride)),
        grad_k(arena.take<float>(kChunkRows * problem.key_stride)),
        grad_a(arena.take<float>(kChunkRows * kPairs)),
        grad_m(arena.take<float>(kChunkRows * kPairs)),
        pairs_a(arena.take<float>(kChunkRows * kPairs)),
        pairs_m(arena.take<float>(kChunkRows * kPairs)),
        beta_lanes(arena.take<float>(kChunkRows * W)),
        gate_columns(problem.p.channels.data ? problem.key_stride : W),
        read_rows(arena.take<float>(kChunkRows * gate_columns)),
        write_rows(arena.take<float>(kChunkRows * gate_columns)),
        past(arena.take<float>(kChunkRows * gate_columns)),
        carried(arena.take<float>(problem.key_stride)) {}

  void run(const LinearTask& t) {
    const LinearSequence& s = t.sequence;
    for (int64_t h = 0; h < t.heads; h++)
      problem.load_state(grad_states + h * state_size, t, plane_of(p.grad_state, s.state, t.head + h, 0));
    if (p.causal)
      for (int64_t first = (s.length - 1) / kChunk * kChunk; first >= 0 && s.length > 0; first -= kChunk)
        chunk(t, first);
    else
      all_tokens(t);
    for (int64_t h = 0; h < t.heads && p.grad_initial.data; h++)
      problem.store_state(plane_of(p.grad_initial, s.state, t.head + h, 0), grad_states + h * state_size, t);
  }

 private:
  bool by_channel() const { return p.channels.data != nullptr; }
  bool wants_decay() const { return p.grad_decay.data || p.grad_channels.data; }

  void chunk(const LinearTask& t, int64_t first) {
    const int64_t rows = min64(kChunk, t.sequence.length - first);
    begin_chunk(t, first, rows);
    if (!by_channel()) {
      keys.multiply();
      pack_key_panels();
      memset(pairs_a, 0, sizeof(float) * kChunkRows * kPairs);
      memset(pairs_m, 0, sizeof(float) * kChunkRows * kPairs);
    }
    for (int64_t h = 0; h < t.heads; h++) {
      float* grad_state = grad_states + h * state_size;
      problem.load_state(state, t, problem.kept_state(t.sequence, t.head + h, first / kChunk));
      transpose_panels(state_t, state, problem.state_rows, problem.key_dim, padded_of(t));
      transpose_panels(grad_state_t, grad_state, problem.state_rows, problem.key_dim, padded_of(t));
      head.load(t, t.head + h, first, keys);
      problem.look_ahead(ahead, t, t.head + h, first - kChunk, &p.grad_out);
      values_again(t, t.head + h, first, rows);
      memset(beta_lanes, 0, sizeof(float) * kChunkRows * W);
      memset(read_rows, 0, size_t(kChunkRows * gate_columns) * 4);
      memset(write_rows, 0, size_t(kChunkRows * gate_columns) * 4);
      if (wants_decay()) carry_gradient(t, grad_state);
      for_panels(padded_of(t), [&](int64_t d, auto vecs) {
        constexpr int V = decltype(vecs)::value;
        const int64_t place = d * kChunkRows;
        const float* panel = grad_state + d * problem.state_rows;
        if (p.delta_rule)
          value_gradients<V, true>(y + place, beta_lanes, head, d_out + place, panel, u + place, keys.groups, ahead);
        else
          value_gradients<V, false>(y + place, beta_lanes, head, d_out + place, panel, u + place, keys.groups, ahead);
      });
      problem.store_values(p.grad_v, y, t, t.head + h, first, rows);
      transpose_panels(w_t, w, kChunkRows, rows, padded_of(t));
      pair_products(t, rows);
      if (by_channel())
        add_channel_pairs();
      else
        add_pairs();
      state_products(t);
      for_panels(padded_of(t), [&](int64_t d, auto vecs) {
        update_state<decltype(vecs)::value>(grad_state + d * problem.state_rows, problem.state_rows, head.kept,
                                            head.q_start, problem.key_stride, d_out + d * kChunkRows, rows,
                                            p.delta_rule ? head.k_start : nullptr, y + d * kChunkRows);
      });
      store_gates(t, t.head + h, first, rows);
    }
    if (!by_channel()) add_pair_products();
    store_keys(t, first, rows);
  }

  void all_tokens(const LinearTask& t) {
    const int64_t length = t.sequence.length;
    for (int64_t first = 0; first < length; first += kChunk) {
      const int64_t rows = min64(kChunk, length - first);
      begin_chunk(t, first, rows);
      for (int64_t h = 0; h < t.heads; h++) {
        problem.load_state(state, t, problem.kept_state(t.sequence, t.head + h, 0));
        transpose_panels(state_t, state, problem.state_rows, problem.key_dim, padded_of(t));
        load_out_gradient(t, t.head + h, first, rows);
        each_key_group([&](int64_t n, int64_t g) {
          vf acc[kRows][kVecs] = {};
          accumulate_panels(acc, d_out, g, state_t + n * padded_of(t), padded_of(t));
          add_scaled(grad_q, g, n, acc, (float)p.scale);
        });
        for_panels(padded_of(t), [&](int64_t d, auto vecs) {
          scale_panel(d_out + d * kChunkRows, keys.groups * kRows * decltype(vecs)::value * W, (float)p.scale);
          update_state<decltype(vecs)::value>(grad_states + h * state_size + d * problem.state_rows, problem.state_rows,
                                              nullptr, keys.q, problem.key_stride, d_out + d * kChunkRows, rows);
        });
      }
      store_rows(p.grad_q, t, first, rows, grad_q, keys.q, keys.q_factor);
    }
    for (int64_t first = 0; first < length; first += kChunk) {
      const int64_t rows = min64(kChunk, length - first);
      begin_chunk(t, first, rows);
      for (int64_t h = 0; h < t.heads; h++) {
        const float* grad_state = grad_states + h * state_size;
        transpose_panels(grad_state_t, grad_state, problem.state_rows, problem.key_dim, padded_of(t));
        problem.load_values(w, p.v, t, t.head + h, first, rows, p.normalize);
        each_key_group([&](int64_t n, int64_t g) {
          vf acc[kRows][kVecs] = {};
          accumulate_panels(acc, w, g, grad_state_t + n * padded_of(t), padded_of(t));
          add_scaled(grad_k, g, n, acc, 1.0f);
        });
        for_panels(padded_of(t), [&](int64_t d, auto vecs) {
          read_state<decltype(vecs)::value>(y + d * kChunkRows, keys.k, problem.key_stride,
                                            grad_state + d * problem.state_rows, problem.key_dim, keys.groups, 1.0f);
        });
        problem.store_values(p.grad_v, y, t, t.head + h, first, rows);
      }
      store_rows(p.grad_k, t, first, rows, grad_k, keys.k, keys.k_factor);
    }
  }

  static int64_t padded_of(const LinearTask& t) { return round_up(t.columns, W); }
  template <class F>
  void each_key_group(const F& f) const {
    for (int64_t n = 0; n < key_columns; n += kPanel)
      for (int64_t g = 0; g < keys.groups; g++) f(n, g);
  }
  static void scale_panel(float* x, int64_t count, float factor) {
    for (int64_t i = 0; i < count; i += W) store(x + i, load(x + i) * factor);
  }

  void begin_chunk(const LinearTask& t, int64_t first, int64_t rows) {
    keys.load(t, first, rows);
    memset(grad_q, 0, size_t(kChunkRows * problem.key_stride) * 4);
    memset(grad_k, 0, size_t(kChunkRows * problem.key_stride) * 4);
  }
  void pack_key_panels() {
    const int64_t rows = keys.groups * kRows;
    pack_panels<Singles>(q_panels, kChunkRows, 0, {keys.q, problem.key_stride, DType::f32}, rows, key_columns, kPanel);
    pack_panels<Singles>(k_panels, kChunkRows, 0, {keys.k, problem.key_stride, DType::f32}, rows, key_columns, kPanel);
  }

  // w and u of the chunk, and the gradient of its sums of values.
  void values_again(const LinearTask& t, int64_t value_head, int64_t first, int64_t rows) {
    problem.load_values(w, p.v, t, value_head, first, rows, p.normalize);
    for_panels(padded_of(t), [&](int64_t d, auto vecs) {
      constexpr int V = decltype(vecs)::value;
      const int64_t place = d * kChunkRows;
      if (p.delta_rule)
        write_values<V, true>(w + place, u + place, head, state + d * problem.state_rows, keys.groups, ahead);
      else
        write_values<V, false>(w + place, u + place, head, state + d * problem.state_rows, keys.groups, ahead);
      if (p.normalize)
        read_values<V>(sums + place, head, state + d * problem.state_rows, w + place, keys.groups, ahead);
    });
    load_out_gradient(t, value_head, first, rows);
  }

  // With normalize: the gradient of o / divisor. The sums of the causal form are known.
  void load_out_gradient(const LinearTask& t, int64_t value_head, int64_t first, int64_t rows) {
    problem.load_values(d_out, p.grad_out, t, value_head, first, rows, false);
    if (!p.normalize) return;
    if (!p.causal)
      for_panels(padded_of(t), [&](int64_t d, auto vecs) {
        read_state<decltype(vecs)::value>(sums + d * kChunkRows, keys.q, problem.key_stride,
                                          state + d * problem.state_rows, problem.key_dim, keys.groups, (float)p.scale);
      });
    divide_rows(sums, rows, t.columns);
    const int64_t last = t.columns - 1, panel = last / kPanel * kPanel, width = min64(kPanel, padded_of(t) - panel);
    const auto place = [&](int64_t i) { return panel * kChunkRows + i * width + last - panel; };
    for (int64_t i = 0; i < rows; i++) {
      const float divisor = sums[place(i)];
      vf dot{};
      for (int64_t d = 0; d < padded_of(t); d += kPanel) {
        const int64_t wide = min64(kPanel, padded_of(t) - d);
        for (int64_t j = 0; j < wide; j += W) {
          float* grad = d_out + d * kChunkRows + i * wide + j;
          const vf x = load(grad);  // 0 in the divisor's column
          dot += keep((iota() + (int32_t)(d + j)) < (int32_t)last, x * load(sums + d * kChunkRows + i * wide + j));
          store(grad, divided(x, divisor));
        }
      }
      d_out[place(i)] = divisor == 0 ? 0.0f : -reduce_add(dot) / divisor;
    }
  }

  void carry_gradient(const LinearTask& t, const float* grad_state) const {
    const int64_t padded = padded_of(t);
    memset(carried, 0, size_t(problem.key_stride) * 4);
    for (int64_t d = 0; d < padded; d += kPanel) {
      const int64_t width = min64(kPanel, padded - d);
      const float *x = state + d * problem.state_rows, *dx = grad_state + d * problem.state_rows;
      for (int64_t i = 0; i < problem.key_dim; i++) {
        vf row{};
        for (int64_t j = 0; j < width; j += W) row += load(x + i * width + j) * load(dx + i * width + j);
        carried[i] += reduce_add(row) * head.kept[i];
      }
    }
  }

  // dA / scale and -dM, unfactored.
  FASTATTN_NOINLINE_MEMBER void pair_products(const LinearTask& t, int64_t rows) {
    const int64_t columns = padded_of(t);
    for (int64_t j = 0; j < rows; j += kPanel)
      for (int64_t g = j / kRows; g < keys.groups; g++) {
        vf acc[kRows][kVecs] = {};
        accumulate_panels(acc, d_out, g, w_t + j * columns, columns);
        store_group(grad_a + g * kRows * kPairs + j, kPairs, acc);
        if (!p.delta_rule) continue;
        vf other[kRows][kVecs] = {};
        accumulate_panels(other, y, g, w_t + j * columns, columns);
        store_group(grad_m + g * kRows * kPairs + j, kPairs, other);
      }
  }

  // The gradients of the products of pairs, and of the decays in them: those of the pairs (i, j) that go past row t,
  // with j < t <= i, are sums over columns before t of sums over rows from the last one to t.
  void add_pairs() {
    const bool delta = p.delta_rule;
    const float scale = (float)p.scale;
    float by_column[kPairs] = {};
    for (int64_t i = keys.rows - 1; i >= 0; i--) {
      const int64_t row = i * kPairs;
      vf sum{};
      for (int64_t j = 0; j <= i; j += W) {
        const vi column = iota() + (int32_t)j;
        const vf decay = load(head.between + row + j);
        const vf da = keep(column <= (int32_t)i, load(grad_a + row + j) * decay * scale);
        store(pairs_a + row + j, load(pairs_a + row + j) + da);
        vf share = da * load(keys.qk + row + j);
        if (delta) {
          const vf dm = keep(column < (int32_t)i, -load(grad_m + row + j) * decay);
          store(pairs_m + row + j, load(pairs_m + row + j) + dm);
          share += dm * load(keys.kk + row + j);
        }
        const vf total = load(by_column + j) + keep(column < (int32_t)i, share);
        store(by_column + j, total);
        sum += keep(column < (int32_t)i, total);
      }
      store(past + i * W, sum);
    }
  }
  void add_channel_pairs() {
    const float scale = (float)p.scale;
    for (int64_t i = 0; i < keys.groups * kRows; i++) {
      const int32_t last = i < keys.rows ? (int32_t)i : -1;  // a row that fills up a group has no pairs
      for (int64_t j = 0; j < kPairs; j += W) {
        const vi column = iota() + (int32_t)j;
        const int64_t place = i * kPairs + j;
        store(grad_a + place, keep(column <= last, load(grad_a + place) * scale));
        if (p.delta_rule) store(grad_m + place, keep(column < last, -load(grad_m + place)));
      }
    }
    memset(past, 0, size_t(kChunkRows * gate_columns) * 4);
    head.channels.add_gradients(keys, grad_a, grad_m, p.delta_rule, grad_q, grad_k, past);
  }

  // Rows of grad of group g, channels from n on: += factor * acc.
  void add_scaled(float* to, int64_t g, int64_t n, const vf (&acc)[kRows][kVecs], float factor) const {
    FASTATTN_UNROLL
    for (int i = 0; i < kRows; i++) {
      float* row = to + (g * kRows + i) * problem.key_stride + n;
      FASTATTN_UNROLL
      for (int v = 0; v < kVecs; v++) store(row + v * W, load(row + v * W) + acc[i][v] * factor);
    }
  }
  // The same times the decays of rows, or of rows and channels; `dots` += x times acc, for their gradients.
  FASTATTN_INLINE_MEMBER void add_decayed(float* to, float* dots, int64_t g, int64_t n, const vf (&acc)[kRows][kVecs],
                                          const float* decay, const float* channel_decay, float factor,
                                          const float* x) const {
    const bool channels = by_channel(), wanted = wants_decay();
    FASTATTN_UNROLL
    for (int i = 0; i < kRows; i++) {
      const int64_t place = (g * kRows + i) * problem.key_stride + n;
      const float f = channels ? factor : decay[g * kRows + i] * factor;
      float* sums = dots + (g * kRows + i) * gate_columns;
      vf sum{};
      FASTATTN_UNROLL
      for (int v = 0; v < kVecs; v++) {
        float* row = to + place + v * W;
        vf y = acc[i][v] * f;
        if (channels) y *= load(channel_decay + place + v * W);
        store(row, load(row) + y);
        if (!wanted) continue;
        const vf part = load(x + place + v * W) * acc[i][v];
        if (channels)
          store(sums + n + v * W, load(sums + n + v * W) + part);
        else
          sum += part;
      }
      if (wanted && !channels) store(sums, load(sums) + sum);
    }
  }

  // Gradients of queries and keys from the state before the chunk and from the gradient of the state after it.
  FASTATTN_NOINLINE_MEMBER void state_products(const LinearTask& t) {
    const int64_t columns = padded_of(t);
    const LinearChannels& channels = head.channels;
    each_key_group([&](int64_t n, int64_t g) {
      vf acc[kRows][kVecs] = {};
      accumulate_panels(acc, d_out, g, state_t + n * columns, columns);
      add_decayed(grad_q, read_rows, g, n, acc, head.from_start, channels.from_start, (float)p.scale, head.q_start);
    });
    if (p.delta_rule)
      each_key_group([&](int64_t n, int64_t g) {
        vf acc[kRows][kVecs] = {};
        accumulate_panels(acc, y, g, state_t + n * columns, columns);
        add_decayed(grad_k, read_rows, g, n, acc, head.from_start, channels.from_start, -1.0f, head.k_start);
      });
    each_key_group([&](int64_t n, int64_t g) {
      vf acc[kRows][kVecs] = {};
      accumulate_panels(acc, w, g, grad_state_t + n * columns, columns);
      add_decayed(grad_k, write_rows, g, n, acc, head.to_end, channels.to_end, 1.0f, head.k_end);
    });
  }

  // Gradients of queries and keys from the chunk's pairs.
  FASTATTN_NOINLINE_MEMBER void add_pair_products() {
    const int64_t stride = problem.key_stride, groups = keys.groups;
    each_key_group([&](int64_t n, int64_t g) {
      vf acc[kRows][kVecs];
      float* to = grad_q + g * kRows * stride + n;
      load_group(acc, to, stride);
      accumulate_earlier(acc, pairs_a, k_panels + n * kChunkRows, g);
      store_group(to, stride, acc);
    });
    each_key_group([&](int64_t n, int64_t g) {
      vf acc[kRows][kVecs];
      float* to = grad_k + g * kRows * stride + n;
      load_group(acc, to, stride);
      accumulate_later(acc, pairs_a, q_panels + n * kChunkRows, g, groups);
      if (p.delta_rule) {
        accumulate_earlier(acc, pairs_m, k_panels + n * kChunkRows, g);
        accumulate_later(acc, pairs_m, k_panels + n * kChunkRows, g, groups);
      }
      store_group(to, stride, acc);
    });
  }

  void store_gates(const LinearTask& t, int64_t value_head, int64_t first, int64_t rows) {
    const auto row_of = [&](const Tensor& to) {
      return (float*)to.data + t.value_part * to.stride[0] + t.sequence.batch * to.stride[1] +
             value_head * to.stride[2] + t.sequence.begin + first;
    };
    if (p.grad_beta.data)
      for (int64_t i = 0; i < rows; i++) row_of(p.grad_beta)[i] = reduce_add(load(beta_lanes + i * W));
    if (!wants_decay()) return;
    if (by_channel()) {
      past_sums(rows);
      const int64_t batch = t.value_part * p.q.size[0] + t.sequence.batch;
      const Matrix to = plane_of(p.grad_channels, batch, value_head, t.sequence.begin + first);
      for (int64_t i = 0; i < rows; i++)
        memcpy((float*)to.data + i * to.stride, past + i * gate_columns, size_t(problem.key_dim) * 4);
    } else {
      for (int64_t i = 1; i < problem.key_dim; i++) carried[0] += carried[i];
      memset(carried + 1, 0, sizeof(float) * (W - 1));
      past_sums(rows);
      for (int64_t i = 0; i < rows; i++) row_of(p.grad_decay)[i] = reduce_add(load(past + i * W));
    }
  }
  // past += the gradients of a row's decay from reads of the state before the chunk and from writes to the one after.
  void past_sums(int64_t rows) {
    for (int64_t d = 0; d < gate_columns; d += W) {
      vf written = load(carried + d), read{};
      for (int64_t i = 0; i < rows; i++) {
        float* to = past + i * gate_columns + d;
        store(to, load(to) + written);
        written += load(write_rows + i * gate_columns + d);
      }
      for (int64_t i = rows - 1; i >= 0; i--) {
        float* to = past + i * gate_columns + d;
        read += load(read_rows + i * gate_columns + d);
        store(to, load(to) + read);
      }
    }
  }
  void store_keys(const LinearTask& t, int64_t first, int64_t rows) {
    store_rows(p.grad_q, t, first, rows, grad_q, keys.q, keys.q_factor);
    store_rows(p.grad_k, t, first, rows, grad_k, keys.k, keys.k_factor);
  }
  // x: the normalised rows; factors: those of qk_norm. A row's gradient is factor * (dx - x (x.dx)).
  void store_rows(const Tensor& to, const LinearTask& t, int64_t first, int64_t rows, float* grad, const float* x,
                  const float* factors) {
    const int64_t stride = problem.key_stride;
    for (int64_t i = 0; i < rows && p.qk_norm; i++) {
      float* row = grad + i * stride;
      vf dot{};
      for (int64_t d = 0; d < key_columns; d += W) dot += load(row + d) * load(x + i * stride + d);
      const float along = reduce_add(dot);
      for (int64_t d = 0; d < key_columns; d += W)
        store(row + d, (load(row + d) - load(x + i * stride + d) * along) * factors[i]);
    }
    const int64_t batch = t.part * p.q.size[0] + t.sequence.batch;
    const Matrix rows_of = plane_of(to, batch, t.key_head, t.sequence.begin + first);
    with_dtype(to.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      for (int64_t i = 0; i < rows; i++) {
        T* out = (T*)rows_of.data + i * rows_of.stride;
        const float* row = grad + i * stride;
        int64_t d = 0;
        for (; d + W <= problem.key_dim; d += W) store(out + d, load(row + d));
        if (d < problem.key_dim) store_n(out + d, load(row + d), int(problem.key_dim - d));
      }
    });
  }
};

static void linear_backward(const LinearAttentionParams& p) {
  const LinearProblem problem(p);
  Blocks memory;  // of each thread
  const int threads = problem.threads();
  const int64_t bytes = bytes_of([&](Arena& arena) { LinearBackward(problem, arena); });
  with_scratch(1, [&](Arena& arena) { memory = arena.blocks(threads, bytes); });
  parallel_items(problem.tasks(), threads, [&](int64_t n, int thread) {
    Arena arena = memory[thread];
    LinearBackward(problem, arena).run(problem.task(n));
  });
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
