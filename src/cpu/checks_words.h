// The vocabulary in which checks of parameters are written: see checks.h.
#pragma once
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>

#include "limits.h"
#include "params.h"

namespace fastattn {

struct Size {
  int64_t of[4];
};

// The checks of one kernel, by name. Tensors are four-dimensional; missing leading dimensions have size 1.
class Checks {
 public:
  explicit Checks(const char* kernel) : kernel_(kernel), backward_(ends_with(kernel, "_backward")) {}

  bool backward() const { return backward_; }

  void require(bool holds, const char* field, const char* rule) const {
    if (!holds) refuse(field, rule);
  }
  void in(const char* field, int64_t value, int64_t low, int64_t high) const {
    if (value < low || value > high)
      refuse(field,
             "must lie in [" + std::to_string(low) + ", " + std::to_string(high) + "], given " + std::to_string(value));
  }
  // A tensor of this size and dtype with a contiguous last dimension. A tensor without elements may be absent.
  void tensor(const char* field, const Tensor& t, const Size& size, DType dtype) const {
    strided(field, t, size, dtype);
    side_by_side(field, t);
  }
  // The same, of any strides.
  void strided(const char* field, const Tensor& t, const Size& size, DType dtype) const {
    bool same = true, empty = false;
    for (int i = 0; i < 4; i++) same &= t.size[i] == size.of[i], empty |= size.of[i] == 0;
    if (!t.data && !empty) refuse(field, "is needed");
    if (!same && t.data) refuse(field, "must have sizes " + text(size.of) + ", given " + text(t.size));
    if (t.dtype != dtype && t.data) refuse(field, "has another dtype than the kernel takes");
  }
  static bool empty(const Tensor& t) { return !(t.size[0] && t.size[1] && t.size[2] && t.size[3]); }
  void side_by_side(const char* field, const Tensor& t) const {
    if (t.stride[3] != 1 && t.size[3] > 1 && !empty(t))
      refuse(field, "must have the elements of its last dimension side by side");
  }
  // The same, contiguous.
  void contiguous(const char* field, const Tensor& t, const Size& size, DType dtype) const {
    strided(field, t, size, dtype);
    if (empty(t)) return;  // nothing is read, whatever the strides
    int64_t stride = 1;
    for (int i = 3; i >= 0; i--) {
      if (t.size[i] > 1 && t.stride[i] != stride) refuse(field, "must be contiguous");
      stride *= t.size[i];
    }
  }
  void like(const char* field, const Tensor& t, const Tensor& other) const {
    tensor(field, t, size_of(other), other.dtype);
  }
  // float32, bfloat16 or float16 with a contiguous last dimension.
  void floating(const char* field, const Tensor& t) const {
    number(field, t);
    tensor(field, t, size_of(t), t.dtype);
  }
  // The same, of any strides.
  void number(const char* field, const Tensor& t) const {
    if (t.dtype != DType::f32 && t.dtype != DType::bf16 && t.dtype != DType::f16)
      refuse(field, "must be float32, bfloat16 or float16");
    strided(field, t, size_of(t), t.dtype);
  }
  // `count` int32 or int64 of any stride.
  void integers(const char* field, const Tensor& t, int64_t count) const {
    strided(field, t, {1, 1, 1, count}, t.dtype);
    require(t.dtype == DType::i32 || t.dtype == DType::i64, field, "must be int32 or int64");
  }

  // An element of an index tensor, which has the public name of its tensor.
  static void index(const char* name, int64_t position, int64_t value, int64_t low, int64_t high) {
    if (value < low || value > high)
      throw std::invalid_argument("fastattn: " + std::string(name) + " must lie in [" + std::to_string(low) + ", " +
                                  std::to_string(high) + "], given " + std::to_string(value) + " at position " +
                                  std::to_string(position));
  }

  static Size size_of(const Tensor& t) { return {t.size[0], t.size[1], t.size[2], t.size[3]}; }

 private:
  const char* kernel_;
  bool backward_;

  static bool ends_with(std::string_view text, std::string_view end) {
    return text.size() >= end.size() && text.substr(text.size() - end.size()) == end;
  }
  static std::string text(const int64_t* sizes) {
    std::string result;
    for (int i = 0; i < 4; i++) result += (i ? ", " : "(") + std::to_string(sizes[i]);
    return result + ")";
  }
  [[noreturn]] void refuse(const char* field, const std::string& rule) const {
    throw std::invalid_argument("fastattn." + std::string(kernel_) + ": " + field + " " + rule);
  }
};

}  // namespace fastattn
