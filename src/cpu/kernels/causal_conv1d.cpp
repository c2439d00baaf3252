#include "../causal_conv1d.h"

namespace fastattn {
namespace FASTATTN_ISA {

void causal_conv1d_forward(const CausalConv1dParams& p) {
  with_conv(p, [](const auto& conv) { conv.forward(); });
}
void causal_conv1d_backward(const CausalConv1dParams& p) {
  with_conv(p, [](const auto& conv) { conv.backward(); });
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
