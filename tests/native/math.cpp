// The functions of src/cpu/math.h over arrays, compiled once for each instruction set with the flags of its kernels.
#include "../../src/cpu/convert.h"
#include "../../src/cpu/math_full.h"
#include "../../src/cpu/score_machine.h"
#include "../../src/cpu/attention_score.h"
#include "math_functions.h"

namespace fastattn {
namespace FASTATTN_ISA {

#define FUNCTION(name, result)                         \
  {name, [](const float* from, float* to, int64_t n) { \
     for (int64_t i = 0; i < n; i += W) {              \
       const vf x = load(from + i);                    \
       store(to + i, result);                          \
     }                                                 \
   }}

template <class T>
FASTATTN_INLINE vf sigmoid_divisor(vf x) {
  vf d;
  sigmoid_divisors<1>(&x, &d, (const T*)nullptr);
  return d;
}
using Sigmoid = SigmoidScore<Arithmetic>;
using Softplus = SoftplusScore<Arithmetic>;

const checks::MathFunction math_functions[] = {
    FUNCTION("exp", exp(x)),
    FUNCTION("exp2_bounded", exp2_bounded(x)),
    FUNCTION("exp2_bounded bf16", exp2_bounded<true>(x)),
    FUNCTION("exp2_any", exp2_any(x)),
    FUNCTION("exp2_clamped", exp2_clamped(x)),
    FUNCTION("exp2_fraction", exp2_fraction(x)),
    FUNCTION("log2_positive", log2_positive(x)),
    FUNCTION("tanh", tanh(x)),
    FUNCTION("log", log(x)),
    FUNCTION("log1p", log1p(x)),
    FUNCTION("expm1", expm1(x)),
    FUNCTION("full sigmoid", sigmoid(x)),
    FUNCTION("erf", erf(x)),
    FUNCTION("floor", floor(x)),
    FUNCTION("reciprocal", reciprocal(x)),
    FUNCTION("sigmoid_divisor", sigmoid_divisor<float>(x)),
    FUNCTION("sigmoid_divisor bf16", sigmoid_divisor<bf16>(x)),
    FUNCTION("sigmoid_divisor f16", sigmoid_divisor<f16>(x)),
    FUNCTION("sigmoid", Sigmoid::weight(x, 1.0f, Sigmoid::constants(0))),
    FUNCTION("softplus", Softplus::weight(x, 1.0f, {})),
    FUNCTION("to bf16", rounded_to(x, (const bf16*)nullptr)),
    FUNCTION("to f16", rounded_to(x, (const f16*)nullptr)),
    {},
};

void run_program(const checks::ProgramRun& run) {
  ScoreMachine machine;
  machine.prepare(run.p, run.p.program, run.slopes);
  machine.run({0, 1, 5, 3, run.rows, run.columns, run.x, run.columns, machine.has_slope ? run.slopes : nullptr,
               run.loads, run.rows * run.columns});
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
