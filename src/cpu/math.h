// Functions of vectors. tests/native/math_checks.h has the error of each in units in the last place, and its range.
#pragma once
#include "vec.h"

namespace fastattn {
namespace FASTATTN_ISA {

// p[i] = e^r and n[i] of x[i] = n ln2 + r, |r| <= ln2/2, for |x| <= 127 ln2; degree 6, relative error < 2e-7; NaN stays
// NaN. U vectors are computed together: a single one would be bound by latency.
template <int U>
FASTATTN_INLINE void exp_reduced(const vf* x, vf* p, vi* n) {
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, found in the low bits
  vf shifted[U], r[U];
  FASTATTN_EACH(i, U) shifted[i] = x[i] * splat(1.44269504f) + magic;
  FASTATTN_EACH(i, U) p[i] = shifted[i] - magic;
  FASTATTN_EACH(i, U) r[i] = x[i] - p[i] * splat(0.693145752f);
  FASTATTN_EACH(i, U) r[i] = r[i] - p[i] * splat(1.42860677e-6f);
  FASTATTN_EACH(i, U) p[i] = r[i] * splat(1.3981999e-3f) + splat(8.3334519e-3f);
  FASTATTN_EACH(i, U) p[i] = p[i] * r[i] + splat(4.1665703e-2f);
  FASTATTN_EACH(i, U) p[i] = p[i] * r[i] + splat(1.6666664e-1f);
  FASTATTN_EACH(i, U) p[i] = p[i] * r[i] + splat(0.5f);
  FASTATTN_EACH(i, U) p[i] = p[i] * r[i] + splat(1.0f);
  FASTATTN_EACH(i, U) p[i] = p[i] * r[i] + splat(1.0f);
  FASTATTN_EACH(i, U) n[i] = (vi)shifted[i] - (vi)magic;
}

// e^x: 0 below -104, infinity above 89, denormals in between right.
FASTATTN_INLINE vf exp(vf x) {
  vf p;
  vi n;
  const vf clamped = vmin(splat(89.0f), vmax(splat(-104.0f), x));
  exp_reduced<1>(&clamped, &p, &n);
  // two factors of about 2^(n/2), so that neither overflows where the product does not
  const vi half = n >> 1;
  return p * (vf)((half + 127) << 23) * (vf)((n - half + 127) << 23);
}

// d[i] = 1 + e^-x[i], the divisor of a sigmoid; relative error < 4e-7 down to x = -88, infinity below -89, so that
// x / d and y / d become zero, and -inf / d is NaN, as -inf * 0 is.
template <int U>
FASTATTN_INLINE void sigmoid_divisors(const vf* x, vf* d, const float*) {
  vf clamped[U], p[U];
  vi n[U];
  FASTATTN_EACH(i, U) clamped[i] = vmax(splat(-87.0f), -x[i]);
  FASTATTN_EACH(i, U) clamped[i] = vmin(splat(89.0f), clamped[i]);
  exp_reduced<U>(clamped, p, n);
  FASTATTN_EACH(i, U) d[i] = splat(1.0f) + p[i] * (vf)((n[i] + 127) << 23);
}

// 1.5 * 2^23, adding which rounds to an integer n left in the low bits, and 127: they hold the exponent of 2^n.
constexpr float kRound = 12582912.0f + 127;

// 2^f for |f| <= 1/2, relative error 9.2e-8 before rounding.
FASTATTN_INLINE vf exp2_fraction(vf f) {
  vf p = f * 1.326472726e-3f + 9.671512700e-3f;
  p = p * f + 5.550733744e-2f;
  p = p * f + 2.402224208e-1f;
  p = p * f + 6.931469776e-1f;
  return p * f + 1.0f;
}
// p * 2^n where t = n + kRound and n is within [-126, 127]. A product, so that no NaN is added away, whatever its bits.
FASTATTN_INLINE vf scale_by_rounded(vf p, vf t) { return p * (vf)((vi)t << 23); }

// For a result that is rounded to a half type. 2^f by a polynomial of relative error 7.5e-5 for bf16 and 2.6e-6 for
// f16: at most a twenty-fifth and a ninetieth of half a last place (2^-9, 2^-12).
template <int U, class T>
FASTATTN_INLINE void sigmoid_divisors(const vf* x, vf* d, const T*) {
  const float log2e = 1.44269504f;
  vf y[U], t[U], f[U], p[U];
  FASTATTN_EACH(i, U) y[i] = at_most(at_least(x[i], -89.0f), 87.0f);
  FASTATTN_EACH(i, U) t[i] = kRound - y[i] * log2e;
  FASTATTN_EACH(i, U) p[i] = kRound - t[i];
  FASTATTN_EACH(i, U) f[i] = p[i] - y[i] * log2e;
  if constexpr (std::is_same_v<T, bf16>) {
    FASTATTN_EACH(i, U) p[i] = f[i] * 5.51716685e-2f + 2.42611125e-1f;
    FASTATTN_EACH(i, U) p[i] = p[i] * f[i] + 6.93260968e-1f;
    FASTATTN_EACH(i, U) p[i] = p[i] * f[i] + 9.99928057e-1f;
  } else {
    FASTATTN_EACH(i, U) p[i] = f[i] * 9.57010221e-3f + 5.59178591e-2f;
    FASTATTN_EACH(i, U) p[i] = p[i] * f[i] + 2.40247443e-1f;
    FASTATTN_EACH(i, U) p[i] = p[i] * f[i] + 6.93121791e-1f;
    FASTATTN_EACH(i, U) p[i] = p[i] * f[i] + 9.99999285e-1f;
  }
  FASTATTN_EACH(i, U) d[i] = scale_by_rounded(p[i], t[i]) + 1.0f;
}

// 2^f for |f| <= 1/2, relative error 2.6e-6: for what is then rounded to bf16, half a last place being 2^-9.
FASTATTN_INLINE vf exp2_fraction_short(vf f) {
  vf p = f * 9.57010221e-3f + 5.59178591e-2f;
  p = p * f + 2.40247443e-1f;
  p = p * f + 6.93121791e-1f;
  return p * f + 9.99999285e-1f;
}

// 2^x for x <= 127, relative error below 2e-7 from -126 on; 0 below -126.5 (-inf too), NaN stays NaN.
template <bool kShort = false>
FASTATTN_INLINE vf exp2_bounded(vf x) {
#if defined(FASTATTN_SCALE_BY_FLOOR)
  const vf f = above_floor(x);
  vf p = f * 1.879318617e-3f + 8.990994655e-3f;  // relative error 9.3e-8 before rounding, none at 0 and 1
  p = p * f + 5.581867322e-2f;
  p = p * f + 2.401592731e-1f;
  p = p * f + 6.931517124e-1f;
  return scale_by_floor(p * f + 1.0f, x);
#else
  const vf y = at_least(x, -127.0f);  // 2^-127 is no normal number: the bits of its exponent are 0
  const vf t = y + kRound;
  const vf f = y - (t - kRound);
  return scale_by_rounded(kShort ? exp2_fraction_short(f) : exp2_fraction(f), t);
#endif
}

// 2^x for x <= 127, 2^-126 below -126.
FASTATTN_INLINE vf exp2_clamped(vf x) {
  const vf y = at_least(x, -126.0f);
  const vf t = y + kRound;
  return scale_by_rounded(exp2_fraction(y - (t - kRound)), t);
}

// 2^x for any x: infinity from 128 on, 0 below -125.5, NaN stays NaN; relative error 2e-7 in between.
FASTATTN_INLINE vf exp2_any(vf x) {
  const vf y = at_most(at_least(x, -126.0f), 129.0f);
  const vf t = y + (kRound - 1);  // of 2^(n - 1), a number for every n up to 128
  const vf p = exp2_fraction(y - (t - (kRound - 1)));
  return scale_by_rounded(p + p, t);
}

// log2(x) for normal x > 0, absolute error 2e-7; -126 or less below, NaN stays NaN.
FASTATTN_INLINE vf log2_positive(vf x) {
  const vi bits = (vi)x - 0x3f3504f3;  // sqrt(1/2): the mantissa lies in [sqrt(1/2), sqrt(2))
  const vf e = __builtin_convertvector(bits >> 23, vf);
  const vf m = (vf)((bits & 0x7fffff) + 0x3f3504f3);
  const vf u = (m - 1.0f) * reciprocal(m + 1.0f);
  const vf z = u * u;
  vf p = z * 0.32059889f + 0.41219858f;  // 2 / (ln(2) (2 n + 1))
  p = p * z + 0.57707802f;
  p = p * z + 0.96179669f;
  p = p * z + 2.88539008f;
  return select(x == x, e + u * p, x);
}

// tanh(x) below kSmallTanh: a polynomial (relative error 8e-8), so that small values keep their digits.
constexpr float kSmallTanh = 0.6f;
FASTATTN_INLINE vf tanh_small(vf x) {
  const vf z = x * x;
  vf p = splat(-0.005905856844f);
  p = p * z + splat(0.02080537379f);
  p = p * z + splat(-0.0537866801f);
  p = p * z + splat(0.1333195865f);
  p = p * z + splat(-0.3333329856f);
  return x + x * (z * p);
}
FASTATTN_INLINE vf tanh(vf x) {
  const vf large = splat(1.0f) - splat(2.0f) / (exp(x + x) + splat(1.0f));
  return select(vabs(x) < splat(kSmallTanh), tanh_small(x), large);
}

// The arithmetic of a vector, for attention_score.h.
struct Arithmetic {
  typedef vf V;
  static constexpr float kRound = FASTATTN_ISA::kRound;
  FASTATTN_INLINE vf exp2_bounded(vf x) { return FASTATTN_ISA::exp2_bounded(x); }
  FASTATTN_INLINE vf exp2_fraction(vf x) { return FASTATTN_ISA::exp2_fraction(x); }
  FASTATTN_INLINE vf scale_by_rounded(vf p, vf t) { return FASTATTN_ISA::scale_by_rounded(p, t); }
  FASTATTN_INLINE vf at_least(vf x, float low) { return FASTATTN_ISA::at_least(x, low); }
  FASTATTN_INLINE vf at_most(vf x, float high) { return FASTATTN_ISA::at_most(x, high); }
  FASTATTN_INLINE vf abs(vf x) { return vabs(x); }
  FASTATTN_INLINE vf select_negative(vf x, vf a, vf b) { return select(x < 0.0f, a, b); }
  FASTATTN_INLINE vf reciprocal(vf x) { return FASTATTN_ISA::reciprocal(x); }
};
// The same for weights that are then rounded to bf16.
struct ShortArithmetic : Arithmetic {
  FASTATTN_INLINE vf exp2_bounded(vf x) { return FASTATTN_ISA::exp2_bounded<true>(x); }
  FASTATTN_INLINE vf exp2_fraction(vf x) { return FASTATTN_ISA::exp2_fraction_short(x); }
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
