// The kernels of avx512 where there is no AVX-512, to test their logic: plain C++, whose 64-byte vectors the compiler
// lowers to what there is.
#pragma once
#include "emulated_vectors.h"
#include "bf16_integers.h"
