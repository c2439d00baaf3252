// AVX-512 F, BW, VL and DQ, and AVX512_BF16.
#pragma once
#include "avx512_vectors.h"

namespace fastattn {
namespace FASTATTN_ISA {

// The bf16 unit: two conversions and a dot product. Whatever MXCSR says, they take a subnormal operand for a zero of
// its sign and make a subnormal result one.
FASTATTN_INLINE vh flushed_bf16(vf x) { return (vh)_mm512_cvtneps_pbh((__m512)x); }
FASTATTN_INLINE vh2 flushed_bf16(vf a, vf b) { return (vh2)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a); }
// acc + a1 * b1 + a0 * b0 a lane, a and b holding two bf16: the odd element first, each product added to the sum in one
// rounding to nearest even, subnormals flushed from operands and from both sums. tile.h says what that loses.
FASTATTN_INLINE vf dot_pairs(vf acc, vu a, vu b) { return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b); }
FASTATTN_INLINE bool has_subnormal(vf a, vf b) {
  constexpr int kSubnormal = 0x20;
  return !_kortestz_mask16_u8(_mm512_fpclass_ps_mask((__m512)a, kSubnormal),
                              _mm512_fpclass_ps_mask((__m512)b, kSubnormal));
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn

#include "bf16_unit.h"
