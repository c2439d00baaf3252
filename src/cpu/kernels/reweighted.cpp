#include "../reweighted.h"

namespace fastattn {
namespace FASTATTN_ISA {

void reweighted_forward(const ReweightedParams& p) {
#if defined(FASTATTN_BF16_DOT)
  if (p.q.dtype == DType::bf16) return reweighted_tiled<Pairs>(p);
#endif
  reweighted_tiled<Singles>(p);
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
