// Vectors of W floats by GCC/Clang vector extensions; intrinsics only where the compiler needs help. Included once per
// instruction set, inside no namespace of its own: everything lives in fastattn::FASTATTN_ISA.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "params.h"
#include "refuse.h"

namespace fastattn {
namespace FASTATTN_ISA {

#if defined(__AVX512F__) || defined(FASTATTN_WIDE)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

#define FASTATTN_INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));
typedef uint16_t vh2 __attribute__((vector_size(W * 4)));

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

FASTATTN_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
FASTATTN_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

FASTATTN_INLINE vf splat(float x) { return x - vf{}; }
FASTATTN_INLINE vu splat_u(uint32_t x) { return x - vu{}; }
FASTATTN_INLINE vf as_vf(vu x) { return (vf)x; }
FASTATTN_INLINE vu as_vu(vf x) { return (vu)x; }
FASTATTN_INLINE vf select(vi mask, vf a, vf b) { return mask ? a : b; }
FASTATTN_INLINE vf keep(vi mask, vf a) { return (vf)(mask & (vi)a); }
FASTATTN_INLINE vf vabs(vf x) { return (vf)((vi)x & 0x7fffffff); }
FASTATTN_INLINE vu select_u(vi mask, vu a, vu b) { return (a & (vu)mask) | (b & ~(vu)mask); }

// The larger and the smaller of two; b where either is NaN.
FASTATTN_INLINE vf vmax(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__) && !defined(FASTATTN_WIDE)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return select(a > b, a, b);
#endif
}
FASTATTN_INLINE vf vmin(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__) && !defined(FASTATTN_WIDE)
  return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return select(a < b, a, b);
#endif
}
// Both give back the second operand where either is NaN: here x, so a NaN stays.
FASTATTN_INLINE vf at_least(vf x, float low) { return vmax(splat(low), x); }
FASTATTN_INLINE vf at_most(vf x, float high) { return vmin(splat(high), x); }

// 1 / x within 3e-7 for 2^-125 <= x <= 2^125, at most 2^-125 above.
FASTATTN_INLINE vf reciprocal(vf x) {
#if defined(__AVX512F__)
  const vf r = (vf)_mm512_rcp14_ps((__m512)x);
  return r + r * (1.0f - x * r);
#elif defined(__AVX2__) && !defined(FASTATTN_WIDE)
  const vf r = (vf)_mm256_rcp_ps((__m256)x);
  return r + r * (1.0f - x * r);
#else
  return 1.0f / x;
#endif
}

// The lane numbers.
FASTATTN_INLINE vi iota() {
  vi x{};
  for (int i = 0; i < W; i++) x[i] = i;
  return x;
}

// Sums and maxima in one fixed order (halves), so that results do not depend on the call.
#if defined(__AVX2__) && !defined(FASTATTN_WIDE)
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
#if defined(__AVX512F__)
  const __m256 half = Op::of(_mm512_castps512_ps256((__m512)x), _mm512_extractf32x8_ps((__m512)x, 1));
#else
  const __m256 half = (__m256)x;
#endif
  __m128 t = Op::of(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  t = Op::of(t, _mm_movehl_ps(t, t));
  return _mm_cvtss_f32(Op::of(t, _mm_movehdup_ps(t)));
}
#else
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
#endif
FASTATTN_INLINE float reduce_add(vf x) { return reduce<Sum>(x); }
FASTATTN_INLINE float reduce_max(vf x) { return reduce<Larger>(x); }

// --- conversions ---------------------------------------------------------------------------------------------------

FASTATTN_INLINE vu widen(vh x) {
#if defined(__AVX512F__)
  return (vu)_mm512_cvtepu16_epi32((__m256i)x);
#elif defined(__AVX2__) && !defined(FASTATTN_WIDE)
  return (vu)_mm256_cvtepu16_epi32((__m128i)x);
#else
  return __builtin_convertvector(x, vu);
#endif
}
// Every element is below 2^16.
FASTATTN_INLINE vh narrow(vu x) {
#if defined(__AVX512F__)
  return (vh)_mm512_cvtepi32_epi16((__m512i)x);
#elif defined(__AVX2__) && !defined(FASTATTN_WIDE)
  return (vh)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
#else
  return __builtin_convertvector(x, vh);
#endif
}

FASTATTN_INLINE vf from_bf16(vh x) { return as_vf(widen(x) << 16); }

// The bf16 nearest to x (ties to even) in the upper half of each word, the lower half being rubbish. Not for NaN.
FASTATTN_INLINE vu bf16_rounded(vf x) {
  const vu u = as_vu(x);
  return u + splat_u(0x7fff) + ((u >> 16) & splat_u(1));
}
// The same for every x, given `rounded`: NaN stays a (quiet) NaN.
FASTATTN_INLINE vu bf16_keeping_nan(vf x, vu rounded) {
  return select_u(x == x, rounded, as_vu(x) | splat_u(0x400000));
}

FASTATTN_INLINE vh bf16_by_integers(vf x) { return narrow(bf16_keeping_nan(x, bf16_rounded(x)) >> 16); }

// The bf16 unit (FASTATTN_BF16_DOT) has instructions for bf16, imitated where the processor lacks them. Whatever MXCSR
// says, they take a subnormal operand for a zero of its sign and make a subnormal result one. Their conversions are for
// factors of dot_pairs, which does not see subnormals either; what is stored for others keeps them (to_bf16).
FASTATTN_INLINE vf flushed(vf x) { return select(vabs(x) < splat(0x1p-126f), (vf)((vi)x & int32_t(0x80000000)), x); }

#if defined(FASTATTN_BF16_DOT)
FASTATTN_INLINE vh flushed_bf16(vf x) {
#if defined(__AVX512BF16__)
  return (vh)_mm512_cvtneps_pbh((__m512)x);
#else
  return bf16_by_integers(flushed(x));
#endif
}
FASTATTN_INLINE vh2 flushed_bf16(vf a, vf b) {
#if defined(__AVX512BF16__)
  return (vh2)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
#else
  const vh halves[2] = {flushed_bf16(a), flushed_bf16(b)};
  vh2 both;
  memcpy(&both, halves, sizeof both);
  return both;
#endif
}
FASTATTN_INLINE bool has_subnormal(vf a, vf b) {
#if defined(__AVX512DQ__)
  constexpr int kSubnormal = 0x20;
  return !_kortestz_mask16_u8(_mm512_fpclass_ps_mask((__m512)a, kSubnormal),
                              _mm512_fpclass_ps_mask((__m512)b, kSubnormal));
#else
  const vi found = ((vi)flushed(a) ^ (vi)a) | ((vi)flushed(b) ^ (vi)b);
  int any = 0;
  for (int i = 0; i < W; i++) any |= found[i];
  return any != 0;
#endif
}
#endif

FASTATTN_INLINE vh to_bf16(vf x) {
#if defined(FASTATTN_BF16_DOT)
  if (__builtin_expect(!has_subnormal(x, x), 1)) return flushed_bf16(x);
#endif
  return bf16_by_integers(x);
}

FASTATTN_INLINE vf from_f16(vh x) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps((__m256i)x);
#elif defined(__F16C__) && !defined(FASTATTN_WIDE)
  return (vf)_mm256_cvtph_ps((__m128i)x);
#else
  // exponent and fraction moved into place are 2^112 too small; infinity and NaN then need the full exponent
  const vu u = widen(x);
  const vu magnitude = (u & splat_u(0x7fff)) << 13;
  const vf scaled = as_vf(magnitude) * splat(0x1p112f);
  const vu special = splat_u(0x7c00u << 13);
  const vu wide = select_u((vi)(magnitude >= special), magnitude | splat_u(0x7f800000), as_vu(scaled));
  return as_vf(wide | ((u & splat_u(0x8000)) << 16));
#endif
}

FASTATTN_INLINE vh to_f16(vf x) {
#if defined(__AVX512F__)
  return (vh)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__) && !defined(FASTATTN_WIDE)
  return (vh)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
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
#endif
}

// --- loads and stores, whole and of the first n < W elements (the rest of a load is zero) ---------------------------

FASTATTN_INLINE vf load(const float* p) {
  vf x;
  memcpy(&x, p, sizeof x);
  return x;
}
FASTATTN_INLINE vh load_h(const void* p) {
  vh x;
  memcpy(&x, p, sizeof x);
  return x;
}
FASTATTN_INLINE vf load(const bf16* p) { return from_bf16(load_h(p)); }
FASTATTN_INLINE vf load(const f16* p) { return from_f16(load_h(p)); }

FASTATTN_INLINE void store(float* p, vf x) { memcpy(p, &x, sizeof x); }
FASTATTN_INLINE void store(bf16* p, vf x) {
  const vh h = to_bf16(x);
  memcpy(p, &h, sizeof h);
}
FASTATTN_INLINE void store(f16* p, vf x) {
  const vh h = to_f16(x);
  memcpy(p, &h, sizeof h);
}

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

// What a value becomes when stored as T.
FASTATTN_INLINE vf rounded_to(vf x, const float*) { return x; }
FASTATTN_INLINE vf rounded_to(vf x, const bf16*) { return from_bf16(to_bf16(x)); }
FASTATTN_INLINE vf rounded_to(vf x, const f16*) { return from_f16(to_f16(x)); }

// W booleans of one byte as a mask.
FASTATTN_INLINE vi load_bools(const uint8_t* p) {
  typedef uint8_t vb __attribute__((vector_size(W)));
  vb x;
  memcpy(&x, p, sizeof x);
  return __builtin_convertvector(x, vi) != 0;
}

// Whether a or b holds a NaN. Also true where there is no cheap way to find out.
FASTATTN_INLINE bool maybe_nan(vf a, vf b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_UNORD_Q) != 0;
#elif defined(__AVX2__) && !defined(FASTATTN_WIDE)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_UNORD_Q)) != 0;
#elif defined(__SSE2__) && !defined(FASTATTN_WIDE)
  return _mm_movemask_ps(_mm_cmpunord_ps((__m128)a, (__m128)b)) != 0;
#else
  return true;
#endif
}

// Two vectors, one after the other.
template <class T>
FASTATTN_INLINE void store_two(T* p, vf a, vf b) {
  store(p, a);
  store(p + W, b);
}
// Both rounded to bf16, in the upper half of each word.
FASTATTN_INLINE void round_two(vf a, vf b, vu* x, vu* y) {
  *x = bf16_rounded(a);
  *y = bf16_rounded(b);
  if (__builtin_expect(maybe_nan(a, b), 0)) {
    *x = bf16_keeping_nan(a, *x);
    *y = bf16_keeping_nan(b, *y);
  }
}
FASTATTN_INLINE void store_two(bf16* p, vf a, vf b) {
#if defined(FASTATTN_BF16_DOT)
  if (__builtin_expect(!has_subnormal(a, b), 1)) {
    const vh2 both = flushed_bf16(a, b);
    memcpy(p, &both, sizeof both);
    return;
  }
#endif
  vu x, y;
  round_two(a, b, &x, &y);
#if defined(__AVX2__) && !defined(__AVX512F__) && !defined(FASTATTN_WIDE)
  const __m256i lanes = _mm256_packus_epi32((__m256i)(x >> 16), (__m256i)(y >> 16));
  const __m256i both = _mm256_permute4x64_epi64(lanes, 0xd8);
  memcpy(p, &both, sizeof both);
#else
  const vh first = narrow(x >> 16), second = narrow(y >> 16);
  memcpy(p, &first, sizeof first);
  memcpy(p + W, &second, sizeof second);
#endif
}

// Factors of dot_pairs, or of a float32 product; dot_pairs does not see their subnormals.
FASTATTN_INLINE void store_factors(float* p, vf a, vf b) { store_two(p, a, b); }
FASTATTN_INLINE void store_factors(bf16* p, vf a, vf b) {
#if defined(FASTATTN_BF16_DOT)
  const vh2 both = flushed_bf16(a, b);
  memcpy(p, &both, sizeof both);
#else
  store_two(p, a, b);
#endif
}

// Words of two bf16 that are factors of dot_pairs, low's elements in the lower halves and high's in the upper ones.
#if defined(FASTATTN_BF16_DOT)
template <int... L>
FASTATTN_INLINE vu interleaved(vh2 x, std::integer_sequence<int, L...>) {
  return (vu)__builtin_shufflevector(x, x, (L / 2 + L % 2 * W)...);
}
#endif
FASTATTN_INLINE vu bf16_words(vf low, vf high) {
#if defined(FASTATTN_BF16_DOT)
  return interleaved(flushed_bf16(low, high), std::make_integer_sequence<int, 2 * W>{});
#else
  return widen(to_bf16(low)) | (widen(to_bf16(high)) << 16);
#endif
}

// --- pairs: 2W neighbours as two vectors, in an order that is the type's own -----------------------------------------
//
// A word of two bf16 splits into an even and an odd lane in one instruction each, and joins again as cheaply; memory's
// order would take three times as many. For kernels whose operands have one type and whose elements are all alike.

// low's upper halves in the lower halves of the words, high's in the upper ones.
FASTATTN_INLINE vu join_halves(vu low, vu high) {
#if defined(__AVX512F__)
  return (vu)_mm512_mask_blend_epi16(0xaaaaaaaa, (__m512i)(low >> 16), (__m512i)high);
#elif defined(__AVX2__) && !defined(FASTATTN_WIDE)
  return (vu)_mm256_blend_epi16((__m256i)(low >> 16), (__m256i)high, 0xaa);
#else
  return (low >> 16) | (high & splat_u(0xffff0000));
#endif
}

template <class T>
FASTATTN_INLINE void load_pair(const T* p, vf* x) {
  x[0] = load(p);
  x[1] = load(p + W);
}
// x becomes what was stored.
template <class T>
FASTATTN_INLINE void store_pair(T* p, vf* x) {
  for (int i = 0; i < 2; i++) {
    store(p + i * W, x[i]);
    x[i] = rounded_to(x[i], p);
  }
}
// Rounded with ties away from zero where that is cheaper, for what is next to never a tie: three factors' product, not
// two numbers' sum. `nearest` is x rounded so, for what a pair leaves over.
template <class T>
FASTATTN_INLINE vf nearest(vf x, const T*) {
  return x;
}
template <class T>
FASTATTN_INLINE void store_pair_nearest(T* p, const vf* x) {
  store(p, x[0]);
  store(p + W, x[1]);
}
// x, loaded by load_pair of T, in memory's order; and the other way.
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
// A NaN that came from bf16, or from the processor, has nothing in its lower half to carry into the upper one.
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

// --- bf16 dot --------------------------------------------------------------------------------------------------------

// acc + a1 * b1 + a0 * b0 a lane, a and b holding two bf16: the odd element first, each product added to the sum in one
// rounding to nearest even, subnormals flushed from operands and from both sums, as VDPBF16PS does. tile.h says what
// that loses.
FASTATTN_INLINE vf dot_pairs(vf acc, vu a, vu b) {
#if defined(__AVX512BF16__)
  return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
  const vf a1 = flushed((vf)(a & 0xffff0000u)), b1 = flushed((vf)(b & 0xffff0000u));
  const vf a0 = flushed((vf)(a << 16)), b0 = flushed((vf)(b << 16));
  return flushed(flushed(flushed(acc) + a1 * b1) + a0 * b0);
#endif
}

// --- functions -------------------------------------------------------------------------------------------------------

#define FASTATTN_EACH(i, n) _Pragma("GCC unroll 8") for (int i = 0; i < n; i++)

// p[i] = e^r and n[i] of x[i] = n ln2 + r, |r| <= ln2/2, for |x| <= 127 ln2; degree 6, relative error < 2e-7; NaN stays
// NaN. U vectors step by step together: one alone is bound by latency.
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
// x / d and y / d go to zero, and -inf / d is NaN as -inf * 0 is.
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

// 2^x for x <= 127, relative error below 2e-7; 0 below -126 (-inf too), NaN stays NaN.
FASTATTN_INLINE vf exp2_bounded(vf x) {
  const vf y = at_least(x, -126.0f);
  const vf t = y + kRound;
  const vf p = exp2_fraction(y - (t - kRound));
  return keep(~(x < splat(-126.0f)), scale_by_rounded(p, t));
}

// 2^x for x <= 127, 2^-126 below -126.
FASTATTN_INLINE vf exp2_clamped(vf x) {
  const vf y = at_least(x, -126.0f);
  const vf t = y + kRound;
  return scale_by_rounded(exp2_fraction(y - (t - kRound)), t);
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
