// The logarithm of a row's sum of exponentials in three ways, for benchmarks/cases/row_sums.py: with the maximum so
// far, as the kernels here have it; by mantissa and exponent, without one (the "two-pass softmax", arXiv 2001.04438);
// and after a pass of its own for the maximum. Each lane has a sum of its own; a block is kN vectors.
#include <cmath>

#include "cpu/math.h"

using namespace fastattn::FASTATTN_ISA;

constexpr int kN = 8;
constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;

// log of sum_i mantissa_i 2^exponent_i over the lanes
static float log_sum(vf mantissa, vf exponent) {
  const float top = reduce_max(exponent);
  return (std::log2(reduce_add(mantissa * exp2_bounded(exponent - splat(top)))) + top) * kLn2;
}

template <class Row>
static void each_row(const float* x, float* out, int64_t rows, int64_t width, const Row& row) {
  for (int64_t i = 0; i < rows; i++) out[i] = row(x + i * width);
}

// width is a multiple of kN * W in all three
extern "C" void online(const float* x, float* out, int64_t rows, int64_t width) {
  each_row(x, out, rows, width, [=](const float* row) {
    vf largest = splat(-1e30f), sum = splat(0.0f);
    for (int64_t j = 0; j < width; j += kN * W) {
      vf y[kN];
      FASTATTN_EACH(k, kN) y[k] = load(row + j + k * W) * kLog2e;
      vf next = largest;
      FASTATTN_EACH(k, kN) next = vmax(next, y[k]);
      sum *= exp2_bounded(largest - next);
      FASTATTN_EACH(k, kN) sum += exp2_bounded(y[k] - next);
      largest = next;
    }
    return log_sum(sum, largest);
  });
}

extern "C" void two_pass(const float* x, float* out, int64_t rows, int64_t width) {
  const float magic = 12582912.0f;  // adding it rounds to an integer
  each_row(x, out, rows, width, [=](const float* row) {
    vf exponent = splat(-1e30f), mantissa = splat(0.0f);
    for (int64_t j = 0; j < width; j += kN * W) {
      vf n[kN], p[kN];
      FASTATTN_EACH(k, kN) p[k] = load(row + j + k * W) * kLog2e;
      FASTATTN_EACH(k, kN) n[k] = (p[k] + magic) - magic;
      FASTATTN_EACH(k, kN) p[k] = exp2_fraction(p[k] - n[k]);
      vf next = exponent;
      FASTATTN_EACH(k, kN) next = vmax(next, n[k]);
      mantissa = scale_by_rounded(mantissa, at_least(exponent - next, -127.0f) + kRound);
      FASTATTN_EACH(k, kN) mantissa += scale_by_rounded(p[k], at_least(n[k] - next, -127.0f) + kRound);
      exponent = next;
    }
    return log_sum(mantissa, exponent);
  });
}

extern "C" void maximum_first(const float* x, float* out, int64_t rows, int64_t width) {
  each_row(x, out, rows, width, [=](const float* row) {
    vf largest = splat(-1e30f), sum = splat(0.0f);
    for (int64_t j = 0; j < width; j += W) largest = vmax(largest, load(row + j));
    largest = splat(reduce_max(largest) * kLog2e);
    for (int64_t j = 0; j < width; j += kN * W)
      FASTATTN_EACH(k, kN) sum += exp2_bounded(load(row + j + k * W) * kLog2e - largest);
    return log_sum(sum, largest);
  });
}
