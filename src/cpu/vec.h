// Vectors of W floats by GCC/Clang vector extensions, above what the instruction set's header in isa/ defines. Included
// once per instruction set, inside no namespace of its own: everything lives in fastattn::FASTATTN_ISA.
#pragma once
#include FASTATTN_ISA_HEADER
#include "refuse.h"

#define FASTATTN_EACH(i, n) _Pragma("GCC unroll 8") for (int i = 0; i < n; i++)

namespace fastattn {
namespace FASTATTN_ISA {

FASTATTN_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
FASTATTN_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// Both return the second operand if either is NaN: here x, so a NaN stays.
FASTATTN_INLINE vf at_least(vf x, float low) { return vmax(splat(low), x); }
FASTATTN_INLINE vf at_most(vf x, float high) { return vmin(splat(high), x); }

// The lane numbers.
FASTATTN_INLINE vi iota() {
  vi x{};
  for (int i = 0; i < W; i++) x[i] = i;
  return x;
}

FASTATTN_INLINE float reduce_add(vf x) { return reduce<Sum>(x); }
FASTATTN_INLINE float reduce_max(vf x) { return reduce<Larger>(x); }

FASTATTN_INLINE vf load(const float* p) {
  vf x;
  memcpy(&x, p, sizeof x);
  return x;
}
FASTATTN_INLINE void store(float* p, vf x) { memcpy(p, &x, sizeof x); }

// W booleans of one byte as a mask.
FASTATTN_INLINE vi load_bools(const uint8_t* p) {
  typedef uint8_t vb __attribute__((vector_size(W)));
  vb x;
  memcpy(&x, p, sizeof x);
  return __builtin_convertvector(x, vi) != 0;
}

// f gets a null pointer of the element type.
template <class F>
FASTATTN_INLINE void with_dtype(DType dtype, const F& f) {
  if (dtype == DType::f32)
    f((float*)nullptr);
  else if (dtype == DType::bf16)
    f((bf16*)nullptr);
  else if (dtype == DType::f16)
    f((f16*)nullptr);
  else
    cpu::unknown_code("dtype", int64_t(dtype));
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
