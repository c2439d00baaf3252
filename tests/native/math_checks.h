// The functions of src/cpu/math.h against double: how many units in the last place each may be off, over which range.
#pragma once
#include <string_view>

#include "arrays.h"
#include "math_functions.h"

FASTATTN_MATH(baseline)
#if defined(FASTATTN_HAS_AVX2)
FASTATTN_MATH(avx2)
#endif
#if defined(FASTATTN_HAS_AVX512)
FASTATTN_MATH(avx512)
#endif
#if defined(FASTATTN_HAS_AVX512BF16)
FASTATTN_MATH(avx512bf16)
#endif

namespace checks {

inline const MathFunction* math_functions(std::string_view isa) {
#if defined(FASTATTN_HAS_AVX2)
  if (isa == "avx2") return avx2::math_functions;
#endif
#if defined(FASTATTN_HAS_AVX512)
  if (isa == "avx512") return avx512::math_functions;
#endif
#if defined(FASTATTN_HAS_AVX512BF16)
  if (isa == "avx512bf16") return avx512bf16::math_functions;
#endif
  return baseline::math_functions;
}

inline double exp_of(double x) { return std::exp(x); }
inline double exp2_of(double x) { return std::exp2(x); }
inline double log2_of(double x) { return std::log2(x); }
inline double tanh_of(double x) { return std::tanh(x); }
inline double reciprocal_of(double x) { return 1 / x; }
inline double log_of(double x) { return std::log(x); }
inline double log1p_of(double x) { return std::log1p(x); }
inline double expm1_of(double x) { return std::expm1(x); }
inline double full_sigmoid_of(double x) { return x < 0 ? std::exp(x) / (1 + std::exp(x)) : 1 / (1 + std::exp(-x)); }
inline double erf_of(double x) { return std::erf(x); }
inline double floor_of(double x) { return std::floor(x); }
inline double divisor_of(double x) { return 1 + std::exp(-x); }
inline double sigmoid_of(double x) { return 1 / (1 + std::exp2(-x)); }  // scores come in units of ln 2
inline double softplus_of(double x) {
  const double s = x * 0.693147180559945309417;
  return s > 0 ? s + std::log1p(std::exp(-s)) : std::log1p(std::exp(s));
}
// The nearest number of `bits` bits whose unit is 2^smallest at least, ties to even.
inline double rounded(double x, int bits, int smallest) {
  if (x == 0) return x;
  const int unit = std::max(std::ilogb(x) + 1 - bits, smallest);
  return std::ldexp(std::nearbyint(std::ldexp(x, -unit)), unit);
}
inline double bf16_of(double x) { return rounded(x, 8, -133); }
inline double f16_of(double x) {
  const double y = rounded(x, 11, -24);
  return std::fabs(y) > 65504 ? std::copysign(INFINITY, y) : y;
}

// A function over [low, high]: its result is within `ulps` units in the last place of the true value, and `error`.
struct MathCase {
  const char* name;
  double (*definition)(double);
  float low, high;
  double ulps, error = 0;
};

// A unit in the last place is at least 2^-24 of its number, so that a relative error e is at most e * 2^24 units. The
// parts are what math.h says of them, and half a unit for each operation after them: what this machine's instruction
// sets are off by (in brackets) is less, and other machines' estimates of 1 / x are other ones.
constexpr double kHalf = 0.5;
constexpr double kExp = 2e-7 * 0x1p24;         // 3.4
constexpr double kReciprocal = 3e-7 * 0x1p24;  // 5.0
constexpr MathCase kMathCases[] = {
    {"exp", exp_of, -87.33f, 88.72f, kExp},            // (2.8)
    {"exp", exp_of, -104.0f, -87.33f, kExp + kHalf},   // (1.8) rounded to a subnormal
    {"exp2_bounded", exp2_of, -126.0f, 127.0f, kExp},  // (2.2)
    {"exp2_clamped", exp2_of, -126.0f, 127.0f, kExp},  // (2.2)
    {"exp2_fraction", exp2_of, -0.5f, 0.5f, kExp},     // (2.1)
    {"exp2_bounded bf16", exp2_of, -126.0f, 127.0f, 2.6e-6 * 0x1p24 + 2 * kHalf},
    {"exp2_any", exp2_of, -125.0f, 127.99f, kExp + kHalf},
    {"log2_positive", log2_of, 0x1p-126f, 3.4028e38f, kHalf, 2e-7},
    // (3.8) m + 1, its reciprocal, u, the polynomial's last sum, u * p
    {"log2_positive", log2_of, 0.70711f, 1.41421f, kReciprocal + 4 * kHalf},
    {"tanh", tanh_of, -0.6f, 0.6f, 8e-8 * 0x1p24 + 2 * kHalf},  // (1.2) x * (z * p), x + that
    // (1.5) and (3.1) 1 - q with q = 2 / (e^2x + 1). The exponential counts by e^2x / (e^2x + 1) in q, and q by
    // q / |1 - q| in the result: 0.77 and 0.87 at 0.6, 0.23 and 2.9 at -0.6. Then the sum, the quotient and 1 - q.
    {"tanh", tanh_of, 0.6f, 50.0f, 0.87 * (0.77 * kExp + 2 * kHalf) + kHalf},
    {"tanh", tanh_of, -50.0f, -0.6f, 2.9 * (0.24 * kExp + 2 * kHalf) + kHalf},
    // the sum of f, f f / 2 and a polynomial: each 0.29 of the result at most but f, which is exact
    {"log", log_of, 0x1p-149f, 3.4028e38f, 2},
    {"log", log_of, 0.70711f, 1.41421f, 2},
    {"log1p", log1p_of, -0.99999f, 3.4028e38f, 3},  // log, its correction and their sum
    {"log1p", log1p_of, -0.5f, 1.0f, 3},
    // e^r - 1 by a polynomial within 3.4 units of e^r, 1.42 of which are 0.42 of it; no less cancels after it
    {"expm1", expm1_of, -87.0f, 88.72f, kExp + 2 * kHalf},
    {"expm1", expm1_of, -0.4f, 0.4f, kExp + 2 * kHalf},
    {"full sigmoid", full_sigmoid_of, -87.33f, 88.0f, kExp + 2 * kHalf},  // e, 1 + e, the quotient
    {"full sigmoid", full_sigmoid_of, -103.0f, -87.33f, kExp + 2 * kHalf},
    {"erf", erf_of, -6.0f, 6.0f, 3},
    {"erf", erf_of, -0x1p-126f, 0x1p-126f, 1},
    {"floor", floor_of, -3.4e38f, 3.4e38f, 0},
    {"floor", floor_of, -100.0f, 100.0f, 0},
    {"reciprocal", reciprocal_of, 0x1p-125f, 0x1p125f, kReciprocal},  // (1.8) by an estimate, (0.5) by a division
    {"sigmoid_divisor", divisor_of, -88.0f, 1e38f, kExp + kHalf},     // (2.7)
    // (1290) and (79) the polynomials, and in the exponent, up to 128, log2(e) and the product without a fused one,
    // each by 2^-24 of it and ln 2 times in the result
    {"sigmoid_divisor bf16", divisor_of, -87.0f, 1e38f, 7.5e-5 * 0x1p24 + 128},
    {"sigmoid_divisor f16", divisor_of, -87.0f, 1e38f, 2.6e-6 * 0x1p24 + 128},
    {"sigmoid", sigmoid_of, -123.0f, 1e38f, kExp + kHalf + kReciprocal},  // (3.3) odds, 1 + odds
    // (4.2) e, e + 2, u = e / (2 + e), 2 atanh(u) = 2u p with a polynomial within 1e-7, x ln 2, its sum with that
    {"softplus", softplus_of, -126.0f, 1e38f, kExp + kReciprocal + 1e-7 * 0x1p24 + 6 * kHalf},
    {"to bf16", bf16_of, -3.3e38f, 3.3e38f, 0},
    {"to f16", f16_of, -1e6f, 1e6f, 0},
    {"to f16", f16_of, -1e-4f, 1e-4f, 0},
};

// Arguments whose result is one number, or at least `result` and at most `most`.
struct MathValue {
  const char* name;
  float argument, result, most = result;
};
constexpr float kInf = INFINITY, kNaN = NAN, kSubnormal = 0x1p-140f, kMost = 3.4028235e38f;
constexpr MathValue kMathValues[] = {
    {"exp", 0, 1},
    {"exp", -0.0f, 1},
    {"exp", kSubnormal, 1},
    {"exp", 89.5f, kInf},
    {"exp", kMost, kInf},
    {"exp", kInf, kInf},
    {"exp", -104.5f, 0},
    {"exp", -kMost, 0},
    {"exp", -kInf, 0},
    {"exp", kNaN, kNaN},
    {"exp2_bounded", 0, 1},
    {"exp2_bounded", -kSubnormal, 1 - 0x1p-24f, 1},
    {"exp2_bounded", 127, 0x1p127f},
    {"exp2_bounded", -126, 0x1p-126f},
    {"exp2_bounded", -126.25f, 0, 0x1p-126f},
    {"exp2_bounded", -126.5f, 0},
    {"exp2_bounded", -kMost, 0},
    {"exp2_bounded", -kInf, 0},
    {"exp2_bounded", kNaN, kNaN},
    {"exp2_any", 0, 1},
    {"exp2_any", 127, 0x1p127f},
    {"exp2_any", 128, kInf},
    {"exp2_any", kMost, kInf},
    {"exp2_any", kInf, kInf},
    {"exp2_any", -125.75f, 0},
    {"exp2_any", -kInf, 0},
    {"exp2_any", kNaN, kNaN},
    {"exp2_clamped", 0, 1},
    {"exp2_clamped", 127, 0x1p127f},
    {"exp2_clamped", -126.5f, 0x1p-126f},
    {"exp2_clamped", -kInf, 0x1p-126f},
    {"exp2_clamped", kNaN, kNaN},
    {"log2_positive", 1, 0},
    {"log2_positive", 0x1p-126f, -126},
    {"log2_positive", 0x1p127f, 127},
    {"log2_positive", kSubnormal, -kInf, -126},
    {"log2_positive", 0, -kInf, -126},
    {"log2_positive", kNaN, kNaN},
    {"tanh", 0, 0},
    {"tanh", kSubnormal, kSubnormal},
    {"tanh", -kSubnormal, -kSubnormal},
    {"tanh", 20, 1},
    {"tanh", -20, -1},
    {"tanh", kInf, 1},
    {"tanh", -kInf, -1},
    {"tanh", kNaN, kNaN},
    {"log", 1, 0},
    {"log", 0, -kInf},
    {"log", -0.0f, -kInf},
    {"log", kInf, kInf},
    {"log", -kSubnormal, kNaN},
    {"log", -kInf, kNaN},
    {"log", kNaN, kNaN},
    {"log1p", kSubnormal, kSubnormal},
    {"log1p", -1, -kInf},
    {"log1p", -1.5f, kNaN},
    {"log1p", kInf, kInf},
    {"log1p", -kInf, kNaN},
    {"log1p", kNaN, kNaN},
    {"expm1", 0, 0},
    {"expm1", kSubnormal, kSubnormal},
    {"expm1", 90, kInf},
    {"expm1", kInf, kInf},
    {"expm1", -90, -1},
    {"expm1", -kMost, -1},
    {"expm1", -kInf, -1},
    {"expm1", kNaN, kNaN},
    {"full sigmoid", 0, 0.5f},
    {"full sigmoid", kInf, 1},
    {"full sigmoid", kMost, 1},
    {"full sigmoid", -kInf, 0},
    {"full sigmoid", -kMost, 0},
    {"full sigmoid", kNaN, kNaN},
    {"erf", 0, 0},
    {"erf", kInf, 1},
    {"erf", -kInf, -1},
    {"erf", kMost, 1},
    {"erf", kNaN, kNaN},
    {"floor", kInf, kInf},
    {"floor", -kInf, -kInf},
    {"floor", -kSubnormal, -1},
    {"floor", kNaN, kNaN},
    {"reciprocal", 0x1.8p125f, 0, 0x1p-125f},
    {"reciprocal", kMost, 0, 0x1p-125f},
    {"reciprocal", kNaN, kNaN},
    {"sigmoid_divisor", 0, 2},
    {"sigmoid_divisor", kInf, 1},
    {"sigmoid_divisor", -89.5f, kInf},
    {"sigmoid_divisor", -kInf, kInf},
    {"sigmoid_divisor", kNaN, kNaN},
    {"sigmoid_divisor bf16", kInf, 1},
    {"sigmoid_divisor bf16", -kInf, kInf},
    {"sigmoid_divisor bf16", kNaN, kNaN},
    {"sigmoid_divisor f16", kInf, 1},
    {"sigmoid_divisor f16", -kInf, kInf},
    {"sigmoid_divisor f16", kNaN, kNaN},
    {"sigmoid", kInf, 0.9999997f, 1.0000003f},
    {"sigmoid", -kInf, 0, 0x1p-124f},
    {"sigmoid", kNaN, kNaN},
    {"softplus", kInf, kInf},
    {"softplus", -kInf, 0},
    {"softplus", kNaN, kNaN},
    {"to bf16", kInf, kInf},
    {"to bf16", kMost, kInf},
    {"to bf16", -0.0f, 0},
    {"to bf16", kNaN, kNaN},
    {"to f16", kInf, kInf},
    {"to f16", 65519, 65504},
    {"to f16", 65520, kInf},
    {"to f16", kNaN, kNaN},
};

// The floats in order of their values, so that neighbours are neighbouring numbers.
inline int64_t ordinal_of(float x) {
  int32_t bits;
  memcpy(&bits, &x, 4);
  return bits < 0 ? -int64_t(bits & 0x7fffffff) : bits;
}
inline float float_of(int64_t ordinal) {
  const uint32_t bits = ordinal < 0 ? uint32_t(-ordinal) | 0x80000000u : uint32_t(ordinal);
  float x;
  return memcpy(&x, &bits, 4), x;
}
// Between the floats around x; of the subnormals below the normal ones.
inline double unit_of(double x) { return std::ldexp(1, std::max(x == 0 ? -149 : std::ilogb(x) - 23, -149)); }

inline Array applied(const MathFunction& f, const Array& x) {
  Array y(DType::f32, {x.count()});
  f.run((const float*)x.tensor.data, (float*)y.tensor.data, x.count());
  return y;
}

inline void check_math(const char* isa, Report& report) {
  constexpr int64_t kSamples = 1 << 14;
  for (const MathFunction* f = math_functions(isa); f->name; f++) {
    for (const MathCase& c : kMathCases) {
      if (std::string_view(f->name) != c.name) continue;
      Array x(DType::f32, {2 * kSamples});
      const int64_t low = ordinal_of(c.low), high = ordinal_of(c.high);
      for (int64_t i = 0; i < kSamples; i++) {
        const double part = double(i) / (kSamples - 1);
        x.set(i, float_of(low + int64_t(part * double(high - low))));  // evenly among the floats
        x.set(kSamples + i, c.low + part * (double(c.high) - c.low));  // evenly on the line
      }
      report.compare(
          f->name, applied(*f, x), [&](int64_t i) { return c.definition(x[i]); },
          [&](int64_t i) { return c.ulps * unit_of(c.definition(x[i])) + c.error; });
    }
    for (const MathValue& v : kMathValues) {
      if (std::string_view(f->name) != v.name) continue;
      const double y = applied(*f, Array::full(DType::f32, {kMathLanes}, v.argument))[kMathLanes - 1];
      report.checked++;
      if (std::isnan(v.result) ? std::isnan(y) : v.result <= y && y <= v.most) continue;
      report.failed++;
      std::printf("FAILED %s: %s(%g) is %.9g, not %.9g\n", isa, v.name, v.argument, y, v.result);
    }
  }
}

}  // namespace checks
