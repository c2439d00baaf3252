// Working memory carved into pieces, each aligned to 64 bytes. One description of a layout is run twice: without memory
// to measure it, then with memory to hand the pieces out, so that the size and the pieces cannot disagree.
//
// With AddressSanitizer a gap follows every piece, and memory outside the pieces may not be touched.
#pragma once

#include <cassert>

#include "scratch.h"
#include "tile.h"

namespace fastattn {
namespace FASTATTN_ISA {

#if defined(FASTATTN_ASAN)
constexpr int64_t kArenaGap = 512;
#else
constexpr int64_t kArenaGap = 0;
#endif
constexpr int64_t kPage = 4096;

struct Blocks;

class Arena {
 public:
  Arena() = default;  // measures: every piece is null
  Arena(void* memory, int64_t bytes) : memory_((char*)memory), bytes_(bytes) {}

  template <class T>
  T* take(int64_t count) {
    char* piece = reserve(count * (int64_t)sizeof(T));
    if (piece) cpu::open_scratch(piece, size_t(count) * sizeof(T));
    return (T*)piece;
  }
  // `count` blocks of `bytes` bytes, `alignment` apart or a multiple of it.
  Blocks blocks(int64_t count, int64_t bytes, int64_t alignment = kPage);
  // Bytes carved so far.
  int64_t used() const { return used_; }

 private:
  char* memory_ = nullptr;
  int64_t bytes_ = 0, used_ = 0;

  char* reserve(int64_t bytes) {
    char* piece = memory_ ? memory_ + used_ : nullptr;
    used_ = round_up(used_ + bytes + kArenaGap, 64);
    assert(!memory_ || used_ <= bytes_);
    return piece;
  }
};

// Equal blocks of memory, each to be carved by an arena of its own.
struct Blocks {
  char* memory = nullptr;
  int64_t count = 0, bytes = 0, stride = 0;

  Arena operator[](int64_t i) const {
    assert(memory && i >= 0 && i < count);
    return {memory + i * stride, bytes};
  }
  // Sets every byte to 0. Must not be called while a block is in use.
  void zero() const { cpu::zero_scratch(memory, size_t(count * stride)); }
};

inline Blocks Arena::blocks(int64_t count, int64_t bytes, int64_t alignment) {
  used_ = round_up(used_, alignment);
  const int64_t stride = round_up(bytes, alignment);
  return {reserve(count * stride), count, bytes, stride};
}

// The bytes that lay_out(arena) carves.
template <class Layout>
FASTATTN_INLINE int64_t bytes_of(const Layout& lay_out) {
  Arena measure;
  lay_out(measure);
  return measure.used();
}

// Calls lay_out(arena) with memory of this thread's slot, of the size that it needs. Throws if there is no memory.
template <class Layout>
FASTATTN_INLINE void with_scratch(int slot, const Layout& lay_out) {
  const int64_t bytes = bytes_of(lay_out);
  Arena arena(cpu::scratch(slot, size_t(bytes)), bytes);
  lay_out(arena);
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
