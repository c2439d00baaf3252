// The kernels of avx512bf16 for machines without it, to test their logic. Subnormals are flushed as by its bf16 unit.
#pragma once
#include "emulated_vectors.h"

#include "bf16_rounding.h"

namespace fastattn {
namespace FASTATTN_ISA {

FASTATTN_INLINE vf flushed(vf x) { return select(vabs(x) < splat(0x1p-126f), (vf)((vi)x & int32_t(0x80000000)), x); }

// The bf16 unit: two conversions and a dot product. Whatever MXCSR says, they take a subnormal operand for a zero of
// its sign and make a subnormal result one.
FASTATTN_INLINE vh flushed_bf16(vf x) { return bf16_by_integers(flushed(x)); }
FASTATTN_INLINE vh2 flushed_bf16(vf a, vf b) {
  const vh halves[2] = {flushed_bf16(a), flushed_bf16(b)};
  vh2 both;
  memcpy(&both, halves, sizeof both);
  return both;
}
// acc + a1 * b1 + a0 * b0 a lane, a and b holding two bf16: the odd element first, each product added to the sum in one
// rounding to nearest even, subnormals flushed from operands and from both sums. tile.h says what that loses.
FASTATTN_INLINE vf dot_pairs(vf acc, vu a, vu b) {
  const vf a1 = flushed((vf)(a & 0xffff0000u)), b1 = flushed((vf)(b & 0xffff0000u));
  const vf a0 = flushed((vf)(a << 16)), b0 = flushed((vf)(b << 16));
  return flushed(flushed(flushed(acc) + a1 * b1) + a0 * b0);
}
FASTATTN_INLINE bool has_subnormal(vf a, vf b) {
  const vi found = ((vi)flushed(a) ^ (vi)a) | ((vi)flushed(b) ^ (vi)b);
  int any = 0;
  for (int i = 0; i < W; i++) any |= found[i];
  return any != 0;
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn

#include "bf16_unit.h"
