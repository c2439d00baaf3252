// out (M, N) = x (M, K) weight (N, K)^T for a few rows: as fast as the weights can be read, float32 sums. x and out
// have the weight's type or are float32.
#pragma once
#include "arena.h"
#include "parallel.h"

namespace fastattn {
namespace FASTATTN_ISA {

constexpr int64_t kSerialWeights = 1 << 15;  // below this a second thread costs more to start than it saves

constexpr int64_t kAhead = 4096;  // bytes that are fetched before they are read: the rows are too short for the
                                  // processor to find out by itself how they go on

// J outputs of up to M rows from `top` on; x (M, K) float32, zero past the rows there are, in T's pair order, the last
// incomplete pair of a row in memory's order.
template <int M, int J, class T>
FASTATTN_INLINE void matvec_block(const MatvecParams& p, const float* x, int64_t x_row, int64_t top, int64_t first) {
  const int64_t K = p.x.size[3];
  const T* weight[J];
  vf sums[J][M];
  FASTATTN_EACH(j, J) {
    weight[j] = (const T*)p.weight.data + (first + j) * p.weight.stride[2];
    FASTATTN_EACH(m, M) sums[j][m] = vf{};
  }
  int64_t k = 0;
  for (; k + 2 * W <= K; k += 2 * W) {
    vf w[J][2];
    FASTATTN_EACH(j, J) __builtin_prefetch((const char*)(weight[j] + k) + kAhead);
    FASTATTN_EACH(j, J) load_pair(weight[j] + k, w[j]);
    FASTATTN_EACH(m, M) {
      FASTATTN_EACH(i, 2) {
        const vf at = load(x + (top + m) * x_row + k + i * W);
        FASTATTN_EACH(j, J) sums[j][m] += w[j][i] * at;
      }
    }
  }
  for (; k < K; k += W) {
    const int n = (int)min64(W, K - k);
    FASTATTN_EACH(j, J) {
      const vf w = load_n(weight[j] + k, n);
      FASTATTN_EACH(m, M) sums[j][m] += w * load(x + (top + m) * x_row + k);
    }
  }
  float result[M][J];
  FASTATTN_EACH(m, M) FASTATTN_EACH(j, J) result[m][j] = reduce_add(sums[j][m]);
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

// More than four rows in turns: the weights are then in L1, and each that is loaded serves two sums at once.
template <int M, int J, class T>
FASTATTN_INLINE void matvec_turns(const MatvecParams& p, const float* x, int64_t x_row, int64_t first) {
  for (int64_t top = 0; top < p.x.size[2]; top += M) matvec_block<M, J, T>(p, x, x_row, top, first);
}

template <int M, class T>
FASTATTN_NOINLINE void matvec_columns(const MatvecParams& p, const float* x, int64_t x_row, int64_t begin,
                                      int64_t end) {
  constexpr int J = M <= 2 ? 4 : 2;
  int64_t n = begin;
  for (; n + J <= end; n += J) matvec_turns<M, J, T>(p, x, x_row, n);
  for (; n < end; n++) matvec_turns<M, 1, T>(p, x, x_row, n);
}

template <class T, class X>
static void matvec_rows(const MatvecParams& p) {
  const int64_t rows = p.x.size[2], K = p.x.size[3], N = p.weight.size[2];
  const int64_t x_row = round_up(K, 2 * W);
  const int64_t padded = rows <= 2 ? rows : round_up(rows, 4);
  float* x = nullptr;
  with_scratch(0, [&](Arena& arena) { x = arena.take<float>(padded * x_row); });
  memset(x + rows * x_row, 0, (padded - rows) * x_row * sizeof(float));
  for (int64_t m = 0; m < rows; m++) {
    const X* from = (const X*)p.x.data + m * p.x.stride[2];
    float* to = x + m * x_row;
    int64_t k = 0;
    for (; k + 2 * W <= K; k += 2 * W) {
      vf two[2];
      load_pair(from + k, two);
      if (!std::is_same_v<X, T>) pair((const T*)nullptr, two);  // X is float: in memory's order
      store(to + k, two[0]);
      store(to + k + W, two[1]);
    }
    for (; k < K; k += W) store(to + k, load_n(from + k, (int)min64(W, K - k)));
  }
  const int threads = N * K < kSerialWeights ? 1 : p.threads;
  parallel_ranges(N, threads, [&](int64_t begin, int64_t end, int) {
    if (rows == 1) return matvec_columns<1, T>(p, x, x_row, begin, end);
    if (rows == 2) return matvec_columns<2, T>(p, x, x_row, begin, end);
    matvec_columns<4, T>(p, x, x_row, begin, end);
  });
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
