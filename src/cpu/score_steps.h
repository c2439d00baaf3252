// The steps of a score program as the machine runs them: two or three instructions that are often neighbours become one
// step, which keeps their intermediate values in registers.
#pragma once

#include <initializer_list>

#include "score_program.h"
#include "tile.h"

namespace fastattn {
namespace FASTATTN_ISA {

// Operations of joined steps, which no program contains.
enum JoinedOp {
  kDifference = int(ScoreOp::count),  // (float)(a - b)
  kMultiplyAdd,                       // a * b + c, rounded once where the instruction set can
  kSubtractProduct,                   // c - a * b
  kAddMultiple,                       // (float)(a - b) * c + d
  kTanhOf,                            // tanh(a * b), b a scalar
  kTanhTimes,                         // tanh(a * b) * c, b and c scalars
};

struct JoinedStep {
  int op, operands, dst, from[4];
  bool rows;   // whether rows differ in it
  bool whole;  // false: it is part of a later step
};

struct JoinedSteps {
  const ScoreProgram& program;
  const int* wanted;  // registers that are read at the end
  int wanted_count, count;
  JoinedStep step[limits::program_instructions];

  JoinedSteps(const ScoreProgram& program, const int* wanted, int wanted_count)
      : program(program), wanted(wanted), wanted_count(wanted_count), count(program.instructions) {
    bool rows[limits::program_scalars + limits::program_vectors] = {};
    rows[2] = rows[program.scalars] = true;
    for (int n = 0; n < count; n++) {
      const ScoreStep& from = program.step[n];
      JoinedStep& to = step[n];
      to = {from.op, kScoreOps[from.op].operands, from.dst, {0, 0, 0, 0}, false, true};
      for (int k = 0; k < to.operands; k++) to.from[k] = from.operands[k], to.rows |= rows[to.from[k]];
      rows[to.dst] = to.rows;
      join(n);
    }
  }

 private:
  static bool is(const JoinedStep& s, ScoreOp op) { return s.op == int(op); }
  bool scalar(int reg) const { return program.scalar(reg); }

  // The step that computes operand k of step n, if no other step reads its result and it can be computed in step n.
  const JoinedStep* only_for(int n, int k) const {
    const int reg = step[n].from[k];
    int m = n - 1;
    while (m >= 0 && step[m].dst != reg) m--;
    if (m < 0 || !step[m].whole || !step[m].rows || scalar(reg)) return nullptr;
    int reads = 0;
    bool kept = true;  // whether the register is kept to the end
    for (int i = m + 1; i < count && kept; i++) {
      // steps after n are not joined yet
      const int* from = i > n ? program.step[i].operands : step[i].from;
      const int operands = i > n ? kScoreOps[program.step[i].op].operands : step[i].whole ? step[i].operands : 0;
      for (int o = 0; o < operands; o++) reads += from[o] == reg;
      kept = (i > n ? program.step[i].dst : step[i].dst) != reg;
    }
    for (int w = 0; w < wanted_count && kept; w++) reads += wanted[w] == reg;
    if (reads != 1) return nullptr;
    return unwritten(m, n) ? &step[m] : nullptr;
  }
  // Whether no step between m and n writes an operand of m.
  bool unwritten(int m, int n) const {
    for (int i = m + 1; i < n; i++)
      for (int o = 0; o < step[m].operands; o++)
        if (step[i].dst == step[m].from[o]) return false;
    return true;
  }
  void become(int n, const JoinedStep* part, JoinedOp op, std::initializer_list<int> from) {
    step[part - step].whole = false;
    step[n].op = op;
    step[n].operands = 0;
    for (const int reg : from) step[n].from[step[n].operands++] = reg;
  }

  void join(int n) {
    const JoinedStep& s = step[n];
    if (scalar(s.dst) || !s.rows) return;
    if (is(s, ScoreOp::i2f)) {
      const JoinedStep* p = only_for(n, 0);
      if (p && is(*p, ScoreOp::sub_i)) become(n, p, kDifference, {p->from[0], p->from[1]});
    } else if (is(s, ScoreOp::tanh_f)) {
      const JoinedStep* p = only_for(n, 0);
      if (!p || !is(*p, ScoreOp::mul_f)) return;
      for (int k = 0; k < 2; k++)
        if (scalar(p->from[k]) && !scalar(p->from[1 - k])) return become(n, p, kTanhOf, {p->from[1 - k], p->from[k]});
    } else if (is(s, ScoreOp::mul_f)) {
      for (int k = 0; k < 2; k++) {
        const JoinedStep* p = only_for(n, k);
        if (p && p->op == kTanhOf && scalar(s.from[1 - k]))
          return become(n, p, kTanhTimes, {p->from[0], p->from[1], s.from[1 - k]});
      }
    } else if (is(s, ScoreOp::add_f)) {
      if (!join_product(n, true)) join_product(n, false);
    } else if (is(s, ScoreOp::sub_f)) {
      const JoinedStep* p = only_for(n, 1);
      if (p && is(*p, ScoreOp::mul_f)) become(n, p, kSubtractProduct, {p->from[0], p->from[1], s.from[0]});
    }
  }

  // A sum with a product: of a difference and a scalar, or of any two values.
  bool join_product(int n, bool of_difference) {
    for (int k = 0; k < 2; k++) {
      const JoinedStep* p = only_for(n, k);
      if (!p || !is(*p, ScoreOp::mul_f)) continue;
      const int other = step[n].from[1 - k], m = int(p - step);
      if (!of_difference) {
        become(n, p, kMultiplyAdd, {p->from[0], p->from[1], other});
        return true;
      }
      for (int f = 0; f < 2; f++) {
        const JoinedStep* d = only_for(m, f);
        const int factor = p->from[1 - f];
        if (!d || d->op != kDifference || !scalar(factor) || scalar(other) || factor == d->dst) continue;
        if (scalar(d->from[0]) == scalar(d->from[1]) || !unwritten(int(d - step), n)) continue;
        step[m].whole = false;
        become(n, d, kAddMultiple, {d->from[0], d->from[1], factor, other});
        return true;
      }
    }
    return false;
  }
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
