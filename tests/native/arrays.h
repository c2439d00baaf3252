// Arrays of any dtype, filled with random or impossible values, and their comparison within bounds.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <vector>

#include "../../src/cpu/dispatch.h"

namespace checks {
using namespace fastattn;

inline double unit(DType dtype) {  // of a result that is rounded to it
  return dtype == DType::bf16 ? 0x1p-8 : dtype == DType::f16 ? 0x1p-11 : 0x1p-24;
}

class Array {
 public:
  Tensor tensor;  // contiguous

  Array() {}
  // Of impossible values: NaN, or -1 for integers.
  Array(DType dtype, std::initializer_list<int64_t> shape) {
    tensor.dtype = dtype;
    int64_t count = 1, at = 4;
    for (auto size = shape.end(); size != shape.begin();) {
      tensor.size[--at] = *--size;
      tensor.stride[at] = count;
      count *= *size;
    }
    memory_.assign(size_t(count * width()), 0xff);
    count_ = count;
  }
  static Array random(DType dtype, std::initializer_list<int64_t> shape, double low = -1, double high = 1) {
    static uint64_t state = 1;
    Array a(dtype, shape);
    for (int64_t i = 0; i < a.count_; i++) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      const double x = low + (high - low) * double(state >> 40) * 0x1p-24;
      a.set(i, dtype == DType::f32 || a.width() == 2 ? x : std::floor(x));
    }
    return a;
  }
  static Array full(DType dtype, std::initializer_list<int64_t> shape, double value) {
    Array a(dtype, shape);
    for (int64_t i = 0; i < a.count_; i++) a.set(i, value);
    return a;
  }

  int64_t count() const { return count_; }
  std::vector<double> values() const {
    std::vector<double> v(static_cast<size_t>(count_));
    for (int64_t i = 0; i < count_; i++) v[i] = (*this)[i];
    return v;
  }
  operator Tensor() { return tensor.data = count_ ? memory_.data() : nullptr, tensor; }

  double operator[](int64_t i) const {
    const uint8_t* p = memory_.data() + i * width();
    const auto as = [&](auto x) { return memcpy(&x, p, sizeof x), x; };
    switch (tensor.dtype) {
      case DType::f32:
        return as(0.0f);
      case DType::f64:
        return as(0.0);
      case DType::i32:
        return as(int32_t(0));
      case DType::i64:
        return double(as(int64_t(0)));
      case DType::u8:
        return *p;
      case DType::bf16: {
        const uint32_t bits = uint32_t(as(uint16_t(0))) << 16;
        float x;
        return memcpy(&x, &bits, 4), x;
      }
      default: {
        const int h = as(uint16_t(0)), exponent = h >> 10 & 31, fraction = h & 1023;
        const double x = exponent == 31 ? (fraction ? NAN : INFINITY)
                         : exponent     ? std::ldexp(1024 + fraction, exponent - 25)
                                        : std::ldexp(fraction, -24);
        return h & 0x8000 ? -x : x;
      }
    }
  }
  void set(int64_t i, double value) {
    uint8_t* p = memory_.data() + i * width();
    const auto put = [&](auto x) { memcpy(p, &x, sizeof x); };
    switch (tensor.dtype) {
      case DType::f32:
        return put(float(value));
      case DType::f64:
        return put(value);
      case DType::i32:
        return put(int32_t(value));
      case DType::i64:
        return put(int64_t(value));
      case DType::u8:
        return put(uint8_t(value));
      case DType::bf16: {
        const float x = float(value);
        uint32_t bits;
        memcpy(&bits, &x, 4);
        return put(uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16));
      }
      default: {  // of a normal half's size, or smaller and then cut off
        const int e = value == 0 ? -15 : std::ilogb(value) < -14 ? -15 : std::ilogb(value);
        const int m = e == -15 ? int(std::nearbyint(std::fabs(value) * 0x1p24))
                               : int(std::nearbyint(std::ldexp(std::fabs(value), 10 - e))) - 1024;
        return put(uint16_t((value < 0 ? 0x8000 : 0) + ((e + 15) << 10) + m));
      }
    }
  }

 private:
  std::vector<uint8_t> memory_;
  int64_t count_ = 0;
  int64_t width() const {
    const DType d = tensor.dtype;
    return d == DType::u8 ? 1 : d == DType::bf16 || d == DType::f16 ? 2 : d == DType::f64 || d == DType::i64 ? 8 : 4;
  }
};

struct Report {
  const char* isa = "";
  int checked = 0, failed = 0;
  double nearest = 0;  // the largest share of a bound that an error took

  // `got` against what it should be, each element within its bound; an equal infinity is fine.
  template <class Expected, class Bound>
  void compare(const char* what, const Array& got, const Expected& expected, const Bound& bound) {
    checked++;
    for (int64_t i = 0; i < got.count(); i++) {
      const double x = got[i], y = expected(i), allowed = bound(i), error = std::fabs(x - y);
      if (x == y) continue;
      if (error <= allowed) {
        nearest = std::fmax(nearest, error / allowed);
        continue;
      }
      failed++;
      std::printf("FAILED %s: %s, element %lld: %.9g, not %.9g within %.2g\n", isa, what, (long long)i, x, y, allowed);
      return;
    }
  }
};

}  // namespace checks
