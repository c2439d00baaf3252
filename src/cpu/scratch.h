// Per-thread working memory that only grows: aligned to 4096 bytes, kept between calls. Compiled in a baseline unit.
#pragma once
#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#define FASTATTN_ASAN
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FASTATTN_ASAN
#endif
#endif

namespace fastattn {
namespace cpu {
constexpr int kScratchSlots = 8;
// At least `bytes` bytes of this thread's slot; what an earlier call left there is not kept when it grows. Throws where
// there is no memory: not for use inside a parallel loop, which no exception may leave. With AddressSanitizer it holds
// NaN (or -1) and none of it may be touched before open_scratch.
void* scratch(int slot, size_t bytes);
#if defined(FASTATTN_ASAN)
void open_scratch(void* data, size_t bytes);
#else
static inline void open_scratch(void*, size_t) {}
#endif
// [data, data + bytes) of a slot becomes 0.
void zero_scratch(void* data, size_t bytes);
// Asks for large pages where there are such and [data, data + bytes) has whole ones: fresh memory then takes one fault
// for 2 MiB instead of 512.
void prefer_large_pages(void* data, size_t bytes);
}  // namespace cpu
}  // namespace fastattn
