#include "../attention_forward.h"

namespace fastattn {
namespace FASTATTN_ISA {

void attention_forward(const AttentionParams& p) {
  if (p.decode_rows > 0) attention_decode(p);
  Scores<Arithmetic>::visit(p.score, [&](auto score) { forward_scored<decltype(score)>(p); });
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
