// Conversions to bf16 for an instruction set with a bf16 unit. The unit's own conversions flush subnormals, so they are
// used for factors of dot_pairs only, which ignores subnormals too; other stored values keep them.
#pragma once
#include "bf16_rounding.h"

#define FASTATTN_BF16_DOT  // kernels multiply bf16 in pairs

namespace fastattn {
namespace FASTATTN_ISA {

FASTATTN_INLINE vh to_bf16(vf x) {
  if (__builtin_expect(!has_subnormal(x, x), 1)) return flushed_bf16(x);
  return bf16_by_integers(x);
}
FASTATTN_INLINE void store_two(bf16* p, vf a, vf b) {
  if (__builtin_expect(!has_subnormal(a, b), 1)) {
    const vh2 both = flushed_bf16(a, b);
    memcpy(p, &both, sizeof both);
    return;
  }
  store_two_by_integers(p, a, b);
}
// Factors of dot_pairs.
FASTATTN_INLINE void store_factors(bf16* p, vf a, vf b) {
  const vh2 both = flushed_bf16(a, b);
  memcpy(p, &both, sizeof both);
}
// Words of two factors, low's elements in the lower halves and high's in the upper ones.
template <int... L>
FASTATTN_INLINE vu interleaved(vh2 x, std::integer_sequence<int, L...>) {
  return (vu)__builtin_shufflevector(x, x, (L / 2 + L % 2 * W)...);
}
FASTATTN_INLINE vu bf16_words(vf low, vf high) {
  return interleaved(flushed_bf16(low, high), std::make_integer_sequence<int, 2 * W>{});
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
