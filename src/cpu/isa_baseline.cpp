#define FASTATTN_ISA baseline
#include "isa_kernels.inc"
