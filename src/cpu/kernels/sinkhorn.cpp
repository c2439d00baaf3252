#include "../sinkhorn.h"

namespace fastattn {
namespace FASTATTN_ISA {

void sinkhorn_forward(const SinkhornParams& p) { sinkhorn<false>(SinkhornProblem(p)); }

void sinkhorn_backward(const SinkhornParams& p) { sinkhorn<true>(SinkhornProblem(p)); }

}  // namespace FASTATTN_ISA
}  // namespace fastattn
