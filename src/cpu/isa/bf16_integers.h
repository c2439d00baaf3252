// Conversions to bf16 by integers, for an instruction set without a bf16 unit.
#pragma once
#include "bf16_rounding.h"

namespace fastattn {
namespace FASTATTN_ISA {

FASTATTN_INLINE vh to_bf16(vf x) { return bf16_by_integers(x); }
FASTATTN_INLINE void store_two(bf16* p, vf a, vf b) { store_two_by_integers(p, a, b); }
// Factors of products, which are made in float32.
FASTATTN_INLINE void store_factors(bf16* p, vf a, vf b) { store_two(p, a, b); }
// Words of two factors, low's elements in the lower halves and high's in the upper ones.
FASTATTN_INLINE vu bf16_words(vf low, vf high) { return widen(to_bf16(low)) | (widen(to_bf16(high)) << 16); }
// Not defined: no product uses pairs.
vf dot_pairs(vf acc, vu a, vu b);

}  // namespace FASTATTN_ISA
}  // namespace fastattn
