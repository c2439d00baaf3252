#include "../cross_entropy.h"

namespace fastattn {
namespace FASTATTN_ISA {

void vocab_rows(const VocabRowsParams& p) {
  with_dtype(p.x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    if (p.stablemax)
      vocab_rows_of<T, true>(p);
    else
      vocab_rows_of<T, false>(p);
  });
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
