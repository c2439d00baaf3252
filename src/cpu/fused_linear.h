// Products of many rows with a packed matrix, fused with the operations around them: a norm's scale or a sigmoid gate
// before, SwiGLU and the residual addition after.
//
// Rows of x are packed (and gated, and their squares summed) once for all columns; a task then owns a block of rows and
// columns, sums it in float32 over passes of block_steps, whose panels of B stay in L1 while every row of the block
// meets them, and finishes it while it is in L2.
#pragma once

#include "arena.h"
#include "pack.h"
#include "rowwise.h"

namespace fastattn {
namespace FASTATTN_ISA {

constexpr int64_t kRowsKib = 16384;  // packed rows kept at a time

FASTATTN_INLINE const void* offset(const Tensor& t, int64_t elements) {
  return (const char*)t.data + elements * (t.dtype == DType::f32 ? 4 : 2);
}

// The layout of B: `parts` runs of panels of kPanel columns; each panel is `steps` words deep.
template <class Unit>
struct PanelLayout {
  int64_t steps, part_columns, part_panels;
  PanelLayout(int64_t contracted, int64_t columns, int64_t parts)
      : steps(steps_of<Unit>(contracted)),
        part_columns(columns / parts),
        part_panels((part_columns + kPanel - 1) / kPanel) {}
  int64_t panel(int64_t part, int64_t index) const { return (part * part_panels + index) * steps * kPanel; }
};

template <class Unit>
static void pack_panels_of(const PackParams& p) {
  const bool rows_contracted = p.transposed;
  const int64_t columns = p.source.size[rows_contracted ? 3 : 2], contracted = p.source.size[rows_contracted ? 2 : 3];
  const PanelLayout<Unit> layout(contracted, columns, p.parts);
  if (!p.packed.data) {
    *(int64_t*)p.bytes.data = layout.panel(p.parts, 0) * 4;
    return;
  }
  cpu::prefer_large_pages(p.packed.data, size_t(layout.panel(p.parts, 0)) * 4);
  parallel_items(p.parts * layout.part_panels, p.threads, [&](int64_t item, int) {
    const int64_t part = item / layout.part_panels, index = item % layout.part_panels;
    const int64_t first = part * layout.part_columns + index * kPanel;
    const int64_t count = min64(kPanel, layout.part_columns - index * kPanel);
    auto* to = (typename Unit::Word*)p.packed.data + layout.panel(part, index);
    const int64_t stride = p.source.stride[2];
    if (!rows_contracted) {
      const Matrix rows{offset(p.source, first * stride), stride, p.source.dtype};
      return pack_transposed<Unit>(to, rows, count, contracted);
    }
    pack_panels<Unit>(to, layout.steps, 0, {offset(p.source, first), stride, p.source.dtype}, contracted, count,
                      kPanel);
  });
}

template <class Unit>
struct PackedElement {
  typedef float Type;
};
template <>
struct PackedElement<Pairs> {
  typedef bf16 Type;
};

template <class T>
FASTATTN_INLINE vf sigmoid_divisor(vf x, const T* type) {
  vf d;
  sigmoid_divisors<1>(&x, &d, type);
  return d;
}

// Packs rows [first, first + rows) of x, gated, into dst, zero beyond the last column; computes rstd if requested.
template <class Unit, class T>
FASTATTN_NOINLINE void pack_gated_rows(const LinearParams& p, typename Unit::Word* dst, int64_t stride, int64_t first,
                                       int64_t rows) {
  using Element = typename PackedElement<Unit>::Type;
  const int64_t heads = p.x.size[2], head_dim = p.x.size[3];
  for (int64_t i = 0; i < rows; i++) {
    const int64_t a = (first + i) / p.x.size[1], b = (first + i) % p.x.size[1];
    Element* out = (Element*)(dst + i * stride);
    std::memset((void*)(dst + i * stride), 0, size_t(stride) * 4);
    vf squares[2] = {};
    for (int64_t h = 0; h < heads; h++) {
      const T* x = (const T*)p.x.data + a * p.x.stride[0] + b * p.x.stride[1] + h * p.x.stride[2];
      const T* gate = !p.gate.data
                          ? nullptr
                          : (const T*)p.gate.data + a * p.gate.stride[0] + b * p.gate.stride[1] + h * p.gate.stride[2];
      int lane = 0;
      for_columns(head_dim, [&](int64_t j, int n) {
        vf v = get(x + j, n);
        if (gate) v /= sigmoid_divisor(get(gate + j, n), gate);
        squares[lane++ & 1] += v * v;
        put(out + h * head_dim + j, v, n);
      });
    }
    if (p.norm) {
      const float mean = reduce_add(squares[0] + squares[1]) / (float)(heads * head_dim);
      ((float*)p.rstd.data)[first + i] = 1.0f / __builtin_sqrtf(mean + (float)p.eps);
    }
  }
}

// Columns [first, first + rows) of x (K, M) become rows: W x W blocks are transposed in registers.
template <class Unit>
FASTATTN_NOINLINE void pack_columns(const LinearParams& p, typename Unit::Word* dst, int64_t stride, int64_t first,
                                    int64_t rows) {
  const int64_t contracted = p.x.size[2], row = p.x.stride[2];
  with_element<Unit>(p.x.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* data = (const T*)p.x.data + first;
    for (int64_t s = 0; s < stride; s += W) {
      for (int64_t c = 0; c < rows; c += W) {
        const int64_t width = min64(W, rows - c);
        vf block[W];
        FASTATTN_UNROLL
        for (int i = 0; i < W; ++i) {
          const int64_t k = (s + i) * Unit::kStep;
          if (k >= contracted)
            block[i] = vf{};
          else if constexpr (Unit::kStep == 1)
            block[i] = get(data + k * row + c, int(width));
          else
            block[i] = detail::load_row_pair(data + k * row + c, row, width, k + 1 < contracted);
        }
        transpose(block);
        FASTATTN_UNROLL
        for (int i = 0; i < W; ++i)
          if (i < width) store(reinterpret_cast<float*>(dst + (c + i) * stride + s), block[i]);
      }
    }
  });
}

// Applies the epilogue to a task's sums c (rows, width * parts), whose parts lie side by side, and stores the result.
template <class T>
FASTATTN_NOINLINE void finish_block(const LinearParams& p, const float* c, int64_t c_row, int64_t up, int64_t first_row,
                                    int64_t rows, int64_t first, int64_t columns) {
  const int64_t outputs = p.out.size[3];
  for (int64_t i = 0; i < rows; i++, c += c_row) {
    const int64_t r = first_row + i;
    const vf scale = splat(p.norm ? ((const float*)p.rstd.data)[r] : 1.0f);
    T* out = (T*)p.out.data + r * p.out.stride[2] + first;
    T* product = p.product.data ? (T*)p.product.data + r * p.product.stride[2] + first : nullptr;
    const T* residual = p.residual.data ? (const T*)p.residual.data + r * p.residual.stride[2] + first : nullptr;
    for_columns(columns, [&](int64_t j, int n) {
      vf y = load(c + j) * scale;
      if (p.gated_up) {
        const vf u = load(c + up + j) * scale;
        if (product) {
          put(product + j, y, n);
          put(product + outputs + j, u, n);
        }
        y = SwiGlu::forward(sigmoid_divisor(y, out), y, u);
      }
      if (residual) y += get(residual + j, n);
      put(out + j, y, n);
    });
  }
}

template <class Unit>
static void linear_blocks(const LinearParams& p) {
  using Word = typename Unit::Word;
  const int64_t rows = p.out.size[2], outputs = p.out.size[3];
  const int64_t contracted = p.transposed ? p.x.size[2] : p.x.size[2] * p.x.size[3];
  const int64_t parts = p.gated_up ? 2 : 1;
  const PanelLayout<Unit> layout(contracted, outputs * parts, parts);
  const Word* panels = (const Word*)p.packed.data;

  // not a multiple of a page: such rows would share cache sets
  const int64_t stride = round_up(layout.steps, W) + 16;
  const int64_t block_rows = round_up(p.block_rows, kRows), block_panels = max64(1, p.block_columns / kPanel / parts);
  const int64_t width = block_panels * kPanel, c_row = width * parts + 16;
  const int64_t block_steps = max64(W, p.block_steps / Unit::kStep);
  const int64_t wave = max64(1, kRowsKib * 256 / stride / block_rows) * block_rows;  // rows packed at a time
  const int64_t packed_rows = round_up(min64(wave, round_up(rows, kRows)), kRows);
  Word* packed = nullptr;
  Blocks sums;  // of a thread's task
  with_scratch(0, [&](Arena& arena) { packed = arena.take<Word>(packed_rows * stride); });
  with_scratch(1, [&](Arena& arena) {
    sums = arena.blocks(p.threads, bytes_of([&](Arena& block) { block.take<float>(block_rows * c_row); }));
  });

  for (int64_t begin = 0; begin < rows; begin += wave) {
    const int64_t here = min64(wave, rows - begin);
    constexpr int64_t kPackRows = 4 * kRows;
    parallel_items((here + kPackRows - 1) / kPackRows, p.threads, [&](int64_t task, int) {
      const int64_t first = task * kPackRows, count = min64(kPackRows, here - first);
      Word* to = packed + first * stride;
      for (int64_t i = count; i < round_up(count, kRows); i++) std::memset(to + i * stride, 0, size_t(stride) * 4);
      if (p.transposed) return pack_columns<Unit>(p, to, stride, begin + first, count);
      with_element<Unit>(p.x.dtype, [&](auto* type) {
        pack_gated_rows<Unit, std::remove_pointer_t<decltype(type)>>(p, to, stride, begin + first, count);
      });
    });
    const int64_t row_blocks = (here + block_rows - 1) / block_rows;
    const int64_t chunks = (layout.part_panels + block_panels - 1) / block_panels;
    // rows are the inner index, so that threads read the same part of B at about the same time
    parallel_items(row_blocks * chunks, p.threads, [&](int64_t task, int thread) {
      const int64_t chunk = task / row_blocks, first = task % row_blocks * block_rows;
      const int64_t count = min64(block_rows, here - first), groups = (count + kRows - 1) / kRows;
      const int64_t panel = chunk * block_panels, last = min64(layout.part_panels, panel + block_panels);
      float* c = sums[thread].template take<float>(block_rows * c_row);
      std::memset(c, 0, size_t(groups * kRows * c_row) * 4);
      for (int64_t s = 0; s < layout.steps; s += block_steps) {
        const int64_t steps = min64(block_steps, layout.steps - s);
        for (int64_t part = 0; part < parts; part++) {
          for (int64_t j = panel; j < last; j++) {
            const Word* b = panels + layout.panel(part, j) + s * kPanel;
            for (int64_t g = 0; g < groups; g++)
              add_product<Unit>(kVecs, c + g * kRows * c_row + part * width + (j - panel) * kPanel, c_row,
                                packed + (first + g * kRows) * stride + s, stride, 1, b, steps);
          }
        }
      }
      with_dtype(p.out.dtype, [&](auto* type) {
        finish_block<std::remove_pointer_t<decltype(type)>>(p, c, c_row, width, begin + first, count, panel * kPanel,
                                                            min64(outputs, last * kPanel) - panel * kPanel);
      });
    });
  }
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
