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
// At least `bytes` bytes of this thread's slot. Earlier contents are lost when it grows. Throws if there is no memory,
// so it must not be called inside a parallel loop, which no exception may leave. With AddressSanitizer it holds NaN (or
// -1) and must not be touched before open_scratch.
void* scratch(int slot, size_t bytes);
#if defined(FASTATTN_ASAN)
void open_scratch(void* data, size_t bytes);
#else
static inline void open_scratch(void*, size_t) {}
#endif
// Sets [data, data + bytes) of a slot to 0.
void zero_scratch(void* data, size_t bytes);
// Requests large pages for [data, data + bytes) if the system has them and the range contains whole ones: new memory
// then takes one page fault for 2 MiB instead of 512.
void prefer_large_pages(void* data, size_t bytes);
}  // namespace cpu
}  // namespace fastattn
