#include "../selective_scan.h"

namespace fastattn {
namespace FASTATTN_ISA {

void selective_scan_forward(const SelectiveScanParams& p) {
  with_dtype(p.u.dtype, [&](auto* t) { SelectiveScan<std::remove_pointer_t<decltype(t)>>(p).forward(); });
}
void selective_scan_backward(const SelectiveScanParams& p) {
  with_dtype(p.u.dtype, [&](auto* t) { SelectiveScan<std::remove_pointer_t<decltype(t)>>(p).backward(); });
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
