// out (M, N) = x (M, K) weight (N, K)^T for a few rows: as fast as the weights can be read, float32 sums.
#pragma once
#include "parallel.h"
#include "scratch.h"
#include "tile.h"

namespace fastattn {
namespace FASTATTN_ISA {

constexpr int kMatvecRows = 8;
constexpr int64_t kSerialWeights = 1 << 15;  // below this a second thread costs more to start than it saves

// J outputs of up to M rows; x (M, K) float32, zero past the rows there are, in T's pair order, the last incomplete
// pair of a row in memory's order.
template <int M, int J, class T>
FASTATTN_INLINE void matvec_block(const MatvecParams& p, const float* x, int64_t x_row, int64_t first) {
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
    FASTATTN_EACH(j, J) load_pair(weight[j] + k, w[j]);
    FASTATTN_EACH(m, M) {
      FASTATTN_EACH(i, 2) {
        const vf at = load(x + m * x_row + k + i * W);
        FASTATTN_EACH(j, J) sums[j][m] += w[j][i] * at;
      }
    }
  }
  for (; k < K; k += W) {
    const int n = (int)min64(W, K - k);
    FASTATTN_EACH(j, J) {
      const vf w = load_n(weight[j] + k, n);
      FASTATTN_EACH(m, M) sums[j][m] += w * load(x + m * x_row + k);
    }
  }
  float result[M][J];
  FASTATTN_EACH(m, M) FASTATTN_EACH(j, J) result[m][j] = reduce_add(sums[j][m]);
  for (int64_t m = 0; m < p.x.size[2]; m++) {
    vf row{};
    memcpy(&row, result[m], sizeof result[m]);
    store_n((T*)p.out.data + m * p.out.stride[2] + first, row, J);
  }
}

template <int M, class T>
FASTATTN_NOINLINE void matvec_columns(const MatvecParams& p, const float* x, int64_t x_row, int64_t begin,
                                      int64_t end) {
  constexpr int J = M <= 2 ? 4 : M <= 4 ? 2 : 1;
  int64_t n = begin;
  for (; n + J <= end; n += J) matvec_block<M, J, T>(p, x, x_row, n);
  for (; n < end; n++) matvec_block<M, 1, T>(p, x, x_row, n);
}

template <class T>
static void matvec_rows(const MatvecParams& p) {
  const int64_t rows = p.x.size[2], K = p.x.size[3], N = p.weight.size[2];
  const int64_t x_row = round_up(K, 2 * W);
  const int64_t padded = rows <= 2 ? rows : rows <= 4 ? 4 : kMatvecRows;
  float* x = (float*)cpu::scratch(0, padded * x_row * sizeof(float));
  memset(x + rows * x_row, 0, (padded - rows) * x_row * sizeof(float));
  for (int64_t m = 0; m < rows; m++) {
    const T* from = (const T*)p.x.data + m * p.x.stride[2];
    float* to = x + m * x_row;
    int64_t k = 0;
    for (; k + 2 * W <= K; k += 2 * W) {
      vf pair[2];
      load_pair(from + k, pair);
      store(to + k, pair[0]);
      store(to + k + W, pair[1]);
    }
    for (; k < K; k += W) store(to + k, load_n(from + k, (int)min64(W, K - k)));
  }
  const int threads = N * K < kSerialWeights ? 1 : p.threads;
  parallel_ranges(N, threads, [&](int64_t begin, int64_t end, int) {
    if (rows == 1) return matvec_columns<1, T>(p, x, x_row, begin, end);
    if (rows == 2) return matvec_columns<2, T>(p, x, x_row, begin, end);
    if (rows <= 4) return matvec_columns<4, T>(p, x, x_row, begin, end);
    return matvec_columns<kMatvecRows, T>(p, x, x_row, begin, end);
  });
}

static void matvec(const MatvecParams& p) {
  with_dtype(p.x.dtype, [&](auto* t) { matvec_rows<std::remove_pointer_t<decltype(t)>>(p); });
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
