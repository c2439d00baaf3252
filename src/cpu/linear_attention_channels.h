// Decays of each key channel. Products of pairs x_i . (y_j prod_{j < t <= i} a_t) are formed in blocks of rows. With
// keys before the block they are (x E) (y F)^T: E is the decay from the block's first token to the row, F from the key
// to that token, both products of factors in [0, 1]. Inside the block they are formed row by row. Gradients likewise.
#pragma once

#include "linear_attention_problem.h"

namespace fastattn {
namespace FASTATTN_ISA {

constexpr int64_t kBlock = 2 * kRows;

struct LinearChannels {
  const LinearProblem& problem;
  int64_t stride, key_columns;
  float *rates, *from_start, *to_end;     // (kChunkRows, stride) a, p, s
  float* lead;                            // (kBlock, stride) E of the block
  float *q_lead, *k_lead;                 // q E, k E
  float *to_block, *k_block;              // (kChunkRows, stride) F of the keys before the block, k F
  float* transposed;                      // k F as panels of tokens, contracted over channels
  float *k_panels, *q_panels, *m_panels;  // k F, q E and k E as panels of channels, contracted over tokens
  float *reads, *writes;  // (kChunkRows, stride): the pairs' contributions to the gradients of their tokens' decays

  LinearChannels(const LinearProblem& problem, bool backward, Arena& arena)
      : problem(problem), stride(problem.key_stride), key_columns(round_up(problem.key_dim, kPanel)) {
    const int64_t rows = problem.p.channels.data ? kChunkRows : 0, block = rows ? kBlock : 0;
    const int64_t back = backward ? 1 : 0;
    rates = arena.take<float>(rows * stride);
    from_start = arena.take<float>(rows * stride);
    to_end = arena.take<float>(rows * stride);
    lead = arena.take<float>(block * stride);
    q_lead = arena.take<float>(block * stride);
    k_lead = arena.take<float>(block * stride);
    to_block = arena.take<float>(rows * stride);
    k_block = arena.take<float>(rows * stride);
    transposed = arena.take<float>(rows * problem.key_dim);
    k_panels = arena.take<float>(back * rows * key_columns);
    q_panels = arena.take<float>(back * block * key_columns);
    m_panels = arena.take<float>(back * block * key_columns);
    reads = arena.take<float>(back * block * stride);
    writes = arena.take<float>(back * rows * stride);
  }

  // The factors of a chunk's rows; 1 for rows past the end.
  void load(const Matrix& from, int64_t rows) {
    pack_rows<Singles>(rates, stride, from, rows, problem.key_dim, 1.0f);
    for (int64_t d = 0; d < rows * stride; d += W) store(rates + d, exp(FASTATTN_ISA::load(rates + d)));
    for (int64_t d = rows * stride; d < kChunkRows * stride; d += W) store(rates + d, splat(1.0f));
    memcpy(from_start, rates, size_t(stride) * 4);
    for (int64_t d = stride; d < kChunkRows * stride; d += W)
      store(from_start + d, FASTATTN_ISA::load(from_start + d - stride) * FASTATTN_ISA::load(rates + d));
    for (int64_t i = kChunkRows - 1; i >= 0; i--)
      for (int64_t d = i * stride; d < (i + 1) * stride; d += W)
        store(to_end + d, i >= rows - 1
                              ? splat(1.0f)
                              : FASTATTN_ISA::load(to_end + d + stride) * FASTATTN_ISA::load(rates + d + stride));
  }

  // a = scale * (products of queries and keys), m = -(products of keys), 0 above the diagonal and m's on it.
  void multiply(const LinearKeys& keys, float* a, float* m, float scale, bool delta) {
    memset(a, 0, sizeof(float) * kChunkRows * kPairs);
    if (delta) memset(m, 0, sizeof(float) * kChunkRows * kPairs);
    const int64_t rows = keys.groups * kRows;
    for (int64_t r = 0; r < rows; r += kBlock) {
      const int64_t end = min64(rows, r + kBlock);
      begin_block(keys, r, end);
      if (r > 0) pack_transposed<Singles>(transposed, {k_block, stride, DType::f32}, r, problem.key_dim);
      if (r > 0) block_products(a, q_lead, r, end, scale);
      if (r > 0 && delta) block_products(m, k_lead, r, end, -1.0f);
      inside(keys, a, m, r, end, scale, delta);
    }
  }

  // From da and dm, the gradients of these products without their factors: adds to the gradients of queries and keys,
  // and to the gradient of the decays' logarithms (kChunkRows, stride).
  void add_gradients(const LinearKeys& keys, const float* da, const float* dm, bool delta, float* grad_q, float* grad_k,
                     float* grad_rates) {
    const int64_t rows = keys.groups * kRows;
    for (int64_t r = 0; r < rows; r += kBlock) {
      const int64_t end = min64(rows, r + kBlock);
      begin_block(keys, r, end);
      if (r > 0) before_gradients(da, dm, r, end, delta, grad_q, grad_k, grad_rates);
      for (int64_t d = 0; d < stride; d += W)
        inside_gradients(keys, da, dm, r, end, delta, grad_q + d, grad_k + d, grad_rates + d, d);
    }
  }

 private:
  // E, q E and k E of rows [r, end); F and k F of the keys before r, from those of the previous block.
  void begin_block(const LinearKeys& keys, int64_t r, int64_t end) {
    for (int64_t d = 0; d < stride; d += W) {
      if (r > 0) {
        vf factor = FASTATTN_ISA::load(rates + r * stride + d);
        for (int64_t j = r - 1; j >= r - kBlock; j--) {
          store(to_block + j * stride + d, factor);
          if (j > r - kBlock) factor *= FASTATTN_ISA::load(rates + j * stride + d);
        }
        for (int64_t j = 0; j < r - kBlock; j++)
          store(to_block + j * stride + d, FASTATTN_ISA::load(to_block + j * stride + d) * factor);
      }
      vf factor = splat(1.0f);
      for (int64_t i = r; i < end; i++) {
        if (i > r) factor *= FASTATTN_ISA::load(rates + i * stride + d);
        store(lead + (i - r) * stride + d, factor);
      }
    }
    for (int64_t d = 0; d < r * stride; d += W)
      store(k_block + d, FASTATTN_ISA::load(keys.k + d) * FASTATTN_ISA::load(to_block + d));
    for (int64_t d = 0; d < (end - r) * stride; d += W) {
      store(q_lead + d, FASTATTN_ISA::load(keys.q + r * stride + d) * FASTATTN_ISA::load(lead + d));
      store(k_lead + d, FASTATTN_ISA::load(keys.k + r * stride + d) * FASTATTN_ISA::load(lead + d));
    }
  }
  FASTATTN_NOINLINE_MEMBER void block_products(float* to, const float* x, int64_t r, int64_t end, float factor) const {
    for (int64_t j = 0; j < r; j += kPanel)
      for (int64_t i = 0; i < end - r; i += kRows)
        product<Singles>(x + i * stride, stride, transposed + j * problem.key_dim, problem.key_dim,
                         [&](int n, int v, vf value) { store(to + (r + i + n) * kPairs + j + v * W, value * factor); });
  }
  FASTATTN_NOINLINE_MEMBER void inside(const LinearKeys& keys, float* a, float* m, int64_t r, int64_t end, float scale,
                                       bool delta) const {
    vf sum_a[kBlock][kBlock] = {}, sum_m[kBlock][kBlock] = {};
    for (int64_t d = 0; d < problem.key_dim; d += W) {
      vf key[kBlock];
      for (int64_t i = r; i < end; i++) {
        const vf q = FASTATTN_ISA::load(keys.q + i * stride + d), k = FASTATTN_ISA::load(keys.k + i * stride + d);
        const vf rate = FASTATTN_ISA::load(rates + i * stride + d);
        for (int64_t j = 0; j < i - r; j++) {
          key[j] *= rate;
          sum_a[i - r][j] += q * key[j];
          if (delta) sum_m[i - r][j] += k * key[j];
        }
        key[i - r] = k;
        sum_a[i - r][i - r] += q * k;
      }
    }
    for (int64_t i = r; i < end; i++)
      for (int64_t j = r; j < end; j++) {
        a[i * kPairs + j] = j <= i ? reduce_add(sum_a[i - r][j - r]) * scale : 0.0f;
        if (delta) m[i * kPairs + j] = j < i ? -reduce_add(sum_m[i - r][j - r]) : 0.0f;
      }
  }

  FASTATTN_NOINLINE_MEMBER void before_gradients(const float* da, const float* dm, int64_t r, int64_t end, bool delta,
                                                 float* grad_q, float* grad_k, float* grad_rates) {
    const int64_t count = end - r;
    pack_panels<Singles>(k_panels, kChunkRows, 0, {k_block, stride, DType::f32}, r, key_columns, kPanel);
    pack_panels<Singles>(q_panels, kBlock, 0, {q_lead, stride, DType::f32}, count, key_columns, kPanel);
    if (delta) pack_panels<Singles>(m_panels, kBlock, 0, {k_lead, stride, DType::f32}, count, key_columns, kPanel);
    for (int64_t n = 0; n < key_columns; n += kPanel) {
      for (int64_t i = 0; i < count; i += kRows) {
        vf acc[kRows][kVecs] = {}, other[kRows][kVecs] = {};
        accumulate<Singles, kVecs>(acc, da + (r + i) * kPairs, kPairs, 1, k_panels + n * kChunkRows, r);
        add_rows(grad_q + (r + i) * stride + n, lead + i * stride + n, acc);
        if (delta) {
          accumulate<Singles, kVecs>(other, dm + (r + i) * kPairs, kPairs, 1, k_panels + n * kChunkRows, r);
          add_rows(grad_k + (r + i) * stride + n, lead + i * stride + n, other);
        }
        for (int g = 0; g < kRows; g++)
          for (int v = 0; v < kVecs; v++) {
            const int64_t place = (i + g) * stride + n + v * W;
            store(reads + place,
                  acc[g][v] * FASTATTN_ISA::load(q_lead + place) + other[g][v] * FASTATTN_ISA::load(k_lead + place));
          }
      }
      for (int64_t j = 0; j < r; j += kRows) {
        vf acc[kRows][kVecs] = {};
        accumulate<Singles, kVecs>(acc, da + r * kPairs + j, 1, kPairs, q_panels + n * kBlock, count);
        if (delta) accumulate<Singles, kVecs>(acc, dm + r * kPairs + j, 1, kPairs, m_panels + n * kBlock, count);
        add_rows(grad_k + j * stride + n, to_block + j * stride + n, acc);
        for (int g = 0; g < kRows; g++)
          for (int v = 0; v < kVecs; v++) {
            const int64_t place = (j + g) * stride + n + v * W;
            store(writes + place, acc[g][v] * FASTATTN_ISA::load(k_block + place));
          }
      }
    }
    // the decay of token t is in the pairs of a key before t and a row of the block at or after t
    for (int64_t d = 0; d < key_columns; d += W) {
      vf sum{};
      for (int64_t j = 0; j + 1 < r; j++) {
        sum += FASTATTN_ISA::load(writes + j * stride + d);
        float* to = grad_rates + (j + 1) * stride + d;
        store(to, FASTATTN_ISA::load(to) + sum);
      }
      sum = vf{};
      for (int64_t i = count - 1; i >= 0; i--) {
        sum += FASTATTN_ISA::load(reads + i * stride + d);
        float* to = grad_rates + (r + i) * stride + d;
        store(to, FASTATTN_ISA::load(to) + sum);
      }
    }
  }
  FASTATTN_INLINE_MEMBER void add_rows(float* to, const float* factor, const vf (&acc)[kRows][kVecs]) const {
    FASTATTN_UNROLL
    for (int i = 0; i < kRows; i++) {
      FASTATTN_UNROLL
      for (int v = 0; v < kVecs; v++) {
        const int64_t place = i * stride + v * W;
        store(to + place, FASTATTN_ISA::load(to + place) + acc[i][v] * FASTATTN_ISA::load(factor + place));
      }
    }
  }
  // The pairs inside rows [r, end), for W channels from d on.
  void inside_gradients(const LinearKeys& keys, const float* da, const float* dm, int64_t r, int64_t end, bool delta,
                        float* grad_q, float* grad_k, float* grad_rates, int64_t d) const {
    vf key[kBlock], ratio[kBlock], grad_key[kBlock] = {}, grad_rate[kBlock + 1] = {};
    for (int64_t i = 0; i < end - r; i++) {
      const int64_t row = (r + i) * stride + d;
      const vf q = FASTATTN_ISA::load(keys.q + row), k = FASTATTN_ISA::load(keys.k + row);
      const vf rate = FASTATTN_ISA::load(rates + row);
      const float *a = da + (r + i) * kPairs + r, *m = dm + (r + i) * kPairs + r;
      vf read = k * a[i], left{}, past{};
      for (int64_t j = 0; j < i; j++) {
        ratio[j] *= rate;
        const vf decayed = key[j] * ratio[j];
        vf by = q * a[j];
        read += decayed * a[j];
        if (delta) {
          by += k * m[j];
          left += decayed * m[j];
        }
        grad_key[j] += by * ratio[j];
        past += by * decayed;
        grad_rate[j + 1] += past;
      }
      key[i] = k;
      ratio[i] = splat(1.0f);
      grad_key[i] += left + q * a[i];
      float* to = grad_q + (r + i) * stride;
      store(to, FASTATTN_ISA::load(to) + read);
    }
    for (int64_t i = 0; i < end - r; i++) {
      float *to = grad_k + (r + i) * stride, *rate = grad_rates + (r + i) * stride;
      store(to, FASTATTN_ISA::load(to) + grad_key[i]);
      store(rate, FASTATTN_ISA::load(rate) + grad_rate[i]);
    }
  }
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
