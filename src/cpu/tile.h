// Blocked products on packed operands, the building blocks of every attention kernel.
//
// A product is C (rows, columns) += A (rows, steps) * B (steps, columns) in registers of kRows x kVecs vectors.
// A is read by broadcast, from any two strides; B is packed in panels of up to kPanel columns, a panel being
// (steps, columns of the panel). Operands are made of 32-bit words: one float, or two bf16 that are neighbours
// along the contracted dimension (steps are then pairs).
//
// Pairs are multiplied by VDPBF16PS, which takes subnormals for zero: in both factors, in the sum it adds to, and in
// that sum after each of its two products. The error of C = sum_k a_k b_k besides float32's roundings:
//   a flushed factor is below 2^-126 and loses less than 2^-126 times the other factor (two flushed factors 2^-252);
//   a flushed sum is below 2^-126: once after each product, and once more where C continues from memory, rescaled.
// Together less than 2^-126 sum_k (2 + max(|a_k|, |b_k|)): with factors of at most 1, 3n 2^-126 for n products. So
// results of normal factors are right to a few of the smallest normal numbers, and factors that are all subnormal give
// zero. Products of floats (Singles) keep subnormals, and so does what is stored from either.
#pragma once

#include "convert.h"

#define FASTATTN_UNROLL _Pragma("GCC unroll 16")
#define FASTATTN_NOINLINE static __attribute__((noinline))
#define FASTATTN_NOINLINE_MEMBER __attribute__((noinline))
#define FASTATTN_INLINE_MEMBER inline __attribute__((always_inline))

namespace fastattn {
namespace FASTATTN_ISA {

constexpr int kVecs = kRegisters == 32 ? 4 : 2;  // 6 x 4 accumulators of 32 registers, 6 x 2 of 16
constexpr int kRows = 6;
constexpr int kPanel = kVecs * W;

FASTATTN_INLINE int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

struct Singles {
  typedef float Word;
  static constexpr int kStep = 1;  // contracted elements a word holds
  FASTATTN_INLINE vf multiply_add(vf acc, const Word* a, vf b) { return acc + splat(*a) * b; }
  FASTATTN_INLINE vf load_b(const Word* b) { return load(b); }
};

struct Pairs {
  typedef uint32_t Word;
  static constexpr int kStep = 2;
  FASTATTN_INLINE vf multiply_add(vf acc, const Word* a, vu b) { return dot_pairs(acc, splat_u(*a), b); }
  FASTATTN_INLINE vu load_b(const Word* b) {
    vu x;
    memcpy(&x, b, sizeof x);
    return x;
  }
};

// acc += A * B for kRows rows and V vectors of one panel; a_row and a_step are A's strides in words. There must be at
// least one step: with a loop that may run zero times the compiler passes the accumulators through memory.
template <class Unit, int V>
FASTATTN_INLINE void accumulate(vf (&acc)[kRows][V], const typename Unit::Word* a, int64_t a_row, int64_t a_step,
                                const typename Unit::Word* b, int64_t steps) {
  if (steps < 1) __builtin_unreachable();
  for (int64_t s = 0; s < steps; ++s) {
    decltype(Unit::load_b(b)) column[V];
    FASTATTN_UNROLL
    for (int j = 0; j < V; ++j) column[j] = Unit::load_b(b + j * W);
    FASTATTN_UNROLL
    for (int i = 0; i < kRows; ++i) {
      FASTATTN_UNROLL
      for (int j = 0; j < V; ++j) acc[i][j] = Unit::multiply_add(acc[i][j], a + i * a_row, column[j]);
    }
    a += a_step;
    b += V * W;
  }
}

// One block of scores, kRows rows of a panel: calls out(acc) while it is in registers.
template <class Unit, class Out>
FASTATTN_INLINE void product_block(const typename Unit::Word* a, int64_t a_row, const typename Unit::Word* b,
                                   int64_t steps, const Out& out) {
  vf acc[kRows][kVecs];
  FASTATTN_UNROLL
  for (int i = 0; i < kRows; ++i) {
    FASTATTN_UNROLL
    for (int j = 0; j < kVecs; ++j) acc[i][j] = vf{};
  }
  accumulate<Unit, kVecs>(acc, a, a_row, 1, b, steps);
  out(acc);
}
// The same for each vector: calls out(i, j, x) for row i of kRows and vector j of the panel.
template <class Unit, class Out>
FASTATTN_INLINE void product(const typename Unit::Word* a, int64_t a_row, const typename Unit::Word* b, int64_t steps,
                             const Out& out) {
  product_block<Unit>(a, a_row, b, steps, [&](vf(&acc)[kRows][kVecs]) {
    FASTATTN_UNROLL
    for (int i = 0; i < kRows; ++i) {
      FASTATTN_UNROLL
      for (int j = 0; j < kVecs; ++j) out(i, j, acc[i][j]);
    }
  });
}

template <class Unit, int V>
FASTATTN_NOINLINE void add_product_block(float* c, int64_t c_row, const typename Unit::Word* a, int64_t a_row,
                                         int64_t a_step, const typename Unit::Word* b, int64_t steps) {
  vf acc[kRows][V];
  FASTATTN_UNROLL
  for (int i = 0; i < kRows; ++i) {
    FASTATTN_UNROLL
    for (int j = 0; j < V; ++j) acc[i][j] = load(c + i * c_row + j * W);
  }
  accumulate<Unit, V>(acc, a, a_row, a_step, b, steps);
  FASTATTN_UNROLL
  for (int i = 0; i < kRows; ++i) {
    FASTATTN_UNROLL
    for (int j = 0; j < V; ++j) store(c + i * c_row + j * W, acc[i][j]);
  }
}

// C (kRows, vecs * W) += A * B for one panel of `vecs` vectors.
template <class Unit>
FASTATTN_INLINE void add_product(int vecs, float* c, int64_t c_row, const typename Unit::Word* a, int64_t a_row,
                                 int64_t a_step, const typename Unit::Word* b, int64_t steps) {
  if constexpr (kVecs == 4) {
    if (vecs == 4) return add_product_block<Unit, 4>(c, c_row, a, a_row, a_step, b, steps);
    if (vecs == 3) return add_product_block<Unit, 3>(c, c_row, a, a_row, a_step, b, steps);
  }
  if (vecs == 2) return add_product_block<Unit, 2>(c, c_row, a, a_row, a_step, b, steps);
  return add_product_block<Unit, 1>(c, c_row, a, a_row, a_step, b, steps);
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
