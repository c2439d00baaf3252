#include "scratch.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#if defined(FASTATTN_ASAN)
#include <sanitizer/asan_interface.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>

#include <cstdint>
#endif

namespace fastattn {
namespace cpu {
namespace {

struct Slots {
  void* data[kScratchSlots] = {};
  size_t size[kScratchSlots] = {};
  [[maybe_unused]] size_t used[kScratchSlots] = {};  // by the latest call, or all that is new
  ~Slots() {
    for (int i = 0; i < kScratchSlots; i++) release(i);
  }
  void release(int slot) {
#if defined(FASTATTN_ASAN)
    __asan_unpoison_memory_region(data[slot], size[slot]);
#endif
    std::free(data[slot]);
    data[slot] = nullptr;
    size[slot] = used[slot] = 0;
  }
};
thread_local Slots slots;

}  // namespace

void* scratch(int slot, size_t bytes) {
  if (!slots.data[slot] || slots.size[slot] < bytes) {
    slots.release(slot);
    const size_t rounded = (bytes / 4096 + 1) * 4096;
    slots.data[slot] = std::aligned_alloc(4096, rounded);
    if (!slots.data[slot]) throw std::bad_alloc();
    slots.size[slot] = slots.used[slot] = rounded;
  }
#if defined(FASTATTN_ASAN)
  __asan_unpoison_memory_region(slots.data[slot], bytes);
  std::memset(slots.data[slot], 0xff, bytes);
  __asan_poison_memory_region(slots.data[slot], std::max(bytes, slots.used[slot]));
  slots.used[slot] = bytes;
#endif
  return slots.data[slot];
}

#if defined(FASTATTN_ASAN)
void open_scratch(void* data, size_t bytes) { __asan_unpoison_memory_region(data, bytes); }
#endif

void zero_scratch(void* data, size_t bytes) {
#if defined(FASTATTN_ASAN)
  open_scratch(data, bytes);
#endif
  std::memset(data, 0, bytes);
#if defined(FASTATTN_ASAN)
  __asan_poison_memory_region(data, bytes);
#endif
}

void prefer_large_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kLarge = 2 << 20;
  const uintptr_t first = ((uintptr_t)data + kLarge - 1) / kLarge * kLarge;
  const uintptr_t last = ((uintptr_t)data + bytes) / kLarge * kLarge;
  if (first < last) madvise((void*)first, last - first, MADV_HUGEPAGE);  // a refusal changes nothing but speed
#endif
}

}  // namespace cpu
}  // namespace fastattn
