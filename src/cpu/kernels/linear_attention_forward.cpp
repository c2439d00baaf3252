#include "../linear_attention_forward.h"

namespace fastattn {
namespace FASTATTN_ISA {

void linear_attention_forward(const LinearAttentionParams& p) { linear_forward(p); }

}  // namespace FASTATTN_ISA
}  // namespace fastattn
