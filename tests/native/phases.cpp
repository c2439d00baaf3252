// The phases of attention's tiles, compiled once for each instruction set with the flags of its kernels.
#include "phases.h"

#include "../../src/cpu/attention_backward.h"
#include "../../src/cpu/attention_forward.h"

namespace fastattn {
namespace FASTATTN_ISA {

const int vector_floats = W;

namespace {

constexpr int kSlot = 6;  // of scratch memory: this one and the next are the phases' own

struct Timer {
  checks::TimeOf time_of;
  void* timer;
  template <class F>
  double operator()(const F& f) const {
    return time_of(timer, [](void* context) { (*(const F*)context)(); }, (void*)&f);
  }
};

template <class Unit, class Score>
int forward_phases(const AttentionParams& p, const Timer& time, checks::Phase* result) {
  const Problem problem(p);
  const Sequence s = problem.sequence(0);
  const int64_t block_q = round_up(p.block_q, kRows), block_k = round_up(p.block_k, kPanel), groups = block_q / kRows;
  const double tile = double(block_q * block_k / W), all = double(s.q_length * s.keys / W);
  int n = 0;
  with_scratch(kSlot, [&](Arena& arena) {
    const PackedHead<Unit> head(problem, s.keys, arena);
    ForwardBlock<Unit, Score> block(problem, block_q, block_k, arena);
    if (!head.keys) return;  // measured
    const double packing = time([&] {
      pack_transposed<Unit>(head.keys, matrix(p.k, 0, 0, 0), s.keys, problem.head_dim);
      pack_panels<Unit>(head.values, head.capacity, 0, matrix(p.v, 0, 0, 0), s.keys, problem.value_dim);
    });
    result[n++] = {"packing", packing / all, false};
    block.run(s, 0, 0, block_q, head);
    for (int64_t g = 0; g < groups; g++) block.added[g] = 0;
    const ScoreRow constants = Score::constants(s.bias);
    const double weights = time([&] { block.weigh_directly(s, 0, 0, block_q, 0, constants, head); });
    result[n++] = {"Q K^T to weights", weights / tile, true};
    const double values = time([&] { block.add_values(0, groups, head.values, head.capacity, s.keys); });
    result[n++] = {"weights V", values / tile, true};
  });
  return n;
}

template <class Unit, class Score>
int backward_phases(const AttentionParams& p, const Timer& time, checks::Phase* result) {
  using Block = BackwardBlock<Unit, Score>;
  const Problem problem(p);
  const Sequence s = problem.sequence(0);
  const int64_t block_q = round_up(p.block_q, kRows), block_k = round_up(p.block_k, kPanel), groups = block_q / kRows;
  const double tile_vectors = double(block_q * block_k / W);
  const PackedQueries<Unit> packed(problem, block_q, 1, false, 0);
  const Tiles tiles(block_q, block_q, block_q, 1);
  int n = 0;
  with_scratch(kSlot, [&](Arena& query_arena) {
    const auto queries = packed.view(query_arena);
    with_scratch(kSlot + 1, [&](Arena& arena) {
      Block block(problem, packed, tiles, BiasUnits(problem), block_q, block_k, arena);
      if (!block.keys || !queries.rows) return;  // measured
      const double rows = time([&] { pack_queries<Unit, Score>(problem, packed, queries, s, 0, 0, 0, block_q); });
      const double keys = time([&] { block.pack_keys(matrix(p.k, 0, 0, 0), matrix(p.v, 0, 0, 0), block_k); });
      // rows once for all keys, keys once for all rows
      result[n++] = {"packing", rows * W / double(block_q * s.keys) + keys * W / double(block_k * s.q_length), false};
      result[n++] = {"ranges of keys", time([&] { block.ranges.fill(s, 0, block_q); }) / tile_vectors, false};
      const typename Block::Tile tile{s, 0, 0, 0, block_q, 0, block_k, queries, problem.program, false, false};
      const auto strips = [&](const auto& f) {
        for (int64_t g = 0; g < groups; g += kStrip) f(g, min64(groups, g + kStrip));
      };
      const auto weigh = [&] { strips([&](int64_t begin, int64_t end) { block.make_weights(tile, begin, end); }); };
      const auto slopes = [&] {
        strips([&](int64_t begin, int64_t end) { block.template make_slopes<false, false>(tile, begin, end); });
      };
      result[n++] = {"Q K^T to weights", time(weigh) / tile_vectors, true};
      result[n++] = {"dO V^T to dS", time(slopes) / tile_vectors, true};
      weigh();
      slopes();
      const auto contract = [&](const auto* tile_t, const auto* panels, float* to, int64_t columns) {
        return time([&] { block.contract_rows(tile_t, panels, 0, block_q, groups, 0, block_k, to, columns); }) /
               tile_vectors;
      };
      result[n++] = {"weights^T dO",
                     contract(block.weights_t, queries.grad_panels, block.grad_values, packed.o_columns), true};
      result[n++] = {"dS^T Q", contract(block.grads_t, queries.panels, block.grad_keys, packed.q_columns), true};
      const double dq = time([&] { block.contract_keys(queries.shares, groups, 0, block_k); });
      result[n++] = {"dS K", dq / tile_vectors, true};
    });
  });
  return n;
}

template <class Unit, class Score>
int phases_of(const AttentionParams& p, const Timer& time, checks::Phase* result) {
  return p.grad_out.data ? backward_phases<Unit, Score>(p, time, result) : forward_phases<Unit, Score>(p, time, result);
}
template <class Unit>
int phases_of(const AttentionParams& p, const Timer& time, checks::Phase* result) {
  if (p.score == SoftmaxScore<Arithmetic>::kCode) return phases_of<Unit, SoftmaxScore<Arithmetic>>(p, time, result);
  return phases_of<Unit, SigmoidScore<Arithmetic>>(p, time, result);
}

}  // namespace

int attention_phases(const AttentionParams& p, checks::TimeOf time_of, void* timer, checks::Phase* result) {
  const Timer time{time_of, timer};
#if defined(FASTATTN_BF16_DOT)
  if (p.q.dtype == DType::bf16) return phases_of<Pairs>(p, time, result);
#endif
  return phases_of<Singles>(p, time, result);
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
