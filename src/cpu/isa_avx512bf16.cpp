#define FASTATTN_ISA avx512bf16
#define FASTATTN_BF16_DOT
#include "isa_kernels.inc"
