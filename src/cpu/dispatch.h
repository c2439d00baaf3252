// One table of kernels per instruction set; the running one is chosen from CPUID at first use.
#pragma once
#include "../common/params.h"

namespace fastattn {

struct KernelTable {
  const char* name;
  void (*rms_norm)(const RmsNormParams&);
  void (*rms_norm_backward)(const RmsNormBackwardParams&);
  void (*swiglu)(const GateParams&);
  void (*swiglu_backward)(const GateParams&);
  void (*gated)(const GateParams&);
  void (*gated_backward)(const GateParams&);
  void (*rotary)(const RotaryParams&);
  void (*matvec)(const MatvecParams&);
  void (*decode_step)(const DecodeStepParams&);
  void (*attention_forward)(const AttentionParams&);
  void (*attention_backward)(const AttentionParams&);
  void (*reweighted_forward)(const ReweightedParams&);
  void (*reweighted_backward)(const ReweightedParams&);
  void (*grouped_forward)(const GroupedParams&);
  void (*grouped_backward)(const GroupedParams&);
  void (*gated_attention_forward)(const GatedParams&);
  void (*gated_attention_backward)(const GatedParams&);
  void (*sinkhorn_forward)(const SinkhornParams&);
  void (*sinkhorn_backward)(const SinkhornParams&);
  void (*vocab_rows)(const VocabRowsParams&);
  void (*vocab_code_bias)(const VocabTokensParams&);
  void (*vocab_best_tokens)(const VocabTokensParams&);
  void (*vocab_bias_gradient)(const VocabTokensParams&);
  void (*vocab_group)(const VocabTokensParams&);
  void (*vocab_sample)(const VocabSampleParams&);
  void (*vocab_best)(const VocabBestParams&);
  void (*vocab_dots)(const VocabDotsParams&);
  void (*vocab_expand)(const VocabExpandParams&);
  void (*vocab_collect)(const VocabExpandParams&);
  void (*digest)(const DigestParams&);
  void (*pack)(const PackParams&);
  void (*linear)(const LinearParams&);
  void (*classify_tiles)(const TileClassParams&);
  void (*peak)(const PeakParams&);
};

namespace cpu {
// Instruction sets this machine can run, best last; writes at most `capacity` names and returns their number.
int runnable(const char** names, int capacity);
// The table in use; `select` changes it and returns false for a name that this machine cannot run.
const KernelTable& kernels();
bool select(const char* name);
}  // namespace cpu

}  // namespace fastattn
