// Elements of 16 bits: conversions, and loads and stores of every type, whole and of the first n < W elements.
#pragma once
#include "vec.h"

namespace fastattn {
namespace FASTATTN_ISA {

FASTATTN_INLINE vf from_bf16(vh x) { return as_vf(widen(x) << 16); }

FASTATTN_INLINE vh load_h(const void* p) {
  vh x;
  memcpy(&x, p, sizeof x);
  return x;
}
FASTATTN_INLINE vf load(const bf16* p) { return from_bf16(load_h(p)); }
FASTATTN_INLINE vf load(const f16* p) { return from_f16(load_h(p)); }

FASTATTN_INLINE void store(bf16* p, vf x) {
  const vh h = to_bf16(x);
  memcpy(p, &h, sizeof h);
}
FASTATTN_INLINE void store(f16* p, vf x) {
  const vh h = to_f16(x);
  memcpy(p, &h, sizeof h);
}

// Lanes of a load past n are zero.
template <class T>
FASTATTN_INLINE vf load_n(const T* p, int n) {
  T t[W] = {};
  memcpy(t, p, n * sizeof(T));
  return load(t);
}
template <class T>
FASTATTN_INLINE void store_n(T* p, vf x, int n) {
  T t[W];
  store(t, x);
  memcpy(p, t, n * sizeof(T));
}

// The value after rounding to T.
FASTATTN_INLINE vf rounded_to(vf x, const float*) { return x; }
FASTATTN_INLINE vf rounded_to(vf x, const bf16*) { return from_bf16(to_bf16(x)); }
FASTATTN_INLINE vf rounded_to(vf x, const f16*) { return from_f16(to_f16(x)); }

// Two vectors, one after the other.
template <class T>
FASTATTN_INLINE void store_two(T* p, vf a, vf b) {
  store(p, a);
  store(p + W, b);
}
// Factors of dot_pairs, which takes subnormals for zero, or of a float32 product.
FASTATTN_INLINE void store_factors(float* p, vf a, vf b) { store_two(p, a, b); }

// --- pairs: 2W neighbours as two vectors, in an order that is the type's own -----------------------------------------
//
// A word of two bf16 splits into an even and an odd lane in one instruction each, and joins again as cheaply; memory's
// order would take three times as many. For kernels whose operands have one type and whose elements are all alike.

template <class T>
FASTATTN_INLINE void load_pair(const T* p, vf* x) {
  x[0] = load(p);
  x[1] = load(p + W);
}
// Stores x, and rounds x to the stored value.
template <class T>
FASTATTN_INLINE void store_pair(T* p, vf* x) {
  for (int i = 0; i < 2; i++) {
    store(p + i * W, x[i]);
    x[i] = rounded_to(x[i], p);
  }
}
// Rounds ties away from zero where that is cheaper, for values that are almost never ties: a product of three factors,
// not a sum of two numbers. `nearest` rounds x in the same way, for elements that do not fill a pair.
template <class T>
FASTATTN_INLINE vf nearest(vf x, const T*) {
  return x;
}
template <class T>
FASTATTN_INLINE void store_pair_nearest(T* p, const vf* x) {
  store(p, x[0]);
  store(p + W, x[1]);
}
// x, as loaded by load_pair of T, in memory's order; and the reverse.
template <class T>
FASTATTN_INLINE void unpair(const T*, vf*) {}
template <class T>
FASTATTN_INLINE void pair(const T*, vf*) {}

FASTATTN_INLINE void load_pair(const bf16* p, vf* x) {
  vu both;
  memcpy(&both, p, sizeof both);
  x[0] = as_vf(both << 16);
  x[1] = as_vf(both & splat_u(0xffff0000));
}
FASTATTN_INLINE void store_pair(bf16* p, vf* x) {
  vu even, odd;
  round_two(x[0], x[1], &even, &odd);
  const vu both = join_halves(even, odd);
  memcpy(p, &both, sizeof both);
  x[0] = as_vf(even & splat_u(0xffff0000));
  x[1] = as_vf(odd & splat_u(0xffff0000));
}
// A NaN that comes from bf16, or from the processor, has a lower half of 0, which does not carry into the upper half.
FASTATTN_INLINE vu bf16_nearest(vf x) { return as_vu(x) + splat_u(0x8000); }
FASTATTN_INLINE vf nearest(vf x, const bf16*) { return as_vf(bf16_nearest(x) & splat_u(0xffff0000)); }
FASTATTN_INLINE void store_pair_nearest(bf16* p, const vf* x) {
  const vu both = join_halves(bf16_nearest(x[0]), bf16_nearest(x[1]));
  memcpy(p, &both, sizeof both);
}
template <int... L>
FASTATTN_INLINE void unpair_lanes(vf* x, std::integer_sequence<int, L...>) {
  const vf a = x[0], b = x[1];
  x[0] = __builtin_shufflevector(a, b, (L / 2 + L % 2 * W)...);
  x[1] = __builtin_shufflevector(a, b, ((L + W) / 2 + L % 2 * W)...);
}
FASTATTN_INLINE void unpair(const bf16*, vf* x) { unpair_lanes(x, std::make_integer_sequence<int, W>{}); }
template <int... L>
FASTATTN_INLINE void pair_lanes(vf* x, std::integer_sequence<int, L...>) {
  const vf a = x[0], b = x[1];
  x[0] = __builtin_shufflevector(a, b, (2 * L)...);
  x[1] = __builtin_shufflevector(a, b, (2 * L + 1)...);
}
FASTATTN_INLINE void pair(const bf16*, vf* x) { pair_lanes(x, std::make_integer_sequence<int, W>{}); }

}  // namespace FASTATTN_ISA
}  // namespace fastattn
