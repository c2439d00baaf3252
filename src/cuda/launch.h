// What the bindings call: each launches on a stream (an address) and returns null, or what went wrong.
#pragma once
#include "../common/params.h"
#include "params.h"

namespace fastattn {
namespace cuda {

// blocks: as many as `partial` has room for; fewer run where the device holds fewer at once.
const char* launch_sinkhorn(const SinkhornParams& p, DType dtype, int groups, int64_t blocks, uintptr_t stream);
const char* launch_vocab_rows(const VocabRowsParams& p, bool stablemax, uintptr_t stream);
const char* launch_decode(const DecodeParams& p, DType dtype, uintptr_t stream);

}  // namespace cuda
}  // namespace fastattn
