#include "../grouped.h"

namespace fastattn {
namespace FASTATTN_ISA {

void grouped_forward(const GroupedParams& p) {
#if defined(FASTATTN_BF16_DOT)
  if (p.q.dtype == DType::bf16) return grouped_tiled<Pairs>(p);
#endif
  grouped_tiled<Singles>(p);
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
