// Per-thread working memory that only grows: aligned to 64 bytes, kept between calls. Compiled in a baseline unit.
#pragma once
#include <cstddef>

namespace fastattn {
namespace cpu {
constexpr int kScratchSlots = 8;
// At least `bytes` bytes of this thread's slot; what an earlier call left there is not kept when it grows. Throws where
// there is no memory: not for use inside a parallel loop, which no exception may leave.
void* scratch(int slot, size_t bytes);
// Asks for large pages where there are such and [data, data + bytes) has whole ones: fresh memory then takes one fault
// for 2 MiB instead of 512.
void prefer_large_pages(void* data, size_t bytes);
}  // namespace cpu
}  // namespace fastattn
