// Gated attention: causal softmax over scores whose distant part is gated by g = sigmoid(sharpness * a_i.a_j). Forward
// and backward are those of softmax with one more product per tile, as deep as there are groups.
#pragma once

#include "gradients.h"

namespace fastattn {
namespace FASTATTN_ISA {

// The assignment of every sequence, packed once for all heads: to contract groups, and to contract keys.
struct GatedProblem : Problem {
  const GatedParams& g;
  int64_t groups, group_columns;
  float sharpness;
  int64_t* offsets;  // (sequences) into `packed`
  float* packed;

  explicit GatedProblem(const GatedParams& params)
      : Problem(params), g(params), groups(params.assignment.size[3]), group_columns(round_up(groups, W)) {
    sharpness = *(const float*)g.sharpness.data;
    int64_t total = 0;
    for (int64_t s = 0; s < sequences; s++) total += words(sequence(s));
    char* memory = (char*)cpu::scratch(1, size_t(round_up(sequences * 8, 64) + total * 4));
    offsets = (int64_t*)memory;
    packed = (float*)(memory + round_up(sequences * 8, 64));
    int64_t next = 0;
    for (int64_t i = 0; i < sequences; i++) {
      const Sequence s = sequence(i);
      offsets[i] = next;
      next += words(s);
      pack_transposed<Singles>(packed + offsets[i], rows(s, s.k_begin), s.keys, groups);
      pack_panels<Singles>(key_panels(i), s.keys, 0, rows(s, s.k_begin), s.keys, groups);
    }
  }
  int64_t words(const Sequence& s) const { return round_up(round_up(s.keys, kPanel) * (groups + group_columns), 16); }
  Matrix rows(const Sequence& s, int64_t first) const {
    return {(const float*)g.assignment.data + s.batch * g.assignment.stride[1] + first * g.assignment.stride[2],
            g.assignment.stride[2], DType::f32};
  }
  const float* transposed(int64_t sequence) const { return packed + offsets[sequence]; }
  float* key_panels(int64_t s) const { return packed + offsets[s] + round_up(sequence(s).keys, kPanel) * groups; }
  int64_t index_of(const Sequence& s) const {
    if (documents < 0) return s.batch;
    int64_t low = 0;
    while (sequence(low).q_begin != s.q_begin || sequence(low).q_length != s.q_length) low++;
    return low;
  }

  // Where in a tile at key n the window of row i begins.
  int32_t near_column(const Sequence& s, int64_t i, int64_t n) const {
    return (int32_t)max64(min64(i + s.k_length - s.q_length - g.window - n, INT32_MAX / 2), -INT32_MAX / 2);
  }
};

// 1 / gate - 1 of z = sharpness * agreement * -log2(e), kept where reciprocal() holds.
FASTATTN_INLINE vf odds_against(vf z) { return exp2_clamped(at_most(z, 124.0f)); }
// -log2(gate)
FASTATTN_INLINE vf log2_gate(vf z) { return SoftplusScore<Arithmetic>::softplus(z, exp2_clamped(-vabs(z))) * kLog2E; }

template <class Unit>
struct GatedBlock : ForwardBlock<Unit, SoftmaxScore<Arithmetic>> {
  using Base = ForwardBlock<Unit, SoftmaxScore<Arithmetic>>;
  const GatedProblem& gated;
  float* a;          // (block_q, groups)
  float* agreement;  // (block_q, block_k)

  static int64_t own_bytes(const GatedProblem& problem, int64_t block_q, int64_t block_k) {
    return round_up(block_q * (problem.groups + block_k) * 4, 64);
  }
  static int64_t bytes(const GatedProblem& problem, int64_t block_q, int64_t block_k) {
    return Base::bytes(problem, block_q, block_k) + own_bytes(problem, block_q, block_k);
  }
  GatedBlock(const GatedProblem& problem, int64_t block_q, int64_t block_k, Arena arena)
      : Base(problem, block_q, block_k, Arena{arena.next + own_bytes(problem, block_q, block_k)}),
        gated(problem),
        a((float*)arena.next + block_q * block_k),
        agreement((float*)arena.next) {}

  void run(const BlockRows& block, const Sequence& s, int64_t sequence, const PackedPanels<Unit>& panels) {
    const AttentionParams& p = this->problem.p;
    const int64_t rows = block.count, groups = (rows + kRows - 1) / kRows;
    this->ranges.fill(s, block.first, rows);
    memset(this->out, 0, size_t(groups * kRows * this->out_columns) * 4);
    memset(this->sums, 0, size_t(groups * kRows * W) * 4);
    for (int64_t i = 0; i < groups * kRows; i++) this->top[i] = -__builtin_inff();
    pack_rows<Unit>(this->q, this->q_steps, matrix(p.q, s.batch, block.head, s.q_begin + block.first), rows,
                    this->problem.head_dim, this->problem.sign);
    pack_rows<Singles>(a, gated.groups, gated.rows(s, s.q_begin + block.first), rows, gated.groups, 1.0f);
    for (int64_t n = this->ranges.begin / this->block_k * this->block_k; n < this->ranges.end; n += this->block_k) {
      this->score_tile(n, groups, panels.keys, s.keys);
      gate_tile(s, sequence, block.first, rows, n);
      this->weigh_tile(s, block.head, block.first, rows, n, ScoreRow{}, p.dense.data != nullptr);
      this->add_values(n, groups, panels.values, panels.capacity, s.keys);
    }
    for (int64_t i = 0; i < rows; i++)
      finish_row<SoftmaxScore<Arithmetic>>(p, s, block.head, block.first + i, this->out + i * this->out_columns,
                                           this->problem.value_dim, reduce_add(load(this->sums + i * W)), this->top[i]);
  }

  void gate_tile(const Sequence& s, int64_t sequence, int64_t first, int64_t rows, int64_t n) {
    const int64_t there = min64(this->block_k, s.keys - n);
    if (gated.near_column(s, first + rows - 1, n) <= 0) return;  // every row's window starts before the tile
    tile_products<Singles>(agreement, this->block_k, a, gated.groups, gated.transposed(sequence) + n * gated.groups,
                           this->ranges, (rows + kRows - 1) / kRows, n, round_up(there, kPanel));
    for (int64_t i = 0; i < rows; i++) {
      const Columns columns(this->ranges, i / kRows, n, there);
      const int32_t near = gated.near_column(s, first + i, n);
      const int64_t end = min64(columns.end, near), whole = end / W * W;
      float *x = this->scores + i * this->block_k, *y = agreement + i * this->block_k;
      for (int64_t j = columns.begin; j < whole; j += W) store(x + j, gate(load(x + j), load(y + j)));
      for (int64_t j = max64(columns.begin, whole); j < end; j += W)
        store(x + j, select(iota() + (int32_t)j < near, gate(load(x + j), load(y + j)), load(x + j)));
    }
  }

  inline __attribute__((always_inline)) vf gate(vf x, vf agreement) const {
    const vf z = agreement * (gated.sharpness * -kLog2E);
    if (gated.g.gate == 0) return x * reciprocal(1.0f + odds_against(z));
    return x - log2_gate(z) * (1 / this->problem.c);  // the score is multiplied by c later
  }
};

template <class Unit>
static void gated_tiled(const GatedParams& p) {
  const GatedProblem problem(p);
  const Longest longest(problem);
  const int64_t block_q = round_up(p.block_q, kRows), block_k = round_up(p.block_k, kPanel);
  for_packed_blocks<Unit>(
      problem, longest, block_q, GatedBlock<Unit>::bytes(problem, block_q, block_k), false,
      [&](const BlockRows& rows, const Sequence& s, const PackedPanels<Unit>& panels, Arena arena) {
        GatedBlock<Unit>(problem, block_q, block_k, arena).run(rows, s, problem.index_of(s), panels);
      });
}

static void gated_attention_forward(const GatedParams& p) {
#if defined(FASTATTN_BF16_DOT)
  if (p.q.dtype == DType::bf16) return gated_tiled<Pairs>(p);
#endif
  gated_tiled<Singles>(p);
}

struct GatedGradientBlock : GradientBlock {
  const GatedProblem& problem;
  const GatedParams& p;
  float *weights, *slopes, *shares;  // (block_q, kGradientTile): P, dS to the products, gradient of the agreement
  float *a, *a_panels;               // assignments of the rows, and as panels contracted over rows
  float* grad_a;                     // (block_q, group_columns)
  float* grad_sharpness;             // (block_q)
  float* row_lse;

  static int64_t bytes(const GatedProblem& problem, int64_t block_q) {
    return GradientBlock::bytes(problem, block_q) +
           block_q * (3 * kGradientTile + problem.groups + 2 * problem.group_columns + 2) * 4 + 64 * 8;
  }
  GatedGradientBlock(const GatedProblem& problem, int64_t block_q, Arena& arena)
      : GradientBlock(problem, block_q, arena),
        problem(problem),
        p(problem.g),
        weights(arena.take<float>(block_q * kGradientTile)),
        slopes(arena.take<float>(block_q * kGradientTile)),
        shares(arena.take<float>(block_q * kGradientTile)),
        a(arena.take<float>(block_q * problem.groups)),
        a_panels(arena.take<float>(block_q * problem.group_columns)),
        grad_a(arena.take<float>(block_q * problem.group_columns)),
        grad_sharpness(arena.take<float>(block_q)),
        row_lse(arena.take<float>(block_q)) {}

  void run(const BlockRows& rows, const Sequence& s, int64_t sequence, GradientHead& head) {
    load(p, s, rows);
    const int64_t count = rows.count, groups = (count + kRows - 1) / kRows, columns_a = problem.group_columns;
    const int64_t row = s.q_begin + rows.first;
    const Matrix assignment = problem.rows(s, row);
    pack_rows<Singles>(a, problem.groups, assignment, count, problem.groups, 1.0f);
    pack_panels<Singles>(a_panels, block_q, 0, assignment, count, problem.groups);
    memset(grad_a, 0, size_t(groups * kRows * columns_a) * 4);
    memset(grad_sharpness, 0, size_t(count) * 4);
    const float* lse = (const float*)p.lse.data + s.batch * p.lse.stride[1] + rows.head * p.lse.stride[2] + row;
    for (int64_t i = 0; i < count; i++) row_lse[i] = lse[i] * kLog2E;
    for (int64_t n = ranges.begin < ranges.end ? ranges.begin / kGradientTile * kGradientTile : 0; n < ranges.end;
         n += kGradientTile) {
      const int64_t there = min64(kGradientTile, s.keys - n), columns = round_up(min64(ranges.end - n, there), kPanel);
      const bool gates = problem.near_column(s, rows.first + count - 1, n) > 0;  // some row has distant keys here
      int64_t first, last;
      rows_of_tile(count, n, kGradientTile, &first, &last);
      tile_products<Singles>(weights, kGradientTile, q, head_dim, head.keys_transposed + n * head_dim, ranges, groups,
                             n, columns);
      tile_products<Singles>(slopes, kGradientTile, grad_out, value_dim, head.values_transposed + n * value_dim, ranges,
                             groups, n, columns);
      if (gates)
        tile_products<Singles>(shares, kGradientTile, a, problem.groups,
                               problem.transposed(sequence) + n * problem.groups, ranges, groups, n, columns);
      for (int64_t r = first; r < last; r++) weigh_row(rows, s, r, n, there, gates);
      add_transposed(head.grad_values + n * value_columns, value_columns, weights, kGradientTile, grad_out_panels,
                     block_q, ranges, count, n);
      add_queries(head, slopes, kGradientTile, groups, n, there);
      add_transposed(head.grad_keys + n * head_columns, head_columns, slopes, kGradientTile, q_panels, block_q, ranges,
                     count, n);
      if (!gates) continue;
      add_transposed(head.extra + n * columns_a, columns_a, shares, kGradientTile, a_panels, block_q, ranges, count, n);
      for (int64_t d = 0; d < columns_a; d += kPanel) {
        const int64_t width = min64(kPanel, columns_a - d);
        for (int64_t g = 0; g < groups; g++) {
          const int64_t begin = max64(ranges.group_low[g] - n, 0), end = min64(ranges.group_high[g] - n, there);
          if (begin >= end) continue;
          add_product<Singles>(int(width / W), grad_a + g * kRows * columns_a + d, columns_a,
                               shares + g * kRows * kGradientTile + begin, kGradientTile, 1,
                               problem.key_panels(sequence) + d * s.keys + (n + begin) * width, end - begin);
        }
      }
    }
    store_gradients(matrix(p.grad_q, s.batch, rows.head, row), grad_q, head_columns, count, count, head_dim,
                    (float)p.scale);
    store_gradients(matrix(p.grad_query_assignment, s.batch, rows.head, row), grad_a, columns_a, count, count,
                    problem.groups, problem.sharpness);
    float* sharpness = (float*)p.grad_sharpness.data +
                       (s.batch * p.grad_sharpness.size[2] + rows.head) * p.grad_sharpness.size[3] + row;
    memcpy(sharpness, grad_sharpness, size_t(count) * 4);
  }

  // The row's scores, dP and agreements become P, dS and the gradient of sharpness * agreement.
  void weigh_row(const BlockRows& rows, const Sequence& s, int64_t r, int64_t n, int64_t there, bool gates) {
    const Columns columns(ranges, r / kRows, n, there);
    float *w = weights + r * kGradientTile, *slope = slopes + r * kGradientTile, *share = shares + r * kGradientTile;
    zero_outside(w, columns, kGradientTile);
    zero_outside(slope, columns, kGradientTile);
    if (gates) zero_outside(share, columns, kGradientTile);
    if (columns.empty()) return;
    const RowMask mask = row_mask(p, ranges, s, rows, r, n, there);
    const float c = problem.c * problem.sign, shift = row_lse[r], d = delta[r], scale = (float)p.scale;
    const int32_t near = problem.near_column(s, rows.row_of(r), n);
    vf sharpness{};
    const auto vectors = [&](int64_t begin, int64_t end, auto plain, auto logarithm) {
      // plain: every key is attended and gated
      for (int64_t j = begin; j < end; j += W) {
        const vf x = FASTATTN_ISA::load(w + j);
        vf y = x * c, gate = splat(1.0f), closed{}, agreement{};
        vi attends, distant;
        if constexpr (!plain) {
          attends = mask.at(j);
          distant = iota() + (int32_t)j < near;
        }
        const bool gated = plain || (gates && j < near);
        if (gated) {
          agreement = FASTATTN_ISA::load(share + j);
          const vf z = agreement * (problem.sharpness * -kLog2E);
          const vf odds = odds_against(z), open = reciprocal(1.0f + odds);
          closed = odds * open;  // 1 - gate, with its digits where the gate is all but 1
          gate = plain ? open : select(distant, open, gate);
          if (logarithm)
            y -= plain ? log2_gate(z) : keep(distant, log2_gate(z));
          else
            y *= gate;
        }
        vf weight = exp2_bounded(at_most(y - shift, 1.0f));
        if constexpr (!plain) weight = keep(attends, weight);
        vf ds = weight * (FASTATTN_ISA::load(slope + j) - d);
        if constexpr (!plain) ds = keep(attends, ds);
        const vf gated_ds = logarithm ? ds : ds * gate;
        store(w + j, weight);
        store(slope + j, gated_ds);
        if (!gates) continue;
        vf t{};
        if (gated) {
          t = logarithm ? ds * closed : gated_ds * closed * (x * scale);
          if constexpr (!plain) t = keep(distant & attends, t);
          sharpness += plain ? t * agreement : t * keep(distant & attends, agreement);
        }
        store(share + j, t);
      }
    };
    const int64_t whole =
        gates && mask.all(columns) ? max64(columns.begin, min64(columns.end, near / W * W)) : columns.begin;
    const auto both = [&](auto logarithm) {
      vectors(columns.begin, whole, std::true_type{}, logarithm);
      vectors(whole, columns.end, std::false_type{}, logarithm);
    };
    if (p.gate == 0)
      both(std::false_type{});
    else
      both(std::true_type{});
    grad_sharpness[r] += reduce_add(sharpness);
  }
};

static void gated_attention_backward(const GatedParams& p) {
  const GatedProblem problem(p);
  const Longest longest(problem);
  const int64_t block_q = round_up(p.block_q, kRows);
  for_gradient_heads(
      problem, longest, block_q, GatedGradientBlock::bytes(problem, block_q), problem.group_columns,
      [&](const BlockRows& rows, const Sequence& s, GradientHead& head, Arena arena) {
        GatedGradientBlock(problem, block_q, arena).run(rows, s, problem.index_of(s), head);
      },
      [&](int64_t pair, const Sequence& s, GradientHead& head) {
        const int64_t kv_head = pair % problem.kv_heads;
        store_gradients(matrix(p.grad_k, s.batch, kv_head, s.k_begin), head.grad_keys, head.head_columns, s.keys,
                        s.k_length, problem.head_dim, (float)p.scale);
        store_gradients(matrix(p.grad_v, s.batch, kv_head, s.k_begin), head.grad_values, head.value_columns, s.keys,
                        s.k_length, problem.value_dim, 1.0f);
        store_gradients(matrix(p.grad_key_assignment, s.batch, kv_head, s.k_begin), head.extra, problem.group_columns,
                        s.keys, s.k_length, problem.groups, problem.sharpness);
      });
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
