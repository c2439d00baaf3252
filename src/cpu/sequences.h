// Tokens of (B, L, D) tensors, for kernels whose lanes are channels: their sequences, and the rows of a panel of
// channels.
#pragma once

#include "rowwise.h"

// A loop's body that is called with constants for whole vectors and for the remaining elements.
#define FASTATTN_INLINE_LAMBDA __attribute__((always_inline))

namespace fastattn {
namespace FASTATTN_ISA {

// A sequence is a batch entry, or with cu_seqlens (S + 1,) i64 a document of a batch of one between two offsets. Tokens
// after the last offset belong to no sequence.
class Sequences {
 public:
  Sequences(const Tensor& cu_seqlens, int64_t batches, int64_t length)
      : cuts_((const int64_t*)cu_seqlens.data),
        length_(length),
        count_(cu_seqlens.data ? cu_seqlens.size[3] - 1 : batches) {}

  int64_t count() const { return count_; }
  int64_t begin(int64_t s) const { return cuts_ ? cuts_[s] : 0; }
  int64_t end(int64_t s) const { return cuts_ ? cuts_[s + 1] : length_; }
  // A batch entry's sequences are [first_of, last_of), including those without tokens.
  int64_t first_of(int64_t batch) const { return cuts_ ? 0 : batch; }
  int64_t last_of(int64_t batch) const { return cuts_ ? count_ : batch + 1; }

  // Calls f(s, first, last) for the sequences of a batch entry with their tokens [first, last) in [begin, end).
  template <class F>
  FASTATTN_INLINE_MEMBER void within(int64_t batch, int64_t begin, int64_t end, const F& f) const {
    int64_t s = first_of(batch), beyond = last_of(batch);
    for (int64_t high = beyond; s < high;) {  // to the first that ends after `begin`
      const int64_t middle = (s + high) / 2;
      if (this->end(middle) > begin)
        high = middle;
      else
        s = middle + 1;
    }
    for (; s < beyond && this->begin(s) < end; s++) {
      const int64_t first = max64(this->begin(s), begin), last = min64(this->end(s), end);
      if (first < last) f(s, first, last);
    }
  }

 private:
  const int64_t* cuts_;
  int64_t length_, count_;
};

// A real number.
FASTATTN_INLINE float one(const float* p) { return *p; }
FASTATTN_INLINE float one(const bf16* p) { return __builtin_bit_cast(float, uint32_t(p->bits) << 16); }
FASTATTN_INLINE float one(const f16* p) { return load_n(p, 1)[0]; }

// A complex number.
struct Pair {
  float of[2];
};

// Rows of channels [first, first + count) of a batch entry of t (A, B, L, D). If the channels are strided, 16 rows at a
// time are copied to a contiguous tile. Two tiles are kept, so that the latest 17 rows can be used at once in either
// direction.
template <class E>
class PanelRows {
 public:
  static constexpr int64_t kRows = 16;
  static int64_t tile(int64_t count) { return 2 * kRows * count; }  // elements

  PanelRows(const Tensor& t, int64_t batch, int64_t first, int64_t count, E* tile)
      : tile_(tile), count_(count), length_(t.size[2]), row_(t.stride[2] / kUnit), lane_(t.stride[3] / kUnit) {
    const int64_t a = batch / t.size[1], b = batch % t.size[1];
    data_ = (const E*)t.data + (a * t.stride[0] + b * t.stride[1]) / kUnit + first * lane_;
    side_by_side_ = lane_ == 1 || count == 1;
  }
  bool side_by_side() const { return side_by_side_; }
  int64_t row() const { return row_; }

  const E* operator[](int64_t t) {
    if (side_by_side_) return data_ + t * row_;
    const int64_t block = t / kRows, place = block & 1;
    if (held_[place] != block) gather(block);
    return tile_ + (place * kRows + t % kRows) * count_;
  }

 private:
  static constexpr int64_t kUnit = std::is_same_v<E, Pair> ? 2 : 1;  // elements of the tensor
  const E* data_;
  E* tile_;
  int64_t count_, length_, row_, lane_;
  int64_t held_[2] = {-1, -1};
  bool side_by_side_;

  FASTATTN_NOINLINE_MEMBER void gather(int64_t block) {
    const int64_t rows = min64(kRows, length_ - block * kRows);
    const E* from = data_ + block * kRows * row_;
    E* to = tile_ + (block & 1) * kRows * count_;
    held_[block & 1] = block;
    if (lane_ == 0) {
      for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < count_; j++) to[i * count_ + j] = from[i * row_];
      return;
    }
    for (int64_t j = 0; j < count_; j++)
      for (int64_t i = 0; i < rows; i++) to[i * count_ + j] = from[i * row_ + j * lane_];
  }
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
