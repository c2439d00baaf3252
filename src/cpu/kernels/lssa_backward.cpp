#include "../lssa_backward.h"

namespace fastattn {
namespace FASTATTN_ISA {

void lssa_backward(const LssaParams& p) {
  const Problem problem(p);
  const Longest longest(problem);
  const int64_t columns = block_columns(p, longest.k, p.block_q, kGradientTile);
  const int64_t block_q = block_rows(p.block_q, columns, kScoreKib / 2), stride = score_stride(columns);
  const int64_t bytes = bytes_of([&](Arena& arena) { LssaGradientBlock(problem, p, block_q, stride, arena); });
  for_gradient_heads(
      problem, longest, block_q, bytes, 0, Together(),
      [&](const BlockRows& rows, const Sequence& s, const auto& heads, Arena arena) {
        GradientHead head = heads(0);
        LssaGradientBlock(problem, p, block_q, stride, arena).run(rows, s, head);
      },
      [&](int64_t kv_head, const Sequence& s, const GradientHead& head) {
        const Matrix keys = matrix(p.k, s.batch, kv_head, s.k_begin);
        for (int64_t j = 0; j < s.keys; j++)
          project_out(head.grad_keys + j * head.head_columns, keys, j, problem.head_dim, head.reciprocals[j]);
        store_gradients(matrix(p.grad_k, s.batch, kv_head, s.k_begin), head.grad_keys, head.head_columns, s.keys,
                        s.k_length, problem.head_dim, 1.0f);
        store_gradients(matrix(p.grad_v, s.batch, kv_head, s.k_begin), head.grad_values, head.value_columns, s.keys,
                        s.k_length, problem.value_dim, 1.0f);
      });
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
