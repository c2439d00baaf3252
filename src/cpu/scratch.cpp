#include "scratch.h"

#include <cstdlib>
#include <new>
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
  ~Slots() {
    for (void* p : data) std::free(p);
  }
};
thread_local Slots slots;

}  // namespace

void* scratch(int slot, size_t bytes) {
  if (slots.size[slot] < bytes) {
    std::free(slots.data[slot]);
    slots.size[slot] = 0;
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    slots.data[slot] = std::aligned_alloc(4096, rounded);
    if (!slots.data[slot]) throw std::bad_alloc();
    slots.size[slot] = rounded;
  }
  return slots.data[slot];
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
