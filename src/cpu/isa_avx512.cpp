#define FASTATTN_ISA avx512
#include "isa_kernels.inc"
