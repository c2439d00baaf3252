// The normaliser of linear attention.
#pragma once

#include "vec.h"

namespace fastattn {
namespace FASTATTN_ISA {

// x / divisor, 0 where that is 0. A divisor below 2^-128 has no reciprocal in float32.
FASTATTN_INLINE vf divided(vf x, float divisor) { return divisor == 0 ? vf{} : x / splat(divisor); }

}  // namespace FASTATTN_ISA
}  // namespace fastattn
