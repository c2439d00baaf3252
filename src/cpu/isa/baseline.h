// What every processor of the family has: SSE2 on x86, NEON on arm64.
#pragma once
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace fastattn {
namespace FASTATTN_ISA {
constexpr int W = 4;
#if defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif
}  // namespace FASTATTN_ISA
}  // namespace fastattn

#include "portable.h"

namespace fastattn {
namespace FASTATTN_ISA {

// Whether a or b holds a NaN. Also true where there is no cheap way to find out.
FASTATTN_INLINE bool maybe_nan(vf a, vf b) {
#if defined(__SSE2__)
  return _mm_movemask_ps(_mm_cmpunord_ps((__m128)a, (__m128)b)) != 0;
#else
  return true;
#endif
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn

#include "bf16_integers.h"
