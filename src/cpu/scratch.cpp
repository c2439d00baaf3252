#include "scratch.h"

#include <cstdlib>
#include <new>

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

}  // namespace cpu
}  // namespace fastattn
