// What math.cpp has of each instruction set.
#pragma once
#include <cstdint>

#include "../../src/cpu/params.h"

namespace checks {

// A score program, p.program, over `rows` rows of products x, `columns` of whole kMathLanes, from head 1, row 5 and key
// 3 on. slopes, loads: as in ScoreRows, null: of a forward.
struct ProgramRun {
  const fastattn::AttentionParams& p;
  int64_t rows, columns;
  float *x, *slopes, *loads;
};

struct MathFunction {
  const char* name;
  void (*run)(const float* from, float* to, int64_t n);  // n: a multiple of kMathLanes
};
constexpr int64_t kMathLanes = 16;

}  // namespace checks

// Ended by one without a name.
#define FASTATTN_MATH(isa)                            \
  namespace fastattn {                                \
  namespace isa {                                     \
  extern const checks::MathFunction math_functions[]; \
  void run_program(const checks::ProgramRun& run);    \
  }                                                   \
  }
#if defined(FASTATTN_ISA)
FASTATTN_MATH(FASTATTN_ISA)
#endif
