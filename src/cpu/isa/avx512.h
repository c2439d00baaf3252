// AVX-512 F, BW, VL and DQ.
#pragma once
#include "avx512_vectors.h"
#include "bf16_integers.h"

#define FASTATTN_SCALE_BY_FLOOR

namespace fastattn {
namespace FASTATTN_ISA {

// x - floor(x), 0 for an infinity.
FASTATTN_INLINE vf above_floor(vf x) {
  return (vf)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}
// p * 2^floor(x); 0 where x < -126.
FASTATTN_INLINE vf scale_by_floor(vf p, vf x) {
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return (vf)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)x);
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
