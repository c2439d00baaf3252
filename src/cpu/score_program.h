// A score program: what becomes of an attention score, as a list of instructions over registers of 32-bit lanes. The
// words (int32) are
//
//   version, instructions, scalars, vectors, score, slope, loads, constants   the last four registers and counts
//   constants times: bits        of scalar registers kProgramFirstConstant and on
//   loads times: index, derivative                        registers of a load from `tables` whose gradient is wanted
//   instructions times: op, dst, a, b, c                                                  unused operands are -1
//
// Registers below `scalars` have one value a row: 0 the batch element, 1 the head, 2 the row, then constants. The
// others have one a key: the first holds the scaled product on entry, the second the key. `slope` is the register of
// d score / d product, -1: none is given. An index of kProgramRowIndex + a scalar register is that scalar + the key.
#pragma once
#include <cstdint>

#include "limits.h"
#include "params.h"

namespace fastattn {

enum class ScoreOp : int32_t {
#define SCORE_OP(name, ...) name,
#define SCORE_LOAD(name, table) name,
#define SCORE_LOAD_ROW(name, table) name,
#include "score_program_ops.def"
#undef SCORE_OP
#undef SCORE_LOAD
#undef SCORE_LOAD_ROW
  count
};

constexpr int32_t kProgramVersion = 1, kProgramHeader = 8, kProgramFirstConstant = 3, kProgramStep = 5;
constexpr int32_t kProgramRowIndex = 1 << 16;

struct ScoreOpFacts {
  const char* name;
  int operands;
  bool loads, loads_row, of_tables;  // of_tables: from `tables`, not `indices`
};
constexpr ScoreOpFacts kScoreOps[] = {
#define SCORE_OP(name, operands, ...) {#name, operands, false, false, false},
#define SCORE_LOAD(name, table) {#name, 1, true, false, #table[0] == 't'},
#define SCORE_LOAD_ROW(name, table) {#name, 1, true, true, #table[0] == 't'},
#include "score_program_ops.def"
#undef SCORE_OP
#undef SCORE_LOAD
#undef SCORE_LOAD_ROW
};

struct ScoreStep {
  int32_t op, dst, operands[3];
};
struct ScoreLoad {
  int32_t index, derivative;
};

// The parts of a program's words. Always inline: kernels of every instruction set have it.
struct ScoreProgram {
  int32_t version = 0, instructions = 0, scalars = 0, vectors = 0, score = 0, slope = -1, loads = 0, constants = 0;
  const int32_t* constant_bits = nullptr;
  const ScoreLoad* load = nullptr;
  const ScoreStep* step = nullptr;

  ScoreProgram() = default;
  // Of at least kProgramHeader words, whose header says how many there are.
  explicit __attribute__((always_inline)) ScoreProgram(const int32_t* w)
      : version(w[0]),
        instructions(w[1]),
        scalars(w[2]),
        vectors(w[3]),
        score(w[4]),
        slope(w[5]),
        loads(w[6]),
        constants(w[7]) {
    constant_bits = w + kProgramHeader;
    load = (const ScoreLoad*)(constant_bits + constants);
    step = (const ScoreStep*)(load + loads);
  }
  int64_t __attribute__((always_inline)) words() const {
    return kProgramHeader + int64_t(constants) + 2 * int64_t(loads) + kProgramStep * int64_t(instructions);
  }
  int32_t __attribute__((always_inline)) registers() const { return scalars + vectors; }
  bool __attribute__((always_inline)) scalar(int32_t r) const { return r < scalars; }
};

// Why the machine cannot run these words, null where it can. No program that passes can touch memory that is not its
// own: its registers exist, and indices of loads are clamped.
static inline const char* program_fault(const int32_t* words, int64_t count, int64_t tables, int64_t indices) {
  if (count < kProgramHeader) return "must have a header";
  const ScoreProgram p(words);
  const auto within = [](int64_t x, int64_t low, int64_t high) { return x >= low && x <= high; };
  if (p.version != kProgramVersion) return "must be of this version";
  if (!within(p.instructions, 0, limits::program_instructions)) return "has too many instructions";
  if (!within(p.constants, 0, limits::program_scalars - kProgramFirstConstant)) return "has too many constants";
  if (!within(p.scalars, kProgramFirstConstant + p.constants, limits::program_scalars))
    return "has too few or too many scalar registers";
  if (!within(p.vectors, 2, limits::program_vectors)) return "has too few or too many vector registers";
  if (!within(p.loads, 0, limits::program_loads)) return "has too many loads with a gradient";
  if (p.words() != count) return "must be as long as its header says";
  bool written[limits::program_scalars + limits::program_vectors] = {};
  for (int32_t r = 0; r < kProgramFirstConstant + p.constants; r++) written[r] = true;
  written[p.scalars] = written[p.scalars + 1] = true;
  const auto readable = [&](int32_t r) { return within(r, 0, p.registers() - 1) && written[r]; };
  for (int32_t i = 0; i < p.instructions; i++) {
    const ScoreStep& t = p.step[i];
    if (!within(t.op, 0, int32_t(ScoreOp::count) - 1)) return "has an operation that does not exist";
    const ScoreOpFacts& op = kScoreOps[t.op];
    if (!within(t.dst, 0, p.registers() - 1)) return "writes a register that does not exist";
    for (int32_t k = 0; k < 3; k++) {
      if (k >= op.operands) {
        if (t.operands[k] != -1) return "has an operand that its operation does not take";
        continue;
      }
      if (!readable(t.operands[k])) return "reads a register that is not written";
      if ((p.scalar(t.dst) || op.loads_row) && !p.scalar(t.operands[k])) return "makes a scalar of a vector";
    }
    if (op.loads_row && p.scalar(t.dst)) return "makes a scalar of a vector";
    if (op.loads && (op.of_tables ? tables : indices) < 1) return "loads from an empty table";
    written[t.dst] = true;
  }
  if (!readable(p.score)) return "has no score";
  if (p.slope != -1 && !readable(p.slope)) return "has no slope";
  for (int32_t i = 0; i < p.loads; i++) {
    const bool row = within(p.load[i].index, kProgramRowIndex, kProgramRowIndex + p.scalars - 1);
    if (!readable(row ? p.load[i].index - kProgramRowIndex : p.load[i].index)) return "has no index of a gradient";
    if (!readable(p.load[i].derivative)) return "has no derivative of a load";
  }
  return nullptr;
}

}  // namespace fastattn
