// Packing operands for the blocked products of tile.h, from rows of any dtype with a contiguous last dimension.
#pragma once

#include <utility>

#include "tile.h"

namespace fastattn {
namespace FASTATTN_ISA {

// Rows in memory: `stride` elements apart, each with its elements next to each other.
struct Matrix {
  const void* data;
  int64_t stride;
  DType dtype;
};

namespace detail {

template <int kHalf, int... L>
FASTATTN_INLINE void exchange(vf& x, vf& y, std::integer_sequence<int, L...>) {
  const vf a = __builtin_shufflevector(x, y, ((L & kHalf) ? W + L - kHalf : L)...);
  const vf b = __builtin_shufflevector(x, y, ((L & kHalf) ? W + L : L + kHalf)...);
  x = a;
  y = b;
}
template <int kHalf>
FASTATTN_INLINE void transpose_from(vf (&r)[W]) {
  FASTATTN_UNROLL
  for (int i = 0; i < W; ++i) {
    if (!(i & kHalf)) exchange<kHalf>(r[i], r[i + kHalf], std::make_integer_sequence<int, W>{});
  }
  if constexpr (kHalf > 1) transpose_from<kHalf / 2>(r);
}

// `count` contracted elements of a row from p on as words in float lanes; zero after them.
template <class Unit, class T>
FASTATTN_INLINE vf load_lanes(const T* p, int64_t count) {
  if constexpr (Unit::kStep == 1) {
    return count >= W ? load(p) : load_n(p, int(count));
  } else {
    vf words{};
    if (count >= 2 * W)
      memcpy(&words, p, sizeof words);
    else
      memcpy(&words, p, size_t(count) * 2);
    return words;
  }
}

// W columns of two rows as words, the first row in the low halves; the second may be missing.
FASTATTN_INLINE vf load_row_pair(const bf16* p, int64_t stride, int64_t count, bool second) {
  vh low{}, high{};
  if (count >= W) {
    low = load_h(p);
    if (second) high = load_h(p + stride);
  } else {
    memcpy(&low, p, size_t(count) * 2);
    if (second) memcpy(&high, p + stride, size_t(count) * 2);
  }
  return (vf)(widen(low) | (widen(high) << 16));
}

}  // namespace detail

FASTATTN_INLINE void transpose(vf (&r)[W]) { detail::transpose_from<W / 2>(r); }

// The number of steps of a contracted dimension of `n` elements.
template <class Unit>
FASTATTN_INLINE int64_t steps_of(int64_t n) {
  return (n + Unit::kStep - 1) / Unit::kStep;
}

// Calls f with a null pointer of the element type. Pairs are made of bf16 only.
template <class Unit, class F>
FASTATTN_INLINE void with_element(DType dtype, const F& f) {
  if constexpr (Unit::kStep == 2)
    f((bf16*)nullptr);
  else
    with_dtype(dtype, f);
}

// A operand: `rows` rows of `columns` elements times `sign` (1, -1 or 0) to dst at dst_stride words; rows up to
// a multiple of kRows and words up to dst_stride are zero.
template <class Unit>
static void pack_rows(typename Unit::Word* dst, int64_t dst_stride, Matrix src, int64_t rows, int64_t columns,
                      float sign) {
  for (int64_t i = rows; i < round_up(rows, kRows); ++i) std::memset(dst + i * dst_stride, 0, size_t(dst_stride) * 4);
  with_element<Unit>(src.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t i = 0; i < rows; ++i) {
      const T* row = static_cast<const T*>(src.data) + i * src.stride;
      typename Unit::Word* out = dst + i * dst_stride;
      for (int64_t w = 0; w < dst_stride; w += W) {
        const int64_t left = columns - w * Unit::kStep;
        vf x = left > 0 ? detail::load_lanes<Unit>(row + w * Unit::kStep, left) : vf{};
        if constexpr (Unit::kStep == 1) {
          x = x * sign;
        } else if (sign != 1.0f) {
          x = (vf)(((vi)x ^ int32_t(0x80008000)) & (sign == 0.0f ? 0 : -1));
        }
        if (dst_stride - w >= W) {
          store(reinterpret_cast<float*>(out + w), x);
        } else {
          store_n(reinterpret_cast<float*>(out + w), x, int(dst_stride - w));
        }
      }
    }
  });
}

// B operand contracted over the columns of src: rows [0, rows) become panels (steps of columns, kPanel), the last
// one padded with zeros.
template <class Unit>
static void pack_transposed(typename Unit::Word* dst, Matrix src, int64_t rows, int64_t columns) {
  const int64_t steps = steps_of<Unit>(columns);
  with_element<Unit>(src.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* data = static_cast<const T*>(src.data);
    for (int64_t r = 0; r < rows; r += kPanel, dst += steps * kPanel) {
      for (int64_t j = 0; j < kPanel; j += W) {
        for (int64_t s = 0; s < steps; s += W) {
          vf block[W];
          FASTATTN_UNROLL
          for (int i = 0; i < W; ++i) {
            block[i] = r + j + i < rows ? detail::load_lanes<Unit>(data + (r + j + i) * src.stride + s * Unit::kStep,
                                                                   columns - s * Unit::kStep)
                                        : vf{};
          }
          transpose(block);
          const int64_t count = min64(W, steps - s);
          FASTATTN_UNROLL
          for (int i = 0; i < W; ++i) {
            if (i < count) store(reinterpret_cast<float*>(dst + (s + i) * kPanel + j), block[i]);
          }
        }
      }
    }
  });
}

// B operand contracted over the rows of src: columns become panels of up to kPanel columns, each (steps of `rows`,
// columns rounded up to `rounding`). Panels are `capacity` steps long; the rows go to steps `first` on.
template <class Unit>
static void pack_panels(typename Unit::Word* dst, int64_t capacity, int64_t first, Matrix src, int64_t rows,
                        int64_t columns, int64_t rounding = W) {
  with_element<Unit>(src.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* data = static_cast<const T*>(src.data);
    for (int64_t c = 0; c < columns; c += kPanel) {
      const int64_t width = round_up(min64(kPanel, columns - c), rounding);
      typename Unit::Word* panel = dst + c * capacity + first * width;
      if constexpr (Unit::kStep == 1) {
        if (columns - c >= width) {
          for (int64_t s = 0; s < rows; ++s)
            for (int64_t j = 0; j < width; j += W) store(panel + s * width + j, load(data + s * src.stride + c + j));
          continue;
        }
      }
      for (int64_t s = 0; s < steps_of<Unit>(rows); ++s) {
        for (int64_t j = 0; j < width; j += W) {
          const int64_t left = max64(0, columns - c - j);
          const T* p = data + s * Unit::kStep * src.stride + c + j;
          vf x;
          if constexpr (Unit::kStep == 1)
            x = left >= W ? load(p) : load_n(p, int(left));
          else
            x = detail::load_row_pair(p, src.stride, left, 2 * s + 1 < rows);
          store(reinterpret_cast<float*>(panel + s * width + j), x);
        }
      }
    }
  });
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
