// The arithmetic limit of this machine: independent chains of multiply-adds in registers, no memory.
#include "../parallel.h"

namespace fastattn {
namespace FASTATTN_ISA {

constexpr int kPeakChains = kRegisters * 3 / 4;

template <class Step>
FASTATTN_INLINE vf peak_chains(int64_t iterations, const Step& step) {
  vf sums[kPeakChains];
  for (int c = 0; c < kPeakChains; c++) sums[c] = splat(1e-3f * (float)c);
  for (int64_t i = 0; i < iterations; i++) {
#pragma GCC unroll 24
    for (int c = 0; c < kPeakChains; c++) sums[c] = step(sums[c]);
  }
  vf total{};
  for (int c = 0; c < kPeakChains; c++) total += sums[c];
  return total;
}

void peak(const PeakParams& p) {
  int64_t* operations = (int64_t*)p.operations.data;  // of one iteration of one thread
  if (p.bf16) {
#if defined(FASTATTN_BF16_DOT)
    *operations = (int64_t)kPeakChains * W * 2 * 2;
    parallel_ranges(p.threads, p.threads, [&](int64_t, int64_t, int t) {
      const vu a = splat_u(0x3f803f80), b = splat_u(0x38d138d1);  // pairs of 1 and of 1e-4
      const vf total = peak_chains(p.iterations, [&](vf sum) { return dot_pairs(sum, a, b); });
      ((float*)p.sink.data)[t] = reduce_add(total);
    });
#else
    *operations = 0;
#endif
    return;
  }
  *operations = (int64_t)kPeakChains * W * 2;
  parallel_ranges(p.threads, p.threads, [&](int64_t, int64_t, int t) {
    const vf a = splat(0.999999f), b = splat(1e-6f);
    const vf total = peak_chains(p.iterations, [&](vf sum) { return sum * a + b; });
    ((float*)p.sink.data)[t] = reduce_add(total);
  });
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
