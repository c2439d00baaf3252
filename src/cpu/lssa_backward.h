// LSSA and LSSAR backward by the closed form. With x = (s - threshold) / (max - threshold) and P the normalised
// weights:
//   r = power P (dP - delta) / (s - threshold),  ds = r - (O/n) sum r,  dz = sigmoid(z) ds
// and y = c/(|q||k|) dz gives g_q = y K, g_k = y^T Q, whose components along q and k the normalisation removes.
#pragma once

#include "attention_gradients.h"
#include "lssa.h"
#include "row_lse.h"

namespace fastattn {
namespace FASTATTN_ISA {

// Removes a gradient row's component along its vector x: g - x (x.g) / |x|^2.
FASTATTN_INLINE void project_out(float* g, Matrix m, int64_t row, int64_t columns, float reciprocal) {
  with_dtype(m.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* x = (const T*)m.data + row * m.stride;
    vf along{};
    for (int64_t j = 0; j < columns; j += W) {
      const int n = (int)min64(W, columns - j);
      along += (n == W ? load(x + j) : load_n(x + j, n)) * reciprocal * load_n(g + j, n);
    }
    const float factor = reduce_add(along);
    for (int64_t j = 0; j < columns; j += W) {
      const int n = (int)min64(W, columns - j);
      store_n(g + j, load_n(g + j, n) - (n == W ? load(x + j) : load_n(x + j, n)) * reciprocal * factor, n);
    }
  });
}

struct LssaGradientBlock : GradientBlock {
  const Problem& problem;
  const LssaParams& p;
  Power power;  // one less than the op's
  int64_t stride;
  float* slopes;    // (block_q, stride) scores, then sigmoid(z), then y
  float* incoming;  // (block_q, stride) dP, then r
  float* weights;   // (block_q, kGradientTile) P
  float* sums;      // (block_q, W) of r, by lanes
  RowScale* scale;

  LssaGradientBlock(const Problem& problem, const LssaParams& p, int64_t block_q, int64_t stride, Arena& arena)
      : GradientBlock(problem, block_q, arena),
        problem(problem),
        p(p),
        power((p.reweigh ? p.power : 1.0) - 1),
        stride(stride),
        slopes(arena.take<float>(block_q * stride)),
        incoming(arena.take<float>(block_q * stride)),
        weights(arena.take<float>(block_q * kGradientTile)),
        sums(arena.take<float>(block_q * W)),
        scale(arena.take<RowScale>(block_q)) {}

  void run(const BlockRows& rows, const Sequence& s, GradientHead& head) {
    load(p, s, rows);
    take_grad_lse(delta, p, s, rows.head, rows.first, rows.count);
    row_scales(scale, problem, ranges, s, rows);
    const int64_t groups = (rows.count + kRows - 1) / kRows, count = rows.count;
    memset(sums, 0, size_t(count * W) * 4);
    const int64_t base = ranges.begin < ranges.end ? ranges.begin / kGradientTile * kGradientTile : 0;
    int64_t first, last;
    for (int64_t n = base; n < ranges.end; n += kGradientTile) {
      const int64_t there = min64(kGradientTile, s.keys - n), columns = round_up(min64(ranges.end - n, there), kPanel);
      rows_of_tile(count, n, kGradientTile, &first, &last);
      float *z = slopes + (n - base), *dp = incoming + (n - base);
      tile_products<Singles>(z, stride, q, head_dim, head.keys_transposed + n * head_dim, ranges, groups, n, columns);
      tile_products<Singles>(dp, stride, grad_out, value_dim, head.values_transposed + n * value_dim, ranges, groups, n,
                             columns);
      for (int64_t r = first; r < last; r++)
        weigh_row(rows, s, r, n, there, z + r * stride, dp + r * stride, head.reciprocals + n);
      add_transposed(head.grad_values + n * value_columns, value_columns, weights, kGradientTile, grad_out_panels,
                     block_q, ranges, count, n);
    }
    for (int64_t n = base; n < ranges.end; n += kGradientTile) {
      const int64_t there = min64(kGradientTile, s.keys - n);
      rows_of_tile(count, n, kGradientTile, &first, &last);
      float* y = slopes + (n - base);
      for (int64_t r = first; r < last; r++)
        finish_row(r, n, there, y + r * stride, incoming + (n - base) + r * stride, head.reciprocals + n);
      add_queries(head, y, stride, groups, n, there);
      add_transposed(head.grad_keys + n * head_columns, head_columns, y, stride, q_panels, block_q, ranges, count, n);
    }
    const int64_t row = s.q_begin + rows.first;
    for (int64_t r = 0; r < count; r++)
      project_out(grad_q + r * head_columns, matrix(p.q, s.batch, rows.head, row), r, head_dim,
                  scale[r].reciprocal_norm);
    store_gradients(matrix(p.grad_q, s.batch, rows.head, row), grad_q, head_columns, count, count, head_dim, 1.0f);
  }

  void weigh_row(const BlockRows& rows, const Sequence& s, int64_t r, int64_t n, int64_t there, float* z, float* dp,
                 const float* reciprocals) {
    const Columns columns(ranges, r / kRows, n, there);
    float* w = weights + r * kGradientTile;
    zero_outside(w, columns, kGradientTile);
    if (columns.empty()) return;
    const RowMask mask = row_mask(p, ranges, s, rows, r, n, there);
    const float* statistics = statistics_of(p, s, rows, r);
    const float top = statistics[0], height = statistics[1];
    const float total = statistics[2] == 0 ? 0.0f : 1 / statistics[2];
    const float factor = scale[r].scale * kLog2E, d = delta[r];
    const float slope = p.reweigh ? (float)p.power * height * total : total;
    vf sum = FASTATTN_ISA::load(sums + r * W);
    for (int64_t j = columns.begin; j < columns.end; j += W) {
      const vf x = FASTATTN_ISA::load(z + j) * (FASTATTN_ISA::load(reciprocals + j) * factor);
      const vf e = exp2_bounded(-vabs(x));
      const vf score = SoftplusScore<Arithmetic>::softplus(x, e);
      vf sigmoid = select(x < 0.0f, e, splat(1.0f)) * reciprocal(1.0f + e);
      vf weight, gradient = (FASTATTN_ISA::load(dp + j) - d) * slope;
      if (p.reweigh) {
        const vf above = at_least(1.0f - (top - score) * height, 0.0f);
        const vf lower = keep(above > 0.0f, Power::of(above, power));
        weight = lower * above * total;
        gradient *= lower;
      } else {
        weight = score * total;
      }
      const vi attends = mask.at(j);
      store(w + j, keep(attends, weight));
      gradient = keep(attends, gradient);
      sum += gradient;
      store(dp + j, gradient);
      store(z + j, keep(attends, sigmoid));
    }
    store(sums + r * W, sum);
  }

  void finish_row(int64_t r, int64_t n, int64_t there, float* y, const float* gradient, const float* reciprocals) {
    const Columns columns(ranges, r / kRows, n, there);
    zero_outside(y, columns, kGradientTile);
    const RowScale& row = scale[r];
    const float shift =
        p.reweigh && row.keys > kFew ? reduce_add(FASTATTN_ISA::load(sums + r * W)) / (float)row.keys : 0.0f;
    for (int64_t j = columns.begin; j < columns.end; j += W)
      store(y + j, FASTATTN_ISA::load(y + j) * (FASTATTN_ISA::load(gradient + j) - shift) *
                       (FASTATTN_ISA::load(reciprocals + j) * row.scale));
  }
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
