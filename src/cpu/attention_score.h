// How a scaled product becomes an attention weight: one functor a score, in the order of
// fastattn/ops/attention/scores.py, and after them what is made of a program's own weights.
//
// M is the arithmetic of a vector (or of one float): M::V, M::kRound and static exp2_bounded, exp2_fraction,
// scale_by_rounded, at_least, at_most, abs, select, reciprocal. Products come as x with c, s = x * c * ln(2) before the
// bias.
#pragma once
#include "refuse.h"

namespace fastattn {

// What a row or its sequence adds to a score.
struct ScoreRow {
  float shift = 0;     // softmax: subtracted from x * c; softplus: added to it
  float factor = 1;    // sigmoid: 2^(fraction of -bias * log2(e)); softplus: 1 / row sum, when known
  float exponent = 0;  // sigmoid: the integer part
};

template <class M>
struct SoftmaxScore {
  using V = typename M::V;
  template <class N>
  using With = SoftmaxScore<N>;
  static constexpr int kCode = 0;
  static constexpr bool kMaximum = true;     // the row maximum is subtracted before the exponential
  static constexpr bool kNormalised = true;  // weights are divided by their row sum
  static constexpr bool kSlope = false;      // the derivative is not the weight itself
  static constexpr bool kLimit = false;      // far below 0 the weight is the exponential: a row sum may underflow
  static constexpr bool kGiven = false;      // the weight is what a program gives: of any sign, and so is a row sum

  static ScoreRow constants(double) { return {}; }  // a constant bias cancels; only the log-sum-exp has it
  static inline __attribute__((always_inline)) V weight(V x, float c, const ScoreRow& row) {
    return M::exp2_bounded(x * c - row.shift);
  }
  static inline __attribute__((always_inline)) V weight_and_slope(V x, float c, const ScoreRow& row, V* slope) {
    return *slope = weight(x, c, row);
  }
};

template <class M>
struct SigmoidScore {
  using V = typename M::V;
  template <class N>
  using With = SigmoidScore<N>;
  static constexpr int kCode = 1;
  static constexpr bool kMaximum = false;
  static constexpr bool kNormalised = false;
  static constexpr bool kSlope = true;
  static constexpr bool kLimit = false;
  static constexpr bool kGiven = false;

  // exp(-bias) = factor * 2^exponent: a large bias costs no bits of x.
  static ScoreRow constants(double bias) {
    double e = -bias * 1.4426950408889634;
    e = e > 1e6 ? 1e6 : e < -1e6 ? -1e6 : e;
    ScoreRow row;
    row.exponent = (float)__builtin_nearbyint(e);
    row.factor = (float)__builtin_exp2(e - __builtin_nearbyint(e));
    return row;
  }
  // exp(-(s + bias)), kept between 2^-124.5 and 2^124.5.
  static inline __attribute__((always_inline)) V odds_against(V x, float c, const ScoreRow& row) {
    const V y = M::at_most(M::at_least(x * -c, -124.0f - row.exponent), 124.0f - row.exponent);
    const float round = M::kRound + row.exponent;
    const V t = y + round;
    return M::scale_by_rounded(M::exp2_fraction(y - (t - round)) * row.factor, t);
  }
  static inline __attribute__((always_inline)) V weight(V x, float c, const ScoreRow& row) {
    return M::reciprocal(1.0f + odds_against(x, c, row));
  }
  static inline __attribute__((always_inline)) V weight_and_slope(V x, float c, const ScoreRow& row, V* slope) {
    const V odds = odds_against(x, c, row);
    const V w = M::reciprocal(1.0f + odds);
    *slope = odds * w * w;
    return w;
  }
};

template <class M>
struct SoftplusScore {
  using V = typename M::V;
  template <class N>
  using With = SoftplusScore<N>;
  static constexpr int kCode = 2;
  static constexpr bool kMaximum = false;
  static constexpr bool kNormalised = true;
  static constexpr bool kSlope = true;
  static constexpr bool kLimit = true;
  static constexpr bool kGiven = false;

  static ScoreRow constants(double bias) {
    ScoreRow row;
    row.shift = (float)(bias * 1.4426950408889634);
    return row;
  }
  // max(s, 0) + log(1 + e), log(1 + e) = 2 atanh(u) with u = e / (2 + e): accurate for small e too.
  static inline __attribute__((always_inline)) V softplus(V x, V e) {
    const V u = e * M::reciprocal(e + 2.0f);
    const V z = u * u;
    V p = z * 1.400601048e-1f + 1.400089945e-1f;
    p = p * z + 2.001076380e-1f;
    p = p * z + 3.333320814e-1f;
    return M::at_least(x, 0.0f) * 0.69314718056f + (u + u) * (p * z + 1.0f);
  }
  static inline __attribute__((always_inline)) V weight(V x, float c, const ScoreRow& row) {
    x = x * c + row.shift;
    return softplus(x, M::exp2_bounded(-M::abs(x)));
  }
  static inline __attribute__((always_inline)) V weight_and_slope(V x, float c, const ScoreRow& row, V* slope) {
    x = x * c + row.shift;
    const V e = M::exp2_bounded(-M::abs(x));
    *slope = M::select_negative(x, e, V{} + 1.0f) * M::reciprocal(1.0f + e) * row.factor;
    return softplus(x, e) * row.factor;
  }
};

// Scores are a program's, and weights as they are.
template <class M>
struct GivenScore {
  using V = typename M::V;
  template <class N>
  using With = GivenScore<N>;
  static constexpr int kCode = 3;
  static constexpr bool kMaximum = false;
  static constexpr bool kNormalised = false;
  static constexpr bool kSlope = true;
  static constexpr bool kLimit = false;
  static constexpr bool kGiven = true;

  static ScoreRow constants(double) { return {}; }
  static inline __attribute__((always_inline)) V weight(V x, float, const ScoreRow&) { return x; }
  static inline __attribute__((always_inline)) V weight_and_slope(V x, float, const ScoreRow& row, V* slope) {
    *slope = V{} + row.factor;
    return x * row.factor;
  }
};

// The same, divided by their row sum.
template <class M>
struct SummedScore : GivenScore<M> {
  template <class N>
  using With = SummedScore<N>;
  static constexpr int kCode = 4;
  static constexpr bool kNormalised = true;
};

// A row sum of given weights that counts as 0: its reciprocal is no float32.
static inline __attribute__((always_inline)) bool is_no_sum(double sum) { return __builtin_fabs(sum) < 0x1p-126; }

// visit(code, f): f(score) of the score with this code.
template <class... Score>
struct ScoreList {
  static constexpr int kCount = sizeof...(Score);  // codes are 0 to kCount - 1

  static bool normalised(int code) {
    return fact(code, [](auto score) { return decltype(score)::kNormalised; });
  }
  static bool given(int code) {
    return fact(code, [](auto score) { return decltype(score)::kGiven; });
  }
  template <class F>
  static bool fact(int code, const F& f) {
    bool result = false;
    visit(code, [&](auto score) { result = f(score); });
    return result;
  }
  template <class F>
  static void visit(int code, const F& f) {
    if (!((code == Score::kCode && (f(Score{}), true)) || ...)) cpu::unknown_code("score", code);
  }
};
template <class M>
using Scores = ScoreList<SoftmaxScore<M>, SigmoidScore<M>, SoftplusScore<M>, GivenScore<M>, SummedScore<M>>;

// For what is known of a score without a weight of it.
struct NoArithmetic {
  using V = float;
};
using AnyScores = Scores<NoArithmetic>;

}  // namespace fastattn
