// out (M, N) = x (M, K) weight (N, K)^T for a few rows, bound by reading the weights; sums are float32. x and out have
// the weight's type or are float32.
#pragma once
#include "arena.h"
#include "parallel.h"

namespace fastattn {
namespace FASTATTN_ISA {

constexpr int64_t kSerialWeights = 1 << 15;  // below this a second thread costs more to start than it saves

// Products of kWidth neighbouring weights and elements of a row of x. x is kept as `Element`s, padded with zeros.
//
// In float32: kWidth is 2W. x is in the pair order of the weight's type T, except that the last incomplete pair of a
// row is in memory's order.
template <class T>
struct Widened {
  typedef T Weight;
  typedef float Element;
  static constexpr int kWidth = 2 * W, kMostRows = 4;
  vf halves[2];

  FASTATTN_INLINE Widened of(const T* w) {
    Widened x;
    load_pair(w, x.halves);
    return x;
  }
  FASTATTN_INLINE Widened of_first(const T* w, int n) {
    return {{load_n(w, n < W ? n : W), n > W ? load_n(w + W, n - W) : vf{}}};
  }
  inline __attribute__((always_inline)) void add_half(int i, vf& sum, const float* x) const {
    sum += halves[i] * load(x + i * W);
  }
  template <class X>
  static void keep_row(const X* from, int64_t K, float* to) {
    int64_t k = 0;
    for (; k + kWidth <= K; k += kWidth) {
      vf two[2];
      load_pair(from + k, two);
      if (!std::is_same_v<X, T>) pair((const T*)nullptr, two);  // X is float: in memory's order
      store(to + k, two[0]);
      store(to + k + W, two[1]);
    }
    if (k == K) return;
    const int n = int(K - k);
    store(to + k, load_n(from + k, n < W ? n : W));
    store(to + k + W, n > W ? load_n(from + k + W, n - W) : vf{});
  }
};

// By the bf16 dot: kWidth is 4W. x is bf16, in memory's order.
struct Dotted {
  typedef bf16 Weight;
  typedef bf16 Element;
  static constexpr int kWidth = 4 * W, kMostRows = 8;
  vu words[2];

  FASTATTN_INLINE Dotted of(const bf16* w) {
    Dotted x;
    memcpy(x.words, w, sizeof x.words);
    return x;
  }
  FASTATTN_INLINE Dotted of_first(const bf16* w, int n) {
    Dotted x{};
    memcpy(x.words, w, size_t(n) * sizeof *w);
    return x;
  }
  inline __attribute__((always_inline)) void add_half(int i, vf& sum, const bf16* x) const {
    vu other;
    memcpy(&other, x + i * 2 * W, sizeof other);
    sum = dot_pairs(sum, words[i], other);
  }
  template <class X>
  static void keep_row(const X* from, int64_t K, bf16* to) {
    static_assert(std::is_same_v<X, bf16>);
    memcpy((void*)to, from, size_t(K) * sizeof *to);
    memset((void*)(to + K), 0, size_t(round_up(K, kWidth) - K) * sizeof *to);
  }
};

// Outputs [first, first + J) of M rows from `top` on. The order of a row's sum does not depend on J, and depends on M
// only by M <= 2.
template <class Factor, int M, int J>
FASTATTN_INLINE void matvec_block(const MatvecParams& p, const typename Factor::Element* x, int64_t x_row, int64_t top,
                                  int64_t first) {
  using T = typename Factor::Weight;
  // bytes to prefetch ahead, also past the end of a row; measured, from memory and from a shared cache
  constexpr int64_t kAhead = J == 1 ? 2048 : 4096;
  constexpr int kSums = M <= 2 ? 2 : 1;  // for one output of a row: additions to a single sum wait for each other
  const int64_t K = p.x.size[3], stride = p.weight.stride[2];
  const T* weight = (const T*)p.weight.data + first * stride;
  x += top * x_row;
  vf sums[J][M][kSums];
  FASTATTN_EACH(j, J) FASTATTN_EACH(m, M) FASTATTN_EACH(c, kSums) sums[j][m][c] = vf{};
  int64_t k = 0;
  for (; k + Factor::kWidth <= K; k += Factor::kWidth) {
    Factor w[J];
    FASTATTN_EACH(j, J) {
      const T* from = weight + j * stride + k;
      __builtin_prefetch((const char*)from + kAhead);
      if constexpr (Factor::kWidth * sizeof(T) > 64) __builtin_prefetch((const char*)from + kAhead + 64);
      w[j] = Factor::of(from);
    }
    FASTATTN_EACH(m, M)
    FASTATTN_EACH(i, 2)
    FASTATTN_EACH(j, J) w[j].add_half(i, sums[j][m][i % kSums], x + m * x_row + k);
  }
  if (k < K) {
    FASTATTN_EACH(j, J) {
      const Factor w = Factor::of_first(weight + j * stride + k, int(K - k));
      FASTATTN_EACH(m, M) FASTATTN_EACH(i, 2) w.add_half(i, sums[j][m][i % kSums], x + m * x_row + k);
    }
  }
  float result[M][J];
  FASTATTN_EACH(m, M)
  FASTATTN_EACH(j, J) result[m][j] = reduce_add(kSums == 2 ? sums[j][m][0] + sums[j][m][1] : sums[j][m][0]);
  for (int64_t m = 0; m < min64(M, p.x.size[2] - top); m++) {
    vf row{};
    memcpy(&row, result[m], sizeof result[m]);
    const int64_t at = (top + m) * p.out.stride[2] + first;
    if (p.out.dtype == DType::f32) {
      float* to = (float*)p.out.data + at;
      store_n(to, p.add ? row + load_n(to, J) : row, J);
    } else {
      store_n((T*)p.out.data + at, row, J);
    }
  }
}

// More rows than M are processed in turns: the weights are then in L1.
template <class Factor, int M, int J>
FASTATTN_NOINLINE void matvec_columns(const MatvecParams& p, const typename Factor::Element* x, int64_t x_row,
                                      int64_t begin, int64_t end) {
  int64_t n = begin;
  for (; n + J <= end; n += J)
    for (int64_t top = 0; top < p.x.size[2]; top += M) matvec_block<Factor, M, J>(p, x, x_row, top, n);
  if constexpr (J > 1) matvec_columns<Factor, M, 1>(p, x, x_row, n, end);
}

// Reads `rows_at_once` rows of weight at a time, or fewer if half of the registers do not hold their sums.
template <class Factor, int M>
static void matvec_range(const MatvecParams& p, const typename Factor::Element* x, int64_t x_row, int64_t begin,
                         int64_t end) {
  constexpr int kMost = kRegisters / 2 / (M <= 2 ? 2 * M : M);
  if constexpr (kMost >= 4) {
    if (p.rows_at_once >= 4) return matvec_columns<Factor, M, 4>(p, x, x_row, begin, end);
  }
  if (p.rows_at_once >= 2) return matvec_columns<Factor, M, 2>(p, x, x_row, begin, end);
  matvec_columns<Factor, M, 1>(p, x, x_row, begin, end);
}

template <class Factor, class X>
static void matvec_by(const MatvecParams& p) {
  using Element = typename Factor::Element;
  const int64_t rows = p.x.size[2], K = p.x.size[3], N = p.weight.size[2];
  const int64_t x_row = round_up(K, Factor::kWidth);
  const int64_t padded = rows <= 2 ? rows : round_up(rows, 4);  // rows <= 8
  Element* x = nullptr;
  with_scratch(0, [&](Arena& arena) { x = arena.take<Element>(padded * x_row); });
  memset((void*)(x + rows * x_row), 0, size_t((padded - rows) * x_row) * sizeof(Element));
  for (int64_t m = 0; m < rows; m++) Factor::keep_row((const X*)p.x.data + m * p.x.stride[2], K, x + m * x_row);
  const int threads = N * K < kSerialWeights ? 1 : p.threads;
  parallel_ranges(N, threads, [&](int64_t begin, int64_t end, int) {
    if (rows == 1) return matvec_range<Factor, 1>(p, x, x_row, begin, end);
    if (rows == 2) return matvec_range<Factor, 2>(p, x, x_row, begin, end);
    if constexpr (Factor::kMostRows == 8)
      if (rows > 4) return matvec_range<Factor, 8>(p, x, x_row, begin, end);
    matvec_range<Factor, 4>(p, x, x_row, begin, end);
  });
}

// With one row reading the weights is the bound for either product, and float32 keeps subnormals.
template <class T, class X>
static void matvec_rows(const MatvecParams& p) {
#if defined(FASTATTN_BF16_DOT)
  if constexpr (std::is_same_v<T, bf16> && std::is_same_v<X, bf16>)
    if (p.dot && p.x.size[2] > 1) return matvec_by<Dotted, X>(p);
#endif
  matvec_by<Widened<T>, X>(p);
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
