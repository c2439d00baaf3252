// Per-thread working memory that only grows: aligned to 64 bytes, kept between calls. Compiled in a baseline unit.
#pragma once
#include <cstddef>

namespace fastattn {
namespace cpu {
constexpr int kScratchSlots = 8;
// At least `bytes` bytes of this thread's slot; what an earlier call left there is not kept when it grows.
void* scratch(int slot, size_t bytes);
}  // namespace cpu
}  // namespace fastattn
