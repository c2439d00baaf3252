// Rounding to bf16 by integers: right for every value, for every instruction set.
#pragma once
#include "vector.h"

namespace fastattn {
namespace FASTATTN_ISA {

// The bf16 nearest to x (ties to even) in the upper half of each word; the lower half is arbitrary. Not for NaN.
FASTATTN_INLINE vu bf16_rounded(vf x) {
  const vu u = as_vu(x);
  return u + splat_u(0x7fff) + ((u >> 16) & splat_u(1));
}
// The same for every x, given `rounded`: NaN stays a (quiet) NaN.
FASTATTN_INLINE vu bf16_keeping_nan(vf x, vu rounded) {
  return select_u(x == x, rounded, as_vu(x) | splat_u(0x400000));
}

FASTATTN_INLINE vh bf16_by_integers(vf x) { return narrow(bf16_keeping_nan(x, bf16_rounded(x)) >> 16); }

// Both rounded, in the upper half of each word.
FASTATTN_INLINE void round_two(vf a, vf b, vu* x, vu* y) {
  *x = bf16_rounded(a);
  *y = bf16_rounded(b);
  if (__builtin_expect(maybe_nan(a, b), 0)) {
    *x = bf16_keeping_nan(a, *x);
    *y = bf16_keeping_nan(b, *y);
  }
}
FASTATTN_INLINE void store_two_by_integers(bf16* p, vf a, vf b) {
  vu x, y;
  round_two(a, b, &x, &y);
  store_narrow(p, x >> 16, y >> 16);
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
