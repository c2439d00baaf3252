#include "../hrm_step.h"

namespace fastattn {
namespace FASTATTN_ISA {

void decode_step(const DecodeStepParams& p) {
  with_dtype(p.z_h.dtype, [&](auto* t) { DecodeStep<std::remove_pointer_t<decltype(t)>>(p).run(); });
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
