// Functions of any float, correct for infinities, NaN and subnormal numbers, within a few units in the last place.
// tests/native/math_checks.h has the numbers.
#pragma once
#include "math.h"

namespace fastattn {
namespace FASTATTN_ISA {

typedef double vd __attribute__((vector_size(W * 8)));

// f of each lane, for functions without a vector form.
template <class F>
FASTATTN_INLINE vf by_lane(vf x, const F& f) {
  for (int i = 0; i < W; i++) x[i] = f(x[i]);
  return x;
}
FASTATTN_INLINE vf power(vf x, vf y) {
  for (int i = 0; i < W; i++) x[i] = __builtin_powf(x[i], y[i]);
  return x;
}
FASTATTN_INLINE vf square_root(vf x) {
  vf r;
  FASTATTN_EACH(i, W) r[i] = __builtin_sqrtf(x[i]);
  return r;
}

FASTATTN_INLINE vi pick(vi mask, vi a, vi b) { return (a & mask) | (b & ~mask); }
FASTATTN_INLINE vi sign_bit(vf x) { return (vi)x & INT32_MIN; }

// NaN where either is.
FASTATTN_INLINE vf larger(vf a, vf b) { return select((a > b) | (a != a), a, b); }
FASTATTN_INLINE vf smaller(vf a, vf b) { return select((a < b) | (a != a), a, b); }

// -1, 0 or 1; 0 of NaN.
FASTATTN_INLINE vf sign(vf x) { return __builtin_convertvector((x < 0.0f) - (x > 0.0f), vf); }

// Toward zero. Values outside of int32 become the nearest int32, NaN becomes 0.
FASTATTN_INLINE vi truncate(vf x) {
  const vi fits = (x >= -0x1p31f) & (x < 0x1p31f);
  const vi limit = pick(x > 0.0f, vi{} + INT32_MAX, pick(x < 0.0f, vi{} + INT32_MIN, vi{}));
  return pick(fits, __builtin_convertvector(keep(fits, x), vi), limit);
}
FASTATTN_INLINE vf floor(vf x) {
  const vi small = vabs(x) < 0x1p23f;  // others are whole
  const vf t = __builtin_convertvector(__builtin_convertvector(keep(small, x), vi), vf);
  const vf whole = t - keep(t > x, splat(1.0f));
  return select(small, (vf)((vi)whole | sign_bit(x)), x);
}

// Python's a // b and a % b: toward minus infinity, the rest of b's sign. 0 where b is 0; -2^31 / -1 wraps.
FASTATTN_INLINE vi floor_divide(vi a, vi b) {
  const vi none = b == 0, minus = b == -1;
  const vi d = pick(none | minus, vi{} + 1, b);
  // a quotient that is not whole differs from the next whole one by more than double's rounding
  const vi t = __builtin_convertvector(__builtin_convertvector(a, vd) / __builtin_convertvector(d, vd), vi);
  const vi rest = (vi)((vu)a - (vu)t * (vu)d);
  const vi floored = t + ((rest != 0) & ((rest ^ d) < 0));
  return ~none & pick(minus, (vi)(-(vu)a), floored);
}
FASTATTN_INLINE vi floor_remainder(vi a, vi b) { return (b != 0) & (vi)((vu)a - (vu)floor_divide(a, b) * (vu)b); }

// log(1 + f) + e ln2 for |f| <= sqrt(1/2)
FASTATTN_INLINE vf log_reduced(vf f, vf e) {
  const vf z = f * f;
  vf p = f * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const vf y = f * z * p - e * 2.12194440e-4f - z * 0.5f;
  return f + y + e * 0.693359375f;  // of few bits: a whole number times it is exact
}
FASTATTN_INLINE vf log(vf x) {
  const vi tiny = x < 0x1p-126f;
  const vf y = select(tiny, x * 0x1p23f, x);
  const vi bits = (vi)((vu)y - 0x3f3504f3u);  // sqrt(1/2): the mantissa lies in [sqrt(1/2), sqrt(2))
  const vf e = __builtin_convertvector((bits >> 23) - (tiny & 23), vf);
  const vf m = (vf)((bits & 0x7fffff) + 0x3f3504f3);
  const vf inside = log_reduced(m - 1.0f, e), infinity = splat(__builtin_inff());
  const vf outside = select(x == 0.0f, -infinity, select(x > 0.0f, x, splat(__builtin_nanf(""))));
  return select((x > 0.0f) & (x < infinity), inside, outside);
}
// log(u) with u the rounded 1 + x, corrected by the rounding error.
FASTATTN_INLINE vf log1p(vf x) {
  const vf u = x + 1.0f;
  const vf lost = select(x < 1.0f, x - (u - 1.0f), 1.0f - (u - x));
  const vf y = log(u) + keep((u > 0.0f) & (u < __builtin_inff()), lost / u);
  return select(vabs(x) < 0x1p-24f, x, y);
}

FASTATTN_INLINE vf expm1(vf x) {
  const vf magic = splat(12582912.0f);
  const vf y = at_most(at_least(x, -104.0f), 89.0f);
  const vf shifted = y * 1.44269504f + magic, whole = shifted - magic;
  const vf r = (y - whole * 0.693145752f) - whole * 1.42860677e-6f;
  vf p = r * (1 / 5040.0f) + 1 / 720.0f;  // Taylor's: the next term is 2e-8 of the sum at most
  p = p * r + 1 / 120.0f;
  p = p * r + 1 / 24.0f;
  p = p * r + 1 / 6.0f;
  p = p * r + 0.5f;
  p = p * (r * r) + r;  // e^r - 1
  const vi n = (vi)shifted - (vi)magic, half = n >> 1;
  const vf first = (vf)((half + 127) << 23), second = (vf)((n - half + 127) << 23);
  const vf inverse = (vf)((half - n + 127) << 23);
  const vf result = (p * first + (first - inverse)) * second;
  return select(x == x, result, x);
}

FASTATTN_INLINE vf sigmoid(vf x) {
  const vf e = exp(-vabs(x)), one = splat(1.0f);
  return select(x == x, select(x < 0.0f, e, one) / (e + 1.0f), x);
}

// Polynomials below and above 0.93, the latter of -log(1 - erf(x)).
FASTATTN_INLINE vf erf(vf x) {
  const vf t = at_most(vabs(x), 4.0f), s = x * x;
  vf p = t * -1.72853470e-5f + 3.83197126e-4f;
  const vf q = t * -3.88396438e-3f + 2.42546219e-2f;
  p = p * (t * t) + q;
  p = p * t - 1.06777877e-1f;
  p = p * t - 6.34846687e-1f;
  p = p * t - 1.28717512e-1f;
  const vf large = 1.0f - exp(p * t - t);
  p = s * -5.96761703e-4f + 4.99119423e-3f;
  p = p * s - 2.67681349e-2f;
  p = p * s + 1.12819925e-1f;
  p = p * s - 3.76125336e-1f;
  p = p * s + 1.28379166e-1f;
  const vf result = select(vabs(x) > 0.927734375f, (vf)((vi)large | sign_bit(x)), p * x + x);
  return select(x == x, result, x);
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
