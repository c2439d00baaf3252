// What the kernels can hold: for themselves, and for the Python code that refuses more (`_core.limits`).
#pragma once
#include <cstdint>

#define FASTATTN_LIMITS                                                                        \
  LIMIT(matvec_rows, 8)            /* of x, and tokens of decode_step */                       \
  LIMIT(head_dim, 256)             /* of q, k and v */                                         \
  LIMIT(length, INT32_MAX)         /* of a sequence: intervals of keys are kept in 32 bits */  \
  LIMIT(block, 1 << 16)            /* of rows or keys */                                       \
  LIMIT(list_keys, 16)             /* of a block of a list, at least */                        \
  LIMIT(dropped, 1 << 16)          /* of so many weights: all of them */                       \
  LIMIT(groups, 63)                /* of Sinkhorn: the bits of a signature that is positive */ \
  LIMIT(iterations, 10000)         /* of Sinkhorn, whose potentials are kept of each */        \
  LIMIT(program_instructions, 256) /* of a score program */                                    \
  LIMIT(program_scalars, 96)       /* its registers with one value a row */                    \
  LIMIT(program_vectors, 24)       /* and with one a key */                                    \
  LIMIT(program_loads, 16)         /* from tables whose gradient is wanted */                  \
  LIMIT(taps, 8)                   /* of causal_conv1d */                                      \
  LIMIT(scan_slice, 256)           /* channels of a panel of linear_scan */                    \
  LIMIT(chunk, 64)                 /* tokens between states that linear attention keeps */     \
  LIMIT(state_dim, 1024)           /* of keys and values in a state of linear attention */

namespace fastattn {
namespace limits {
#define LIMIT(name, value) constexpr int name = value;
FASTATTN_LIMITS
#undef LIMIT
}  // namespace limits
}  // namespace fastattn
