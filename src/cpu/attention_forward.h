// Attention forward, but for the sequences that are decoded. Tiled: keys and values are packed once a key head, then
// blocks of query rows run on their own.
#pragma once

#include "attention_forward_block.h"

namespace fastattn {
namespace FASTATTN_ISA {

// What the loops over blocks know of a score: they are compiled once for all of them.
template <class Unit>
struct BlockOf {
  int64_t (*bytes)(const Problem& problem, int64_t block_q, int64_t block_k);
  void (*run)(const Problem& problem, int64_t block_q, int64_t block_k, Arena memory, const Sequence& s, int64_t head,
              int64_t first, int64_t rows, const PackedHead<Unit>& packed);

  template <class Score>
  static BlockOf of() {
    using Block = ForwardBlock<Unit, Score>;
    return {[](const Problem& problem, int64_t block_q, int64_t block_k) {
              return bytes_of([&](Arena& arena) { Block(problem, block_q, block_k, arena); });
            },
            [](const Problem& problem, int64_t block_q, int64_t block_k, Arena memory, const Sequence& s, int64_t head,
               int64_t first, int64_t rows, const PackedHead<Unit>& packed) {
              Block(problem, block_q, block_k, memory).run(s, head, first, rows, packed);
            }};
  }
};

constexpr int64_t kPackRows = 4 * kPanel;  // keys packed by one task

// Keys and values [first, first + kPackRows) of one key head of a sequence.
template <class Unit>
FASTATTN_NOINLINE void pack_keys(const Problem& problem, const Sequence& s, int64_t head, int64_t first,
                                 const PackedHead<Unit>& to) {
  const AttentionParams& p = problem.p;
  const int64_t rows = min64(kPackRows, s.keys - first);
  if (rows <= 0) return;
  pack_transposed<Unit>(to.keys + first * steps_of<Unit>(problem.head_dim),
                        matrix(p.k, s.batch, head, s.k_begin + first), rows, problem.head_dim);
  pack_panels<Unit>(to.values, to.capacity, first / Unit::kStep, matrix(p.v, s.batch, head, s.k_begin + first), rows,
                    problem.value_dim);
}

template <class Unit>
static void forward_tiled(const AttentionParams& p, const BlockOf<Unit>& block) {
  const Problem problem(p);
  int64_t block_q = round_up(p.block_q, kRows);
  const int64_t block_k = round_up(p.block_k, kPanel);
  int64_t longest_q = 0, longest_k = 0;
  for (int64_t s = 0; s < problem.sequences; s++) {
    const Sequence r = problem.sequence(s);
    if (decodes(problem, r)) continue;
    longest_q = max64(longest_q, r.q_length);
    longest_k = max64(longest_k, r.keys);
  }
  if (longest_q == 0) return;
  const Tiles tiles(longest_q, problem.lists.on() ? p.list_q : block_q, block_q, 1);
  block_q = round_up(tiles.step, kRows);
  const int64_t head_bytes = bytes_of([&](Arena& arena) { PackedHead<Unit>(problem, longest_k, arena); });
  const int64_t block_bytes = block.bytes(problem, block_q, block_k);
  const int64_t blocks = tiles.count(longest_q);
  const int64_t pairs = problem.sequences * problem.kv_heads;
  const int64_t wave = max64(1, min64(pairs, p.pack_kib * 1024 / max64(head_bytes, 1)));

  const int64_t pack_tasks = (longest_k + kPackRows - 1) / kPackRows;
  const auto pack = [&](int64_t pair, int64_t first, Arena memory) {
    const Sequence s = problem.sequence(pair / problem.kv_heads);
    if (decodes(problem, s)) return;
    pack_keys(problem, s, pair % problem.kv_heads, first, PackedHead<Unit>(problem, longest_k, memory));
  };
  // block `index` of a pair's query heads; the last rows of a causal sequence have the most keys, so they start first
  const auto run = [&](int64_t pair, int64_t index, Arena packed, Arena memory) {
    const Sequence s = problem.sequence(pair / problem.kv_heads);
    const int64_t tile = blocks - 1 - index % blocks, first = tiles.first(tile), rows = tiles.size(tile, s.q_length);
    if (rows <= 0 || decodes(problem, s)) return;
    const int64_t head = pair % problem.kv_heads * problem.group + index / blocks;
    block.run(problem, block_q, block_k, memory, s, head, first, rows, PackedHead<Unit>(problem, longest_k, packed));
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
#if defined(FASTATTN_BF16_DOT)
  if (p.q.dtype == DType::bf16) return forward_tiled(p, BlockOf<Pairs>::of<Score>());
#endif
  forward_tiled(p, BlockOf<Singles>::of<Score>());
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
