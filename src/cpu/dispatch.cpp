#include "dispatch.h"

#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>
#if defined(FASTATTN_X86)
#include <cpuid.h>
#endif

#include "../common/refuse.h"

namespace fastattn {

namespace baseline {
extern const KernelTable table;
}
#if defined(FASTATTN_X86)
namespace avx2 {
extern const KernelTable table;
}
namespace avx512 {
extern const KernelTable table;
}
namespace avx512bf16 {
extern const KernelTable table;
}
#endif

namespace cpu {
namespace {

struct Candidate {
  const KernelTable* table;
  bool able;
};

#if defined(FASTATTN_X86)
bool has_f16c() {  // a name that Clang 14's __builtin_cpu_supports does not know
  unsigned a, b, c = 0, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

// Best last. What each asks for is what its translation unit is compiled with.
int candidates(Candidate* out) {
  int n = 0;
  out[n++] = {&baseline::table, true};
#if defined(FASTATTN_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
#if defined(FASTATTN_EMULATE_AVX512)
  // compiled to AVX2 code; first, because only tests ask for them
  out[n++] = {&avx512::table, avx2};
  out[n++] = {&avx512bf16::table, avx2};
  out[n++] = {&avx2::table, avx2};
#else
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  out[n++] = {&avx2::table, avx2};
  out[n++] = {&avx512::table, avx512};
  out[n++] = {&avx512bf16::table, avx512 && __builtin_cpu_supports("avx512bf16")};
#endif
#endif
  return n;
}

std::atomic<const KernelTable*> current{nullptr};

}  // namespace

int runnable(const char** names, int capacity) {
  Candidate all[8];
  const int n = candidates(all);
  int found = 0;
  for (int i = 0; i < n && found < capacity; i++)
    if (all[i].able) names[found++] = all[i].table->name;
  return found;
}

bool select(const char* name) {
  Candidate all[8];
  const int n = candidates(all);
  for (int i = 0; i < n; i++)
    if (all[i].able && std::strcmp(all[i].table->name, name) == 0) {
      current.store(all[i].table);
      return true;
    }
  return false;
}

const KernelTable& kernels() {
  const KernelTable* table = current.load();
  if (!table) {
    Candidate all[8];
    const int n = candidates(all);
    for (int i = 0; i < n; i++)
      if (all[i].able) table = all[i].table;
    current.store(table);
  }
  return *table;
}

void unknown_code(const char* field, int64_t code) {
  throw std::invalid_argument("fastattn: no kernel has a " + std::string(field) + " of " + std::to_string(code));
}

}  // namespace cpu
}  // namespace fastattn
