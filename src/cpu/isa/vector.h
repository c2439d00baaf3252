// The vectors of an instruction set, whose header has defined their width of W floats, and the operations that GCC and
// Clang provide for them.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "../params.h"

#define FASTATTN_INLINE static inline __attribute__((always_inline))

namespace fastattn {
namespace FASTATTN_ISA {

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));
typedef uint16_t vh2 __attribute__((vector_size(W * 4)));

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

FASTATTN_INLINE vf splat(float x) { return x - vf{}; }
FASTATTN_INLINE vu splat_u(uint32_t x) { return x - vu{}; }
FASTATTN_INLINE vf as_vf(vu x) { return (vf)x; }
FASTATTN_INLINE vu as_vu(vf x) { return (vu)x; }
FASTATTN_INLINE vf select(vi mask, vf a, vf b) { return mask ? a : b; }
FASTATTN_INLINE vf keep(vi mask, vf a) { return (vf)(mask & (vi)a); }
FASTATTN_INLINE vf vabs(vf x) { return (vf)((vi)x & 0x7fffffff); }
FASTATTN_INLINE vu select_u(vi mask, vu a, vu b) { return (a & (vu)mask) | (b & ~(vu)mask); }

}  // namespace FASTATTN_ISA
}  // namespace fastattn
