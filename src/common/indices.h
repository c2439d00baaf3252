// The contents of index tensors, which address memory. They are checked before a kernel runs: those of a compiled call
// are first seen there.
#pragma once
#include <stdexcept>
#include <string>
#include <type_traits>

#include "params.h"

namespace fastattn {

// Throws std::invalid_argument unless low <= value <= high.
inline void check_index(const char* name, int64_t position, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high)
    throw std::invalid_argument("fastattn: " + std::string(name) + " must lie in [" + std::to_string(low) + ", " +
                                std::to_string(high) + "], given " + std::to_string(value) + " at position " +
                                std::to_string(position));
}

inline void check_mask_indices(const AttentionParams& p) {
  const auto at = [](const Tensor& t, int64_t i) { return (int64_t)((const int32_t*)t.data)[i]; };
  const auto check_offsets = [&](const char* name, const Tensor& t, int64_t length) {
    for (int64_t i = 0; t.data && i < t.size[3]; i++)
      check_index(name, i, at(t, i), i ? at(t, i - 1) : 0, i ? length : 0);
  };
  check_offsets("cu_seqlens_q", p.cu_seqlens_q, p.q.size[2]);
  check_offsets("cu_seqlens_k", p.cu_seqlens_k, p.k.size[2]);
  const auto check_lengths = [&](const char* name, const Tensor& t, bool aligned) {
    for (int64_t i = 0; t.data && i < t.size[3]; i++) {
      const int64_t most = p.cu_seqlens_k.data ? at(p.cu_seqlens_k, i + 1) - at(p.cu_seqlens_k, i) : p.k.size[2];
      const int64_t entry = at(t, i), length = aligned ? length_of(entry) : entry;
      check_index(name, i, length > most ? entry : length, 0, most);
    }
  };
  check_lengths("prefix_lengths", p.prefix_lengths, false);
  check_lengths("key_lengths", p.key_lengths, true);
}

template <class P>
void check_indices(const P& p) {
  if constexpr (std::is_base_of_v<AttentionParams, P>) {
    check_mask_indices(p);
  } else if constexpr (std::is_same_v<P, SinkhornParams>) {
    for (int64_t i = 0; i < p.begins.size[3]; i++) {
      const int64_t begin = ((const int64_t*)p.begins.data)[i], count = ((const int64_t*)p.counts.data)[i];
      check_index("cu_seqlens", i, begin, 0, p.scores.size[2]);
      check_index("lengths", i, count, 0, p.scores.size[2] - begin);
    }
  }
}

}  // namespace fastattn
