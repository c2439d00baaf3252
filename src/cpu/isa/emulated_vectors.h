// The vectors of avx512_vectors.h in plain C++.
#pragma once

namespace fastattn {
namespace FASTATTN_ISA {
constexpr int W = 16;
constexpr int kRegisters = 32;
}  // namespace FASTATTN_ISA
}  // namespace fastattn

#include "portable.h"

namespace fastattn {
namespace FASTATTN_ISA {

// Whether a or b holds a NaN. Also true where there is no cheap way to find out.
FASTATTN_INLINE bool maybe_nan(vf, vf) { return true; }

}  // namespace FASTATTN_ISA
}  // namespace fastattn
