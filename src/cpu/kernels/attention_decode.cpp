#include "../attention_decode.h"

namespace fastattn {
namespace FASTATTN_ISA {

void attention_decode(const AttentionParams& p) {
  Scores<Arithmetic>::visit(p.score, [&](auto score) { forward_decoded<decltype(score)>(p); });
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
