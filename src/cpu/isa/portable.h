// The primitives of an instruction set in plain C++, for sets without special instructions: all but maybe_nan.
#pragma once
#include "vector.h"

namespace fastattn {
namespace FASTATTN_ISA {

// The larger and the smaller of two; b where either is NaN.
FASTATTN_INLINE vf vmax(vf a, vf b) { return select(a > b, a, b); }
FASTATTN_INLINE vf vmin(vf a, vf b) { return select(a < b, a, b); }

// 1 / x within 3e-7 for 2^-125 <= x <= 2^125, at most 2^-125 above.
FASTATTN_INLINE vf reciprocal(vf x) { return 1.0f / x; }

// Sums and maxima in one fixed order (halves), so that results do not depend on the call.
struct Sum {
  FASTATTN_INLINE float of(float a, float b) { return a + b; }
};
struct Larger {
  FASTATTN_INLINE float of(float a, float b) { return a > b ? a : b; }
};
template <class Op>
FASTATTN_INLINE float reduce(vf x) {
  float t[W];
  memcpy(t, &x, sizeof t);
  for (int w = W / 2; w > 0; w /= 2)
    for (int i = 0; i < w; i++) t[i] = Op::of(t[i], t[i + w]);
  return t[0];
}

FASTATTN_INLINE vu widen(vh x) { return __builtin_convertvector(x, vu); }
// Every element is below 2^16.
FASTATTN_INLINE vh narrow(vu x) { return __builtin_convertvector(x, vh); }
// The same of two vectors, one after the other.
FASTATTN_INLINE void store_narrow(void* p, vu x, vu y) {
  const vh first = narrow(x), second = narrow(y);
  memcpy(p, &first, sizeof first);
  memcpy((char*)p + sizeof first, &second, sizeof second);
}
// low's upper halves in the lower halves of the words, high's in the upper ones.
FASTATTN_INLINE vu join_halves(vu low, vu high) { return (low >> 16) | (high & splat_u(0xffff0000)); }

// Products of 64 bits, their upper and lower halves.
FASTATTN_INLINE void multiply_wide(vu a, uint32_t b, vu* high, vu* low) {
  for (int i = 0; i < W; i++) (*high)[i] = uint32_t(uint64_t(a[i]) * b >> 32);
  *low = a * b;
}

FASTATTN_INLINE vf from_f16(vh x) {
  // exponent and fraction moved into place are 2^112 too small; infinity and NaN then need the full exponent
  const vu u = widen(x);
  const vu magnitude = (u & splat_u(0x7fff)) << 13;
  const vf scaled = as_vf(magnitude) * splat(0x1p112f);
  const vu special = splat_u(0x7c00u << 13);
  const vu wide = select_u((vi)(magnitude >= special), magnitude | splat_u(0x7f800000), as_vu(scaled));
  return as_vf(wide | ((u & splat_u(0x8000)) << 16));
}

FASTATTN_INLINE vh to_f16(vf x) {
  const vu u = as_vu(x);
  const vu sign = (u >> 16) & splat_u(0x8000);
  const vu magnitude = u & splat_u(0x7fffffff);
  // below 2^-14: adding 0.5 puts the 2^-24 unit of half denormals into the last bit, rounded to nearest even
  const vu small = as_vu(as_vf(magnitude) + splat(0.5f)) - splat_u(0x3f000000);
  const vu normal = (magnitude + splat_u(0xc8000fffu) + ((magnitude >> 13) & splat_u(1))) >> 13;
  vu half = select_u((vi)(magnitude < splat_u(0x38800000)), small, normal);
  half = select_u((vi)(magnitude >= splat_u(0x477ff000)), splat_u(0x7c00), half);
  half = select_u((vi)(magnitude > splat_u(0x7f800000)), splat_u(0x7e00), half);
  return narrow(half | sign);
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
