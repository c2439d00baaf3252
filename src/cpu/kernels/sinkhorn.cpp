#include "../sinkhorn.h"

namespace fastattn {
namespace FASTATTN_ISA {

void sinkhorn_forward(const SinkhornParams& p) {
  const SinkhornProblem problem(p);
  if (p.causal)
    sinkhorn_causal(problem);
  else
    sinkhorn_plain<false>(problem);
}

void sinkhorn_backward(const SinkhornParams& p) {
  const SinkhornProblem problem(p);
  if (p.causal)
    sinkhorn_causal_backward(problem);
  else
    sinkhorn_plain<true>(problem);
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
