// Tiled attention forward: keys and values are packed once a key head, then blocks of query rows run on their own.
#pragma once

#include "attention_forward_block.h"

namespace fastattn {
namespace FASTATTN_ISA {

template <class Unit, class Score>
static void forward_tiled(const AttentionParams& p) {
  const Problem problem(p);
  const int64_t block_q = round_up(p.block_q, kRows), block_k = round_up(p.block_k, kPanel);
  int64_t longest_q = 0, longest_k = 0;
  for (int64_t s = 0; s < problem.sequences; s++) {
    const Sequence r = problem.sequence(s);
    if (decodes(problem, r)) continue;
    longest_q = max64(longest_q, r.q_length);
    longest_k = max64(longest_k, r.keys);
  }
  if (longest_q == 0) return;
  const int64_t head_bytes = bytes_of([&](Arena& arena) { PackedHead<Unit>(problem, longest_k, arena); });
  const int64_t block_bytes =
      bytes_of([&](Arena& arena) { ForwardBlock<Unit, Score>(problem, block_q, block_k, arena); });
  const int64_t blocks = (longest_q + block_q - 1) / block_q;
  const int64_t pairs = problem.sequences * problem.kv_heads;
  const int64_t wave = max64(1, min64(pairs, p.pack_kib * 1024 / max64(head_bytes, 1)));

  constexpr int64_t kPackRows = 4 * kPanel;  // keys packed by one task
  const int64_t pack_tasks = (longest_k + kPackRows - 1) / kPackRows;
  const auto pack = [&](int64_t pair, int64_t first, Arena memory) {
    const Sequence s = problem.sequence(pair / problem.kv_heads);
    const int64_t head = pair % problem.kv_heads, rows = min64(kPackRows, s.keys - first);
    if (rows <= 0 || decodes(problem, s)) return;
    const PackedHead<Unit> to(problem, longest_k, memory);
    pack_transposed<Unit>(to.keys + first * steps_of<Unit>(problem.head_dim),
                          matrix(p.k, s.batch, head, s.k_begin + first), rows, problem.head_dim);
    pack_panels<Unit>(to.values, to.capacity, first / Unit::kStep, matrix(p.v, s.batch, head, s.k_begin + first), rows,
                      problem.value_dim);
  };
  // block `index` of a pair's query heads; the last rows of a causal sequence have the most keys, so they start first
  const auto run = [&](int64_t pair, int64_t index, Arena packed, Arena memory) {
    const Sequence s = problem.sequence(pair / problem.kv_heads);
    const int64_t first = (blocks - 1 - index % blocks) * block_q;
    if (first >= s.q_length || decodes(problem, s)) return;
    const int64_t head = pair % problem.kv_heads * problem.group + index / blocks;
    ForwardBlock<Unit, Score> block(problem, block_q, block_k, memory);
    block.run(s, head, first, min64(block_q, s.q_length - first), PackedHead<Unit>(problem, longest_k, packed));
  };

  const int64_t pair_blocks = problem.group * blocks;
  const bool small = small_pairs(pairs, head_bytes, p.threads);
  Blocks memory, heads;  // of each thread; packed, of each thread or of each pair of a wave
  with_scratch(0, [&](Arena& arena) {
    memory = arena.blocks(p.threads, block_bytes);
    heads = small ? arena.blocks(p.threads, head_bytes) : arena.blocks(wave, head_bytes, 64);
  });
  if (small) {
    parallel_items(pairs, p.threads, [&](int64_t pair, int thread) {
      for (int64_t i = 0; i < pack_tasks; i++) pack(pair, i * kPackRows, heads[thread]);
      for (int64_t i = 0; i < pair_blocks; i++) run(pair, i, heads[thread], memory[thread]);
    });
    return;
  }
  for (int64_t begin = 0; begin < pairs; begin += wave) {
    const int64_t count = min64(wave, pairs - begin);
    parallel_items(count * pack_tasks, p.threads, [&](int64_t task, int) {
      const int64_t slot = task / pack_tasks;
      pack(begin + slot, task % pack_tasks * kPackRows, heads[slot]);
    });
    parallel_items(count * pair_blocks, p.threads, [&](int64_t task, int thread) {
      const int64_t slot = task / pair_blocks;
      run(begin + slot, task % pair_blocks, heads[slot], memory[thread]);
    });
  }
}

template <class Score>
static void forward_scored(const AttentionParams& p) {
  if (p.decode_rows > 0) forward_decoded<Score>(p);
#if defined(FASTATTN_BF16_DOT)
  if (p.q.dtype == DType::bf16) return forward_tiled<Pairs, Score>(p);
#endif
  forward_tiled<Singles, Score>(p);
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
