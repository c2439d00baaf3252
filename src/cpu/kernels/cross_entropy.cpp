#include "../cross_entropy.h"

namespace fastattn {
namespace FASTATTN_ISA {

template <class T, class Out>
static void vocab_rows_to(const VocabRowsParams& p) {
  if (p.stablemax)
    vocab_rows_of<T, Out, true>(p);
  else
    vocab_rows_of<T, Out, false>(p);
}

void vocab_rows(const VocabRowsParams& p) {
  if (p.x.dtype == DType::f32 && p.out.dtype == DType::bf16) return vocab_rows_to<float, bf16>(p);
  with_dtype(p.x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    vocab_rows_to<T, T>(p);
  });
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
