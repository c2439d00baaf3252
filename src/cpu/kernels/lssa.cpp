#include "../lssa.h"

namespace fastattn {
namespace FASTATTN_ISA {

void lssa_forward(const LssaParams& p) {
#if defined(FASTATTN_BF16_DOT)
  if (p.q.dtype == DType::bf16) return lssa_tiled<Pairs>(p);
#endif
  lssa_tiled<Singles>(p);
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
