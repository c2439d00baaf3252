#include "../matvec.h"

namespace fastattn {
namespace FASTATTN_ISA {

void matvec(const MatvecParams& p) {
  with_dtype(p.weight.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    p.x.dtype == DType::f32 ? matvec_rows<T, float>(p) : matvec_rows<T, T>(p);
  });
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
