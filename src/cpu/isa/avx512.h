// AVX-512 F, BW, VL and DQ.
#pragma once
#include "avx512_vectors.h"
#include "bf16_integers.h"
