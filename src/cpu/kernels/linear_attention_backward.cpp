#include "../linear_attention_backward.h"

namespace fastattn {
namespace FASTATTN_ISA {

void linear_attention_backward(const LinearAttentionParams& p) { linear_backward(p); }

}  // namespace FASTATTN_ISA
}  // namespace fastattn
