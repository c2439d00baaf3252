// What math.cpp has of each instruction set.
#pragma once
#include <cstdint>

namespace checks {

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
  }                                                   \
  }
#if defined(FASTATTN_ISA)
FASTATTN_MATH(FASTATTN_ISA)
#endif
