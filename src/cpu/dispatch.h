// One table of kernels per instruction set; the running one is chosen from CPUID at first use.
#pragma once
#include "params.h"

namespace fastattn {

struct KernelTable {
  const char* isa;
#define KERNEL(name, Params) void (*name)(const Params&);
#include "kernels.def"
#undef KERNEL
};

namespace cpu {
// Instruction sets this machine can run, best last; writes at most `capacity` names and returns their number.
int runnable(const char** names, int capacity);
// The table in use; `select` changes it and returns false for a name that this machine cannot run.
const KernelTable& kernels();
bool select(const char* name);
}  // namespace cpu

}  // namespace fastattn
