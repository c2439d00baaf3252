#include "../gated_backward.h"

namespace fastattn {
namespace FASTATTN_ISA {

void gated_attention_backward(const GatedParams& p) {
  const GatedProblem problem(p);
  const Longest longest(problem);
  const int64_t block_q = round_up(p.block_q, kRows);
  const Together together = gradient_heads_together(problem, (longest.q + block_q - 1) / block_q);
  const int64_t bytes = bytes_of([&](Arena& arena) { GatedGradientBlock(problem, block_q, together.heads, arena); });
  for_gradient_heads(
      problem, longest, block_q, bytes, problem.group_columns, together,
      [&](const BlockRows& rows, const Sequence& s, const auto& heads, Arena arena) {
        GatedGradientBlock(problem, block_q, together.heads, arena).run(rows, s, problem.index_of(s), heads);
      },
      [&](int64_t kv_head, const Sequence& s, const GradientHead& head) {
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
