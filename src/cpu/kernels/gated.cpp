#include "../gated.h"

namespace fastattn {
namespace FASTATTN_ISA {

void gated_attention_forward(const GatedParams& p) {
#if defined(FASTATTN_BF16_DOT)
  if (p.q.dtype == DType::bf16) return gated_tiled<Pairs>(p);
#endif
  gated_tiled<Singles>(p);
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
