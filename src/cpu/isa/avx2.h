// AVX2, FMA and F16C.
#pragma once
#include <immintrin.h>

namespace fastattn {
namespace FASTATTN_ISA {
constexpr int W = 8;
constexpr int kRegisters = 16;
}  // namespace FASTATTN_ISA
}  // namespace fastattn

#include "vector.h"

namespace fastattn {
namespace FASTATTN_ISA {

// The larger and the smaller of two; b where either is NaN.
FASTATTN_INLINE vf vmax(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
FASTATTN_INLINE vf vmin(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }

// 1 / x within 3e-7 for 2^-125 <= x <= 2^125, at most 2^-125 above.
FASTATTN_INLINE vf reciprocal(vf x) {
  const vf r = (vf)_mm256_rcp_ps((__m256)x);
  return r + r * (1.0f - x * r);
}

// Sums and maxima in one fixed order (halves), so that results do not depend on the call.
struct Sum {
  FASTATTN_INLINE __m256 of(__m256 a, __m256 b) { return _mm256_add_ps(a, b); }
  FASTATTN_INLINE __m128 of(__m128 a, __m128 b) { return _mm_add_ps(a, b); }
};
struct Larger {
  FASTATTN_INLINE __m256 of(__m256 a, __m256 b) { return _mm256_max_ps(a, b); }
  FASTATTN_INLINE __m128 of(__m128 a, __m128 b) { return _mm_max_ps(a, b); }
};
template <class Op>
FASTATTN_INLINE float reduce(vf x) {
  const __m256 half = (__m256)x;
  __m128 t = Op::of(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  t = Op::of(t, _mm_movehl_ps(t, t));
  return _mm_cvtss_f32(Op::of(t, _mm_movehdup_ps(t)));
}

FASTATTN_INLINE vu widen(vh x) { return (vu)_mm256_cvtepu16_epi32((__m128i)x); }
// Every element is below 2^16.
FASTATTN_INLINE vh narrow(vu x) {
  return (vh)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
}
// The same of two vectors, one after the other.
FASTATTN_INLINE void store_narrow(void* p, vu x, vu y) {
  const __m256i lanes = _mm256_packus_epi32((__m256i)x, (__m256i)y);
  const __m256i both = _mm256_permute4x64_epi64(lanes, 0xd8);
  memcpy(p, &both, sizeof both);
}
// low's upper halves in the lower halves of the words, high's in the upper ones.
FASTATTN_INLINE vu join_halves(vu low, vu high) {
  return (vu)_mm256_blend_epi16((__m256i)(low >> 16), (__m256i)high, 0xaa);
}

// Products of 64 bits, their upper and lower halves.
FASTATTN_INLINE void multiply_wide(vu a, uint32_t b, vu* high, vu* low) {
  const __m256i factor = _mm256_set1_epi32((int)b);
  const __m256i even = _mm256_mul_epu32((__m256i)a, factor);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)a, 32), factor);
  *high = (vu)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
  *low = (vu)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
}

FASTATTN_INLINE vf from_f16(vh x) { return (vf)_mm256_cvtph_ps((__m128i)x); }
FASTATTN_INLINE vh to_f16(vf x) {
  return (vh)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// Whether a or b holds a NaN. Also true where there is no cheap way to find out.
FASTATTN_INLINE bool maybe_nan(vf a, vf b) {
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_UNORD_Q)) != 0;
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn

#include "bf16_integers.h"
