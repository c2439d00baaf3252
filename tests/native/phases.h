// What phases.cpp has of each instruction set: the parts of attention's work on one tile, each timed by itself.
#pragma once
#include "../../src/cpu/params.h"

namespace checks {

// How long run(context) takes, in the caller's unit.
using TimeOf = double (*)(void* timer, void (*run)(void*), void* context);

struct Phase {
  const char* name;
  double time;      // for a vector of scores
  bool multiplies;  // it contracts a head dim, or rows or keys into one: a multiply-add of a vector for each step
};
constexpr int kMostPhases = 8;

}  // namespace checks

// attention_phases: the phases of a call without a mask, softmax or sigmoid, for its first head's first rows and keys;
// forward, or backward where the call has a grad_out. Returns their number.
#define FASTATTN_PHASES(isa)                                                                                  \
  namespace fastattn {                                                                                        \
  namespace isa {                                                                                             \
  int attention_phases(const fastattn::AttentionParams&, checks::TimeOf, void* timer, checks::Phase* result); \
  extern const int vector_floats;                                                                             \
  }                                                                                                           \
  }
#if defined(FASTATTN_ISA)
FASTATTN_PHASES(FASTATTN_ISA)
#endif
