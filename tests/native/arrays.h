// Arrays of any dtype, filled with random or impossible values, and their comparison within bounds.
//
// Each is a heap block of its exact size, so that AddressSanitizer sees what is read or written outside of it; the gaps
// between rows are closed to it too, and without it they must keep what they hold.
#pragma once
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <utility>
#include <vector>

#include "../../src/cpu/dispatch.h"
#include "../../src/cpu/scratch.h"
#if defined(FASTATTN_ASAN)
#include <sanitizer/asan_interface.h>
#endif

namespace checks {
using namespace fastattn;

inline double unit(DType dtype) {  // of a result that is rounded to it
  return dtype == DType::bf16 ? 0x1p-8 : dtype == DType::f16 ? 0x1p-11 : 0x1p-24;
}

// How a tensor of four dimensions lies in memory: as torch makes it; with elements of no use after each row and head;
// with rows outside of heads, as a projection gives them.
enum class Layout { contiguous, padded, heads_inside };

class Array {
 public:
  static inline uint64_t random_state = 1;
  Tensor tensor;

  Array() {}
  // Of impossible values: NaN, or -1 for integers.
  Array(DType dtype, std::initializer_list<int64_t> shape, Layout layout = Layout::contiguous) : layout_(layout) {
    tensor.dtype = dtype;
    std::copy_backward(shape.begin(), shape.end(), tensor.size + 4);
    const int64_t pad = layout == Layout::padded ? 3 : 0;
    int64_t span = 1;
    for (int at : layout == Layout::heads_inside ? std::array{3, 1, 2, 0} : std::array{3, 2, 1, 0}) {
      tensor.stride[at] = at >= 4 - (int)shape.size() ? span : 0;
      span = span * tensor.size[at] + pad;
    }
    count_ = tensor.size[0] * tensor.size[1] * tensor.size[2] * tensor.size[3];
    allocate();
  }
  Array(const Array& other) : tensor(other.tensor), layout_(other.layout_), count_(other.count_), bytes_(other.bytes_) {
    allocate();
    for (int64_t i = 0; i < count_; i++) memcpy(at(i), other.at(i), size_t(width()));
  }
  Array(Array&& other) noexcept { swap(other); }
  Array& operator=(Array other) {
    swap(other);
    return *this;
  }
  ~Array() {
#if defined(FASTATTN_ASAN)
    __asan_unpoison_memory_region(memory_, bytes_);
#endif
    delete[] memory_;
  }

  static Array random(DType dtype, std::initializer_list<int64_t> shape, double low = -1, double high = 1,
                      Layout layout = Layout::contiguous) {
    Array a(dtype, shape, layout);
    for (int64_t i = 0; i < a.count_; i++) {
      random_state = random_state * 6364136223846793005u + 1442695040888963407u;
      const double x = low + (high - low) * double(random_state >> 40) * 0x1p-24;
      a.set(i, dtype == DType::f32 || dtype == DType::f64 || a.width() == 2 ? x : std::floor(x));
    }
    return a;
  }
  static Array full(DType dtype, std::initializer_list<int64_t> shape, double value) {
    Array a(dtype, shape);
    for (int64_t i = 0; i < a.count_; i++) a.set(i, value);
    return a;
  }
  static Array of(DType dtype, std::initializer_list<int64_t> values) {
    Array a(dtype, {(int64_t)values.size()});
    int64_t i = 0;
    for (const int64_t x : values) a.set(i++, (double)x);
    return a;
  }

  int64_t count() const { return count_; }
  std::vector<double> values() const {
    std::vector<double> v(static_cast<size_t>(count_));
    for (int64_t i = 0; i < count_; i++) v[i] = (*this)[i];
    return v;
  }
  operator Tensor() { return tensor; }
  // Columns [first, first + count) of every row.
  Tensor columns(int64_t first, int64_t count) {
    Tensor t = tensor;
    t.data = (uint8_t*)t.data + first * width();
    t.size[3] = count;
    return t;
  }
  // Whether nothing was written between the elements.
  bool gaps_kept() const {
#if !defined(FASTATTN_ASAN)  // which does not let them be read either
    const std::vector<bool> used = elements();
    for (size_t i = 0; i < bytes_; i++)
      if (!used[i] && memory_[i] != 0xff) return false;
#endif
    return true;
  }

  double operator[](int64_t i) const {
    const uint8_t* p = at(i);
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
    uint8_t* p = at(i);
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
      default: {  // an infinity, of a normal half's size, or smaller and then cut off
        if (std::isinf(value)) return put(uint16_t(value < 0 ? 0xfc00 : 0x7c00));
        const int e = value == 0 ? -15 : std::ilogb(value) < -14 ? -15 : std::ilogb(value);
        const int m = e == -15 ? int(std::nearbyint(std::fabs(value) * 0x1p24))
                               : int(std::nearbyint(std::ldexp(std::fabs(value), 10 - e))) - 1024;
        return put(uint16_t((value < 0 ? 0x8000 : 0) + ((e + 15) << 10) + m));
      }
    }
  }

 private:
  static constexpr int64_t kLead = 8;  // bytes before a padded array, for an address of no vector's alignment
  Layout layout_ = Layout::contiguous;
  int64_t count_ = 0;
  size_t bytes_ = 0;
  uint8_t* memory_ = nullptr;

  void swap(Array& other) {
    std::swap(tensor, other.tensor), std::swap(layout_, other.layout_), std::swap(count_, other.count_);
    std::swap(bytes_, other.bytes_), std::swap(memory_, other.memory_);
  }
  int64_t width() const {
    const DType d = tensor.dtype;
    return d == DType::u8 ? 1 : d == DType::bf16 || d == DType::f16 ? 2 : d == DType::f64 || d == DType::i64 ? 8 : 4;
  }
  int64_t offset(int64_t i) const {
    int64_t offset = 0;
    for (int d = 3; d >= 0; i /= tensor.size[d--]) offset += i % tensor.size[d] * tensor.stride[d];
    return offset * width();
  }
  uint8_t* at(int64_t i) const { return (uint8_t*)tensor.data + offset(i); }

  void allocate() {
    tensor.data = nullptr;  // of no elements, as torch has it
    if (!count_) return;
    const int64_t lead = layout_ == Layout::padded ? kLead : 0;
    bytes_ = size_t(lead + offset(count_ - 1) + width());
    memory_ = new uint8_t[bytes_];
    memset(memory_, 0xff, bytes_);
    tensor.data = memory_ + lead;
#if defined(FASTATTN_ASAN)
    const std::vector<bool> used = elements();
    for (size_t begin = 0, end; begin < bytes_; begin = end) {
      for (end = begin; end < bytes_ && used[end] == used[begin];) end++;
      if (!used[begin]) __asan_poison_memory_region(memory_ + begin, end - begin);
    }
#endif
  }
  // Which bytes are of some element.
  std::vector<bool> elements() const {
    std::vector<bool> used(bytes_);
    for (int64_t i = 0; i < count_; i++) std::fill_n(used.begin() + (at(i) - memory_), width(), true);
    return used;
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
    if (!got.gaps_kept()) {
      failed++;
      std::printf("FAILED %s: %s, written between its rows\n", isa, what);
    }
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
