// The kernels of avx512 for machines without AVX-512, to test their logic: plain C++, whose 64-byte vectors the
// compiler lowers to the vectors of the machine.
#pragma once
#include "emulated_vectors.h"
#include "bf16_integers.h"
