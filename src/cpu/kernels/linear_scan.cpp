#include "../linear_scan.h"

namespace fastattn {
namespace FASTATTN_ISA {

void linear_scan_forward(const LinearScanParams& p) {
  with_scan(p, false, [](const auto& scan) { scan.forward(); });
}
void linear_scan_backward(const LinearScanParams& p) {
  with_scan(p, true, [](const auto& scan) { scan.backward(); });
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
