#include "../attention_backward.h"

namespace fastattn {
namespace FASTATTN_ISA {

void attention_backward(const AttentionParams& p) {
#if defined(FASTATTN_BF16_DOT)
  if (p.q.dtype == DType::bf16) return backward_scored<Pairs>(p);
#endif
  backward_scored<Singles>(p);
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
