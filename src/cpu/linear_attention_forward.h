// Linear attention forward: chunk after chunk of a document, the states of a task's value heads in panels.
#pragma once

#include "linear_attention.h"

namespace fastattn {
namespace FASTATTN_ISA {

struct LinearForward {
  const LinearProblem& problem;
  const LinearAttentionParams& p;
  int64_t padded;      // columns of a task's panels
  int64_t state_size;  // floats of a state's panels
  LinearKeys keys;
  LinearHead head;
  float* states;        // (value heads, state_size)
  float *values, *out;  // (kChunkRows, padded) as panels
  RowsAhead ahead;

  LinearForward(const LinearProblem& problem, Arena& arena)
      : problem(problem),
        p(problem.p),
        padded(problem.padded_columns()),
        state_size(problem.state_rows * padded),
        keys(problem, arena),
        head(problem, false, arena),
        states(arena.take<float>(problem.heads_of_part() * state_size)),
        values(arena.take<float>(kChunkRows * padded)),
        out(arena.take<float>(kChunkRows * padded)) {}

  void run(const LinearTask& t) {
    const LinearSequence& s = t.sequence;
    for (int64_t h = 0; h < t.heads; h++)
      problem.load_state(states + h * state_size, t, plane_of(p.initial, s.state, t.head + h, 0));
    if (p.causal)
      for (int64_t first = 0; first < s.length; first += kChunk) chunk(t, first);
    else
      all_tokens(t);
    for (int64_t h = 0; h < t.heads; h++)
      problem.store_state(plane_of(p.state, s.state, t.head + h, 0), states + h * state_size, t);
  }

  void chunk(const LinearTask& t, int64_t first) {
    const int64_t rows = min64(kChunk, t.sequence.length - first);
    keys.load(t, first, rows);
    if (!p.channels.data) keys.multiply();
    for (int64_t h = 0; h < t.heads; h++) {
      float* state = states + h * state_size;
      if (p.states.data) problem.store_state(problem.kept_state(t.sequence, t.head + h, first / kChunk), state, t);
      head.load(t, t.head + h, first, keys);
      load_values(t, t.head + h, first, rows);
      problem.look_ahead(ahead, t, t.head + h, first + kChunk, nullptr);
      for_panels(round_up(t.columns, W), [&](int64_t d, auto vecs) {
        constexpr int V = decltype(vecs)::value;
        float *w = values + d * kChunkRows, *panel = state + d * problem.state_rows;
        if (p.delta_rule)
          write_values<V, true>(w, nullptr, head, panel, keys.groups, ahead);
        else
          write_values<V, false>(w, nullptr, head, panel, keys.groups, ahead);
        read_values<V>(out + d * kChunkRows, head, panel, w, keys.groups, ahead);
        update_state<V>(panel, problem.state_rows, head.kept, head.k_end, problem.key_stride, w, rows);
      });
      store_out(t, t.head + h, first, rows);
    }
  }

  // Every token reads the state after the last one.
  void all_tokens(const LinearTask& t) {
    for (int64_t first = 0; first < t.sequence.length; first += kChunk) {
      const int64_t rows = min64(kChunk, t.sequence.length - first);
      keys.load(t, first, rows);
      for (int64_t h = 0; h < t.heads; h++) {
        load_values(t, t.head + h, first, rows);
        for_panels(round_up(t.columns, W), [&](int64_t d, auto vecs) {
          update_state<decltype(vecs)::value>(states + h * state_size + d * problem.state_rows, problem.state_rows,
                                              nullptr, keys.k, problem.key_stride, values + d * kChunkRows, rows);
        });
      }
    }
    for (int64_t h = 0; h < t.heads && p.states.data; h++)
      problem.store_state(problem.kept_state(t.sequence, t.head + h, 0), states + h * state_size, t);
    for (int64_t first = 0; first < t.sequence.length; first += kChunk) {
      const int64_t rows = min64(kChunk, t.sequence.length - first);
      keys.load(t, first, rows);
      for (int64_t h = 0; h < t.heads; h++) {
        for_panels(round_up(t.columns, W), [&](int64_t d, auto vecs) {
          read_state<decltype(vecs)::value>(out + d * kChunkRows, keys.q, problem.key_stride,
                                            states + h * state_size + d * problem.state_rows, problem.key_dim,
                                            keys.groups, (float)p.scale);
        });
        store_out(t, t.head + h, first, rows);
      }
    }
  }

  void load_values(const LinearTask& t, int64_t value_head, int64_t first, int64_t rows) {
    problem.load_values(values, p.v, t, value_head, first, rows, p.normalize);
  }
  void store_out(const LinearTask& t, int64_t value_head, int64_t first, int64_t rows) {
    if (p.normalize) divide_rows(out, rows, t.columns);
    problem.store_values(p.out, out, t, value_head, first, rows);
  }
};

static void linear_forward(const LinearAttentionParams& p) {
  const LinearProblem problem(p);
  Blocks memory;  // of each thread
  const int threads = problem.threads();
  const int64_t bytes = bytes_of([&](Arena& arena) { LinearForward(problem, arena); });
  with_scratch(1, [&](Arena& arena) { memory = arena.blocks(threads, bytes); });
  parallel_items(problem.tasks(), threads, [&](int64_t n, int thread) {
    Arena arena = memory[thread];
    LinearForward(problem, arena).run(problem.task(n));
  });
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
