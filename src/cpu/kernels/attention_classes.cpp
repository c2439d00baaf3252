// Classing the tiles of a dense mask once, so that kernels skip the empty ones and do not test the full ones. Of a bias
// only its tiles of nothing but -inf are known by it.
#include "../attention_problem.h"

namespace fastattn {
namespace FASTATTN_ISA {

// Rows `stride` apart of a bool mask: 0 nothing attends, 1 everything, 2 some of it.
FASTATTN_INLINE uint8_t class_of(const uint8_t* x, int64_t stride, int64_t rows, int64_t width) {
  int any = 0, all = 1;
  for (int64_t i = 0; i < rows; i++, x += stride) {
    int row_any = 0, row_all = 1;
    for (int64_t j = 0; j < width; j++) {
      row_any |= x[j];
      row_all &= x[j];
    }
    any |= row_any;
    all &= row_all;
  }
  return uint8_t(all ? 1 : any ? 2 : 0);
}

// Bits: of a bias's element, as wide; `blocked` is -inf.
template <class Bits>
FASTATTN_INLINE uint8_t class_of_bias(const Bits* x, int64_t stride, int64_t rows, int64_t width, Bits blocked) {
  for (int64_t i = 0; i < rows; i++, x += stride) {
    int other = 0;
    for (int64_t j = 0; j < width; j++) other |= x[j] != blocked;
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
  parallel_items(p.mask.size[0] * heads * bands, p.threads, [&](int64_t task, int) {
    const int64_t batch = task / (heads * bands), head = task / bands % heads, band = task % bands;
    const int64_t first = band * block_q, count = min64(block_q, rows - first);
    uint8_t* to = (uint8_t*)p.classes.data + batch * p.classes.stride[0] + head * p.classes.stride[1] +
                  band * p.classes.stride[2];
    for (int64_t n = 0; n < columns; n += block_k, to++) {
      const char* tile = plane(p.mask, batch, head, first, n, width);
      const int64_t there = min64(block_k, columns - n);
      if (dtype == DType::u8)
        *to = class_of((const uint8_t*)tile, stride, count, there);
      else if (dtype == DType::f32)
        *to = class_of_bias<uint32_t>((const uint32_t*)tile, stride, count, there, 0xff800000u);
      else
        *to = class_of_bias<uint16_t>((const uint16_t*)tile, stride, count, there,
                                      dtype == DType::bf16 ? 0xff80 : 0xfc00);
    }
  });
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
