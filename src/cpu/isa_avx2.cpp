#define FASTATTN_ISA avx2
#include "isa_kernels.inc"
