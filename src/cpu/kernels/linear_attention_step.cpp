#include "../linear_attention.h"

namespace fastattn {
namespace FASTATTN_ISA {

void linear_attention_step(const LinearStepParams& p) {}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
