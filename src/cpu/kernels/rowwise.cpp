#include "../rowwise.h"

namespace fastattn {
namespace FASTATTN_ISA {

void rms_norm(const RmsNormParams& p) {
  with_dtype(p.x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    if (p.weight.data && p.weight.dtype == DType::f32)
      rms_norm_rows<T, float>(p);
    else
      rms_norm_rows<T>(p);
  });
}
void rms_norm_backward(const RmsNormBackwardParams& p) {
  with_dtype(p.total.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    if (p.weight.data && p.weight.dtype == DType::f32)
      rms_norm_backward_rows<T, float>(p);
    else
      rms_norm_backward_rows<T>(p);
  });
}
void swiglu(const GateParams& p) {
  with_dtype(p.a.dtype, [&](auto* t) { gate_rows<SwiGlu, std::remove_pointer_t<decltype(t)>>(p); });
}
void swiglu_backward(const GateParams& p) {
  with_dtype(p.a.dtype, [&](auto* t) { gate_backward_rows<SwiGlu, std::remove_pointer_t<decltype(t)>>(p); });
}
void gated(const GateParams& p) {
  with_dtype(p.a.dtype, [&](auto* t) { gate_rows<Gated, std::remove_pointer_t<decltype(t)>>(p); });
}
void gated_backward(const GateParams& p) {
  with_dtype(p.a.dtype, [&](auto* t) { gate_backward_rows<Gated, std::remove_pointer_t<decltype(t)>>(p); });
}
void rotary(const RotaryParams& p) {
  with_dtype(p.x.dtype, [&](auto* t) { rotary_rows<std::remove_pointer_t<decltype(t)>>(p); });
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
