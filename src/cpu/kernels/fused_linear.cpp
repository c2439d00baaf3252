#include "../fused_linear.h"

namespace fastattn {
namespace FASTATTN_ISA {

void pack(const PackParams& p) {
#if defined(FASTATTN_BF16_DOT)
  if (p.source.dtype == DType::bf16) return pack_panels_of<Pairs>(p);
#endif
  pack_panels_of<Singles>(p);
}

void linear(const LinearParams& p) {
#if defined(FASTATTN_BF16_DOT)
  if (p.x.dtype == DType::bf16) return linear_blocks<Pairs>(p);
#endif
  linear_blocks<Singles>(p);
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
