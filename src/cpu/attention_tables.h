// The gradient of a score program's tables: dS times a load's derivative, added at the loaded element. Every copy of
// the table has its own tasks, which add to it one after the other.
#pragma once

#include "attention_bias.h"

namespace fastattn {
namespace FASTATTN_ISA {

// Derivatives and indices of a strip of groups, written by the program.
struct TableGradients {
  const Problem& problem;
  int64_t row, apart;  // floats between rows of a tile, and between buffers
  bool on;
  float* memory;     // for each load (kStrip * kRows, row) derivatives, then indices
  int64_t copy = 0;  // the copy of the table that takes the sums

  TableGradients(const Problem& problem, int64_t row, Arena& arena)
      : problem(problem), row(row), apart(kStrip * kRows * row), on(problem.p.grad_tables.data) {
    const int32_t loads = on ? max64(problem.program.program.loads, problem.masked_program.program.loads) : 0;
    memory = arena.take<float>(2 * loads * apart);
  }
  // The address of the rows of group g.
  float* kept(int64_t g) const { return memory + BiasBlock::strip_row(g) * row; }

  // Adds dS of group g, which has `count` rows; `key` is the key of its first column.
  void add(const ScoreProgram& program, const float* ds, int64_t g, const Columns& columns, int64_t count,
           int64_t there, int64_t key) const {
    const int64_t size = problem.p.tables.size[3];
    float* to = (float*)problem.p.grad_tables.data + copy * size;
    const auto clamped = [&](int64_t index) { return index < 0 ? 0 : index < size ? index : size - 1; };
    const int64_t begin = columns.begin, end = min64(columns.end, there);
    for (int32_t l = 0; l < program.loads; l++) {
      const float* derivatives = kept(g) + 2 * l * apart;
      const int32_t* indices = (const int32_t*)(derivatives + apart);
      for (int64_t i = 0; i < count; i++, derivatives += row, indices += row) {
        const float* x = ds + BiasBlock::strip_row(g, i) * row;
        // pairs that are not attended have a dS of 0, but their derivative may be anything
        const auto term = [&](int64_t j) { return x[j] != 0 ? x[j] * derivatives[j] : 0.0f; };
        const auto terms = [&](int64_t j) {
          const vf d = load(x + j);
          return keep(d != 0.0f, d * load(derivatives + j));
        };
        int64_t j = begin;
        if (program.load[l].index < program.scalars) {
          vf sum{};
          for (; j + W <= end; j += W) sum += terms(j);
          float total = reduce_add(sum);
          for (; j < end; j++) total += term(j);
          to[clamped(indices[begin])] += total;
        } else if (program.load[l].index >= kProgramRowIndex) {
          const int64_t first = indices[begin] + key;  // of column 0
          for (; j < end && first + j < 0; j++) to[0] += term(j);
          const int64_t inside = min64(end, size - first);
          for (; j + W <= inside; j += W) store(to + first + j, load(to + first + j) + terms(j));
          for (; j < end; j++) to[clamped(first + j)] += term(j);
        } else {
          for (; j < end; j++)
            if (x[j] != 0) to[clamped(indices[j])] += x[j] * derivatives[j];
        }
      }
    }
  }
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
