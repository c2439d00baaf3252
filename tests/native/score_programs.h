// Score programs, written register by register, and what each of their steps does by its definition.
#pragma once
#include <cmath>
#include <cstring>
#include <limits>
#include <string_view>
#include <vector>

#include "../../src/cpu/score_program.h"
#include "arrays.h"

namespace checks {

inline int32_t bits_of(float x) {
  int32_t i;
  return memcpy(&i, &x, 4), i;
}
inline float float_of_bits(int32_t i) {
  float x;
  return memcpy(&x, &i, 4), x;
}

inline int32_t op_code(std::string_view name) {
  for (int32_t i = 0; i < int32_t(ScoreOp::count); i++)
    if (kScoreOps[i].name == name) return i;
  std::printf("no operation %s\n", std::string(name).c_str());
  std::abort();
}

// Scalar registers kScalars in all: 0 to 2 batch, head and row, 3 on constants, then results.
class Program {
 public:
  static constexpr int kScalars = 24, kProducts = kScalars, kKeys = kScalars + 1, kConstants = 12;
  std::vector<ScoreStep> steps;
  std::vector<ScoreLoad> loads;
  int score = kProducts, slope = -1;

  int constant(int32_t bits) {
    constants.push_back(bits);
    return kProgramFirstConstant + int(constants.size()) - 1;
  }
  int constant(float x) { return constant(bits_of(x)); }
  // A step whose result has a register of its own: of one value a row if all operands are and the load is not of a row.
  int op(std::string_view name, int a, int b = -1, int c = -1) {
    const int32_t code = op_code(name);
    const bool scalar = a < kScalars && b < kScalars && c < kScalars && !kScoreOps[code].loads_row;
    const int to = scalar ? scalar_ + scalars_used++ : kScalars + vectors_used++;
    steps.push_back({code, to, {a, b, c}});
    return to;
  }
  Array words() const {
    std::vector<int32_t> w = {1,
                              int32_t(steps.size()),
                              kScalars,
                              vectors_used,
                              score,
                              slope,
                              int32_t(loads.size()),
                              int32_t(constants.size())};
    w.insert(w.end(), constants.begin(), constants.end());
    for (const ScoreLoad& l : loads) w.insert(w.end(), {l.index, l.derivative});
    for (const ScoreStep& s : steps) w.insert(w.end(), {s.op, s.dst, s.operands[0], s.operands[1], s.operands[2]});
    Array a(DType::i32, {int64_t(w.size())});
    for (size_t i = 0; i < w.size(); i++) a.set(int64_t(i), w[i]);
    return a;
  }
  // Registers of the program at one element at its end; visit(step, its result) of each step.
  template <class Visit>
  std::vector<int32_t> run(float product, int32_t batch, int32_t head, int32_t row, int32_t key, const Array& tables,
                           const Array& indices, const Visit& visit) const {
    std::vector<int32_t> r(size_t(kScalars + vectors_used));
    r[0] = batch, r[1] = head, r[2] = row, r[kProducts] = bits_of(product), r[kKeys] = key;
    for (size_t i = 0; i < constants.size(); i++) r[kProgramFirstConstant + i] = constants[i];
    for (const ScoreStep& s : steps) {
      const auto operand = [&](int k) { return s.operands[k] < 0 ? 0 : r[s.operands[k]]; };
      r[s.dst] = result(s.op, operand(0), operand(1), operand(2), key, tables, indices);
      visit(s, r[s.dst]);
    }
    return r;
  }

  std::vector<int32_t> constants;
  int scalars_used = 0, vectors_used = 2;

 private:
  static constexpr int scalar_ = kProgramFirstConstant + kConstants;

  // By the definitions of float32 and int32, its functions rounded from double.
  static int32_t result(int32_t op, int32_t a, int32_t b, int32_t c, int32_t key, const Array& tables,
                        const Array& indices) {
    const std::string_view name = kScoreOps[op].name;
    const float x = float_of_bits(a), y = float_of_bits(b);
    const int64_t m = a, n = b;
    const auto f = [](double value) { return bits_of(float(value)); };
    const auto mask = [](bool holds) { return holds ? -1 : 0; };
    const auto wrapped = [](int64_t value) { return int32_t(uint32_t(value)); };
    const auto clamped = [&](int64_t i, const Array& t) { return std::min(std::max<int64_t>(i, 0), t.count() - 1); };
    const bool nan = x != x || y != y;
    const float nothing = std::numeric_limits<float>::quiet_NaN();
    if (name == "add_f") return bits_of(x + y);
    if (name == "sub_f") return bits_of(x - y);
    if (name == "mul_f") return bits_of(x * y);
    if (name == "div_f") return bits_of(x / y);
    if (name == "neg_f") return bits_of(-x);
    if (name == "abs_f") return bits_of(std::fabs(x));
    if (name == "min_f") return bits_of(nan ? nothing : std::fmin(x, y));
    if (name == "max_f") return bits_of(nan ? nothing : std::fmax(x, y));
    if (name == "sqrt_f") return bits_of(std::sqrt(x));
    if (name == "exp_f") return f(std::exp(double(x)));
    if (name == "log_f") return f(std::log(double(x)));
    if (name == "log1p_f") return f(std::log1p(double(x)));
    if (name == "tanh_f") return f(std::tanh(double(x)));
    if (name == "sigmoid_f") return f(1 / (1 + std::exp(-double(x))));
    if (name == "erf_f") return f(std::erf(double(x)));
    if (name == "sin_f") return f(std::sin(double(x)));
    if (name == "cos_f") return f(std::cos(double(x)));
    if (name == "floor_f") return bits_of(std::floor(x));
    if (name == "sign_f") return bits_of(x > 0 ? 1.0f : x < 0 ? -1.0f : 0.0f);
    if (name == "pow_f") return f(std::pow(double(x), double(y)));
    if (name == "expm1_f") return f(std::expm1(double(x)));
    if (name == "lt_f") return mask(x < y);
    if (name == "le_f") return mask(x <= y);
    if (name == "eq_f") return mask(x == y);
    if (name == "ne_f") return mask(x != y);
    if (name == "lt_i") return mask(a < b);
    if (name == "le_i") return mask(a <= b);
    if (name == "eq_i") return mask(a == b);
    if (name == "ne_i") return mask(a != b);
    if (name == "add_i") return wrapped(m + n);
    if (name == "sub_i") return wrapped(m - n);
    if (name == "mul_i") return wrapped(m * n);
    if (name == "neg_i") return wrapped(-m);
    if (name == "abs_i") return wrapped(std::abs(m));
    if (name == "min_i") return std::min(a, b);
    if (name == "max_i") return std::max(a, b);
    const int64_t floored = n == 0 ? 0 : m / n - (m % n != 0 && (m % n < 0) != (n < 0));
    if (name == "floordiv_i") return wrapped(floored);
    if (name == "mod_i") return n == 0 ? 0 : wrapped(m - floored * n);
    if (name == "shl_i") return int32_t(uint32_t(a) << (b & 31));
    if (name == "shr_i") return a >> (b & 31);
    if (name == "and_i") return a & b;
    if (name == "or_i") return a | b;
    if (name == "xor_i") return a ^ b;
    if (name == "not_i") return ~a;
    if (name == "select") return a ? b : c;
    if (name == "i2f") return bits_of(float(a));
    if (name == "f2i") return x != x ? 0 : x >= 0x1p31f ? INT32_MAX : x < -0x1p31f ? INT32_MIN : int32_t(x);
    if (name == "b2i") return a & 1;
    if (name == "load_f") return bits_of(float(tables[clamped(m, tables)]));
    if (name == "load_i") return int32_t(indices[clamped(m, indices)]);
    if (name == "load_row_f") return bits_of(float(tables[clamped(m + key, tables)]));
    if (name == "load_row_i") return int32_t(indices[clamped(m + key, indices)]);
    std::printf("no definition of %s\n", kScoreOps[op].name);
    std::abort();
  }
};

}  // namespace checks
