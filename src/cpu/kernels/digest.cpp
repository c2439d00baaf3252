// A digest of a tensor's bytes, by which a result computed from them is known to be still valid. It runs at the speed
// of memory. Different contents have the same digest with a probability of 2^-60; it does not resist a deliberate
// search for two.
#include "../arena.h"
#include "../parallel.h"

namespace fastattn {
namespace FASTATTN_ISA {

constexpr int64_t kDigestChunk = 1 << 18;  // bytes of a task: fixed, so that the digest does not depend on the threads
constexpr int kDigestLanes = 4;            // independent chains of products
constexpr uint64_t kDigestSeeds[kDigestLanes] = {0xa0761d6478bd642f, 0xe7037ed1a0b428db, 0x8ebc6af09c88c6e3,
                                                 0x589965cc75374cc3};

// Both halves of the product, so that every bit of the result depends on every bit of a and b.
FASTATTN_INLINE uint64_t folded_product(uint64_t a, uint64_t b) {
  __extension__ typedef unsigned __int128 Wide;
  const Wide product = (Wide)a * b;
  return (uint64_t)product ^ (uint64_t)(product >> 64);
}

struct DigestLanes {
  uint64_t state[kDigestLanes];
  void take(const uint8_t* x) {
    uint64_t words[2 * kDigestLanes];
    memcpy(words, x, sizeof words);
    FASTATTN_EACH(i, kDigestLanes)
    state[i] = folded_product(words[2 * i] ^ kDigestSeeds[i], words[2 * i + 1] ^ state[i]);
  }
};

FASTATTN_NOINLINE uint64_t digest_of(const uint8_t* x, int64_t bytes) {
  constexpr int64_t kStep = 16 * kDigestLanes;
  DigestLanes lanes;
  FASTATTN_EACH(i, kDigestLanes) lanes.state[i] = kDigestSeeds[kDigestLanes - 1 - i];
  int64_t i = 0;
  for (; i + kStep <= bytes; i += kStep) lanes.take(x + i);
  uint8_t rest[kStep] = {};
  memcpy(rest, x + i, size_t(bytes - i));
  lanes.take(rest);
  uint64_t result = (uint64_t)bytes;
  FASTATTN_EACH(j, kDigestLanes) result = folded_product(result ^ kDigestSeeds[j], lanes.state[j] ^ kDigestSeeds[0]);
  return result;
}

void digest(const DigestParams& p) {
  const uint8_t* data = (const uint8_t*)p.source.data;
  const int64_t bytes = p.source.size[3], chunks = (bytes + kDigestChunk - 1) / kDigestChunk;
  uint64_t* parts = nullptr;
  with_scratch(0, [&](Arena& arena) { parts = arena.take<uint64_t>(chunks); });
  parallel_items(chunks, p.threads, [&](int64_t chunk, int) {
    const int64_t first = chunk * kDigestChunk;
    parts[chunk] = digest_of(data + first, min64(kDigestChunk, bytes - first));
  });
  *(uint64_t*)p.digest.data = digest_of((const uint8_t*)parts, chunks * (int64_t)sizeof(uint64_t));
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
