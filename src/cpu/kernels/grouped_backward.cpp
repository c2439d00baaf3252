#include "../grouped_backward.h"

namespace fastattn {
namespace FASTATTN_ISA {

void grouped_backward(const GroupedParams& p) {
  const GroupedProblem problem(p);
  const Longest longest(problem);
  const int64_t block_q = round_up(p.block_q, kRows);
  const int64_t bytes = bytes_of([&](Arena& arena) { GroupedGradients(problem, longest, block_q, arena); });
  const int64_t heads = problem.sequences * problem.kv_heads;
  const int64_t parts = heads == 0 || heads >= p.threads ? 1 : even_parts(heads, p.threads, p.threads / heads);
  const int64_t slots = parts > 1 ? heads * parts : p.threads;
  Blocks memory;
  with_scratch(0, [&](Arena& arena) { memory = arena.blocks(slots, bytes); });
  const auto gradients = [&](int64_t slot) {
    Arena arena = memory[slot];
    return GroupedGradients(problem, longest, block_q, arena);
  };
  parallel_items(heads * parts, p.threads, [&](int64_t task, int thread) {
    const int64_t head = task / parts, sequence = head / problem.kv_heads, kv_head = head % problem.kv_heads;
    GroupedGradients mine = gradients(parts > 1 ? task : thread);
    mine.run(sequence, kv_head, task % parts, parts);
    if (parts == 1) mine.finish(sequence, kv_head);
  });
  if (parts == 1) return;
  parallel_items(heads, p.threads, [&](int64_t head, int) {
    GroupedGradients total = gradients(head * parts);
    for (int64_t part = 1; part < parts; part++) total.add(gradients(head * parts + part));
    total.finish(head / problem.kv_heads, head % problem.kv_heads);
  });
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
