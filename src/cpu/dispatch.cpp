#include "dispatch.h"

#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#if defined(FASTATTN_X86)
#include <cpuid.h>
#endif

#include "refuse.h"

#define FASTATTN_STRING2(x) #x
#define FASTATTN_STRING(x) FASTATTN_STRING2(x)

#define FASTATTN_ISA baseline
#include "table.inc"
#undef FASTATTN_ISA
#if defined(FASTATTN_HAS_AVX2)
#define FASTATTN_ISA avx2
#include "table.inc"
#undef FASTATTN_ISA
#endif
#if defined(FASTATTN_HAS_AVX512)
#define FASTATTN_ISA avx512
#include "table.inc"
#undef FASTATTN_ISA
#endif
#if defined(FASTATTN_HAS_AVX512BF16)
#define FASTATTN_ISA avx512bf16
#include "table.inc"
#undef FASTATTN_ISA
#endif

namespace fastattn {
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

#if !defined(FASTATTN_EMULATE_AVX512)
// Whether a bf16 dot does half the work of fused multiply-adds: one dot every other cycle, two multiply-adds each cycle
// (measured on family 6, model 207). float32 products of the same bf16 are then twice as fast and more accurate.
bool has_slow_bf16_dot() {
  unsigned largest, b, c, d;
  return __get_cpuid(0, &largest, &b, &c, &d) && b == signature_INTEL_ebx;
}
#endif
#endif

// Best last. Each requires the features with which its translation unit is compiled.
int candidates(Candidate* out) {
  int n = 0;
  out[n++] = {&baseline::table, true};
#if defined(FASTATTN_X86)
  __builtin_cpu_init();
  [[maybe_unused]] const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
#if defined(FASTATTN_EMULATE_AVX512)
  // compiled to AVX2 code; before avx2, because only tests ask for them
  [[maybe_unused]] const bool avx512 = avx2, avx512bf16 = avx2;
#else
  [[maybe_unused]] const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                                       __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                                       __builtin_cpu_supports("avx512dq");
#if defined(FASTATTN_ASSUME_AVX512BF16)
  [[maybe_unused]] const bool avx512bf16 = avx512;
#else
  [[maybe_unused]] const bool avx512bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
#endif
#if defined(FASTATTN_HAS_AVX2)
  out[n++] = {&avx2::table, avx2};
#endif
#endif
#if defined(FASTATTN_HAS_AVX512)
  out[n++] = {&avx512::table, avx512};
#endif
#if defined(FASTATTN_HAS_AVX512BF16)
  out[n++] = {&avx512bf16::table, avx512bf16};
#endif
#if defined(FASTATTN_HAS_AVX512) && defined(FASTATTN_HAS_AVX512BF16) && !defined(FASTATTN_EMULATE_AVX512)
  if (has_slow_bf16_dot()) std::swap(out[n - 1], out[n - 2]);
#endif
#if defined(FASTATTN_EMULATE_AVX512) && defined(FASTATTN_HAS_AVX2)
  out[n++] = {&avx2::table, avx2};
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
    if (all[i].able) names[found++] = all[i].table->isa;
  return found;
}

bool select(const char* name) {
  Candidate all[8];
  const int n = candidates(all);
  for (int i = 0; i < n; i++)
    if (all[i].able && std::strcmp(all[i].table->isa, name) == 0) {
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
