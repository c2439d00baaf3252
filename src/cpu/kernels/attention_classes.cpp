// Classifies the tiles of a dense mask, so that kernels skip empty tiles and do not test full ones. For a bias it finds
// the tiles that are entirely -inf. It runs in every call, because writes to a mask's memory cannot be noticed.
#include "../attention_problem.h"

namespace fastattn {
namespace FASTATTN_ISA {

constexpr int64_t kSerialMask = 1 << 16;  // bytes below which a second thread costs more to start than it saves
constexpr int64_t kLooksEvery = 8;        // rows read between two tests whether a tile is already known to be mixed

// `any` and `all` of the bytes read so far.
struct ByteRange {
  vu any_lanes{}, all_lanes = splat_u(~0u);
  uint32_t any_bytes = 0, all_bytes = ~0u;

  void take(const uint8_t* x, int64_t width) {
    int64_t j = 0;
    for (; j + 4 * W <= width; j += 4 * W) {
      vu lanes;
      memcpy(&lanes, x + j, sizeof lanes);
      any_lanes |= lanes;
      all_lanes &= lanes;
    }
    for (; j + 4 <= width; j += 4) {
      uint32_t four;
      memcpy(&four, x + j, sizeof four);
      any_bytes |= four;
      all_bytes &= four;
    }
    for (; j < width; j++) {
      any_bytes |= x[j];
      all_bytes &= 0x01010100u | x[j];
    }
  }
  bool any() const {
    uint32_t found = any_bytes;
    for (int i = 0; i < W; i++) found |= any_lanes[i];
    return found != 0;
  }
  bool all() const {
    uint32_t found = all_bytes;
    for (int i = 0; i < W; i++) found &= all_lanes[i];
    return (found & 0x01010101u) == 0x01010101u;
  }
};

// Rows of a bool mask, `stride` apart: 0 no pair is attended, 1 all are, 2 some are.
FASTATTN_INLINE uint8_t class_of(const uint8_t* x, int64_t stride, int64_t rows, int64_t width) {
  ByteRange range;
  for (int64_t i = 0; i < rows; i += kLooksEvery) {
    for (int64_t j = i; j < min64(rows, i + kLooksEvery); j++) range.take(x + j * stride, width);
    if (range.any() && !range.all()) return 2;
  }
  return range.any() ? 1 : 0;
}

// Bits: an integer as wide as a bias's element; `blocked` is -inf.
template <class Bits>
FASTATTN_INLINE uint8_t class_of_bias(const Bits* x, int64_t stride, int64_t rows, int64_t width, Bits blocked) {
  for (int64_t i = 0; i < rows; i++, x += stride) {
    Bits other = 0;
    for (int64_t j = 0; j < width; j++) other |= Bits(x[j] ^ blocked);
    if (other) return 1;
  }
  return 0;
}

void classify_tiles(const TileClassParams& p) {
  const int64_t block_q = round_up(p.block_q, kRows), block_k = round_up(p.block_k, kPanel);
  const int64_t rows = p.mask.size[2], columns = p.mask.size[3], stride = p.mask.stride[2];
  const int64_t bands = (rows + block_q - 1) / block_q, heads = p.mask.size[1];
  const DType dtype = p.mask.dtype;
  const int64_t width = dtype == DType::f32 ? 4 : dtype == DType::u8 ? 1 : 2;
  const int64_t count = p.mask.size[0] * heads * bands;
  parallel_items(count, count * block_q * columns * width < kSerialMask ? 1 : p.threads, [&](int64_t task, int) {
    const int64_t batch = task / (heads * bands), head = task / bands % heads, band = task % bands;
    const int64_t first = band * block_q, here = stride == 0 ? 1 : min64(block_q, rows - first);
    uint8_t* to = (uint8_t*)p.classes.data + batch * p.classes.stride[0] + head * p.classes.stride[1] +
                  band * p.classes.stride[2];
    for (int64_t n = 0; n < columns; n += block_k, to++) {
      const char* tile = plane(p.mask, batch, head, first, n, width);
      const int64_t there = min64(block_k, columns - n);
      if (dtype == DType::u8)
        *to = class_of((const uint8_t*)tile, stride, here, there);
      else if (dtype == DType::f32)
        *to = class_of_bias<uint32_t>((const uint32_t*)tile, stride, here, there, 0xff800000u);
      else
        *to =
            class_of_bias<uint16_t>((const uint16_t*)tile, stride, here, there, dtype == DType::bf16 ? 0xff80 : 0xfc00);
    }
  });
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
