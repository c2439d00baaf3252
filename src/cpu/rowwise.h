// Row-wise kernels: each makes one pass over memory, computes in float32 and rounds once.
#pragma once
#include "convert.h"
#include "math.h"
#include "parallel.h"

namespace fastattn {
namespace FASTATTN_ISA {

// Below `serial` elements a second thread costs more to start than it saves.
FASTATTN_INLINE int row_threads(int threads, int64_t rows, int64_t columns, int64_t serial = 1 << 14) {
  return rows * columns < serial ? 1 : threads;
}

// f(column, n) over a row: n == W for whole vectors, less for the last.
template <class F>
FASTATTN_INLINE void for_columns(int64_t columns, const F& f) {
  int64_t j = 0;
  for (; j + W <= columns; j += W) f(j, W);
  if (j < columns) f(j, (int)(columns - j));
}
template <class T>
FASTATTN_INLINE vf get(const T* p, int n) {
  return n == W ? load(p) : load_n(p, n);
}
template <class T>
FASTATTN_INLINE void put(T* p, vf x, int n) {
  if (n == W)
    store(p, x);
  else
    store_n(p, x, n);
}

// f.template operator()<V>(column, n) over a row: V == 2 whole vectors at a time, then V == 1, the last with n < W.
template <class F>
FASTATTN_INLINE void for_pairs(int64_t columns, const F& f) {
  int64_t j = 0;
  for (; j + 2 * W <= columns; j += 2 * W) f.template operator()<2>(j, W);
  for_columns(columns - j, [&](int64_t rest, int n) { f.template operator()<1>(j + rest, n); });
}
template <int V, class T>
FASTATTN_INLINE void get_pair(const T* p, int n, vf* x) {
  if constexpr (V == 2)
    load_pair(p, x);
  else
    x[0] = get(p, n);
}
// Stores x, and rounds x to the stored value.
template <int V, class T>
FASTATTN_INLINE void put_pair(T* p, int n, vf* x) {
  if constexpr (V == 2) {
    store_pair(p, x);
  } else {
    put(p, x[0], n);
    x[0] = rounded_to(x[0], p);
  }
}
template <int V, class T>
FASTATTN_INLINE void put_product(T* p, int n, const vf* x) {
  if constexpr (V == 2)
    store_pair_nearest(p, x);
  else
    put(p, nearest(x[0], p), n);
}
template <int V, class T>
FASTATTN_INLINE void put_ordered(T* p, int n, const vf* x) {
  if constexpr (V == 2)
    store_two(p, x[0], x[1]);
  else
    put(p, x[0], n);
}

// Prefetches the memory `ahead` bytes further on, also past a row's end: the processor's own prefetch ends with a page.
template <class... T>
FASTATTN_INLINE void fetch(int64_t ahead, const T*... p) {
  (__builtin_prefetch((const char*)p + ahead), ...);
}

// A weight of type T or float, in the order of values that load_pair of T returned.
template <int V, class T, class Weight>
FASTATTN_INLINE void get_weight(const Weight* p, int n, vf* w) {
  if constexpr (V == 2 && !std::is_same_v<T, Weight>) {
    w[0] = load(p), w[1] = load(p + W);
    pair((const T*)nullptr, w);
  } else {
    get_pair<V>(p, n, w);
  }
}

template <class T, class Weight = T>
static void rms_norm_rows(const RmsNormParams& p) {
  const Rows rows(p.x);
  const int64_t columns = p.x.size[3];
  const Weight* weight = (const Weight*)p.weight.data;
  parallel_ranges(rows.count, row_threads(p.threads, rows.count, columns, p.serial),
                  [&](int64_t begin, int64_t end, int) {
                    for (int64_t r = begin; r < end; r++) {
                      const T* x = row_of<const T>(p.x, rows, r);
                      T* normed = row_of<T>(p.normed, rows, r);
                      vf squares[2] = {};
                      const T* source = x;
                      if (p.residual.data) {
                        const T* residual = row_of<const T>(p.residual, rows, r);
                        T* total = row_of<T>(p.total, rows, r);
                        for_pairs(columns, [&]<int V>(int64_t j, int n) {
                          vf s[V], other[V];
                          fetch(p.prefetch, x + j, residual + j);
                          get_pair<V>(x + j, n, s);
                          get_pair<V>(residual + j, n, other);
                          FASTATTN_EACH(i, V) s[i] += other[i];
                          put_pair<V>(total + j, n, s);
                          FASTATTN_EACH(i, V) squares[i] += s[i] * s[i];
                        });
                        source = total;
                      } else {
                        for_pairs(columns, [&]<int V>(int64_t j, int n) {
                          vf s[V];
                          fetch(p.prefetch, x + j);
                          get_pair<V>(x + j, n, s);
                          FASTATTN_EACH(i, V) squares[i] += s[i] * s[i];
                        });
                      }
                      const float sum = reduce_add(squares[0] + squares[1]);
                      const float rstd = 1.0f / __builtin_sqrtf(sum / (float)columns + (float)p.eps);
                      if (p.rstd.data) *row_of<float>(p.rstd, rows, r) = rstd;
                      // the row is in L1 by now
                      for_pairs(columns, [&]<int V>(int64_t j, int n) {
                        vf y[V];
                        get_pair<V>(source + j, n, y);
                        FASTATTN_EACH(i, V) y[i] *= splat(rstd);
                        if (weight) {
                          vf w[V];
                          get_weight<V, T>(weight + j, n, w);
                          FASTATTN_EACH(i, V) y[i] *= w[i];
                        }
                        put_product<V>(normed + j, n, y);
                      });
                    }
                  });
}

// dx = rstd * (g - x * rstd^2 * mean(g * x)) with g = grad_normed * weight. Each thread sums grad_normed * x * rstd.
template <class T, class Weight = T>
static void rms_norm_backward_rows(const RmsNormBackwardParams& p) {
  const Rows rows(p.total);
  const int64_t columns = p.total.size[3];
  const Weight* weight = (const Weight*)p.weight.data;
  parallel_ranges(rows.count, p.threads, [&](int64_t begin, int64_t end, int thread) {
    float* partial = weight ? (float*)p.weight_partials.data + thread * columns : nullptr;
    for (int64_t r = begin; r < end; r++) {
      const T* x = row_of<const T>(p.total, rows, r);
      const T* grad_normed = row_of<const T>(p.grad_normed, rows, r);
      const T* grad_total = p.grad_total.data ? row_of<const T>(p.grad_total, rows, r) : nullptr;
      T* grad = row_of<T>(p.grad, rows, r);
      const float rstd = *row_of<const float>(p.rstd, rows, r);
      vf dots[2] = {};
      for_pairs(columns, [&]<int V>(int64_t j, int n) {
        vf xj[V], g[V];
        fetch(p.prefetch, x + j, grad_normed + j);
        get_pair<V>(x + j, n, xj);
        get_pair<V>(grad_normed + j, n, g);
        if (weight) {
          vf w[V], sum[V];  // sums in T's pair order
          get_weight<V, T>(weight + j, n, w);
          get_pair<V>(partial + j, n, sum);
          FASTATTN_EACH(i, V) sum[i] += g[i] * xj[i] * splat(rstd);
          put_pair<V>(partial + j, n, sum);
          FASTATTN_EACH(i, V) g[i] *= w[i];
        }
        FASTATTN_EACH(i, V) dots[i] += g[i] * xj[i];
      });
      const float mean = reduce_add(dots[0] + dots[1]) / (float)columns;
      const vf slope = splat(mean * rstd * rstd);
      for_pairs(columns, [&]<int V>(int64_t j, int n) {
        vf xj[V], g[V];
        get_pair<V>(x + j, n, xj);
        get_pair<V>(grad_normed + j, n, g);
        if (weight) {
          vf w[V];
          get_weight<V, T>(weight + j, n, w);
          FASTATTN_EACH(i, V) g[i] *= w[i];
        }
        FASTATTN_EACH(i, V) g[i] = (g[i] - xj[i] * slope) * splat(rstd);
        if (grad_total) {
          vf through[V];
          get_pair<V>(grad_total + j, n, through);
          FASTATTN_EACH(i, V) g[i] += through[i];
        }
        put_product<V>(grad + j, n, g);
      });
    }
    if (weight)
      for_pairs(columns, [&]<int V>(int64_t j, int n) {
        if constexpr (V == 2) {
          vf sum[2];
          get_pair<2>(partial + j, n, sum);
          unpair((const T*)nullptr, sum);
          put_pair<2>(partial + j, n, sum);
        }
      });
  });
}

// Gates: forward(d, a, b) with sigmoid(a) = 1 / d, and backward(s, a, b, grad, &da, &db) with s = sigmoid(a).
struct SwiGlu {
  FASTATTN_INLINE vf forward(vf d, vf a, vf b) { return a / d * b; }
  FASTATTN_INLINE void backward(vf s, vf a, vf b, vf grad, vf* da, vf* db) {
    const vf silu = a * s;
    *db = grad * silu;
    *da = grad * b * (s + silu * (splat(1.0f) - s));
  }
};
struct Gated {
  FASTATTN_INLINE vf forward(vf d, vf, vf b) { return b / d; }
  FASTATTN_INLINE void backward(vf s, vf, vf b, vf grad, vf* da, vf* db) {
    *db = grad * s;
    *da = grad * b * s * (splat(1.0f) - s);
  }
};

template <class Gate, class T>
static void gate_rows(const GateParams& p) {
  const Rows rows(p.a);
  const int64_t columns = p.a.size[3];
  parallel_ranges(rows.count, row_threads(p.threads, rows.count, columns, p.serial),
                  [&](int64_t begin, int64_t end, int) {
                    for (int64_t r = begin; r < end; r++) {
                      const T* a = row_of<const T>(p.a, rows, r);
                      const T* b = row_of<const T>(p.b, rows, r);
                      T* out = row_of<T>(p.out, rows, r);
                      for_pairs(columns, [&]<int V>(int64_t j, int n) {
                        vf x[V], y[V], d[V];
                        fetch(p.prefetch, a + j, b + j);
                        get_pair<V>(a + j, n, x);
                        sigmoid_divisors<V>(x, d, a);
                        get_pair<V>(b + j, n, y);
                        FASTATTN_EACH(i, V) y[i] = Gate::forward(d[i], x[i], y[i]);
                        put_product<V>(out + j, n, y);
                      });
                    }
                  });
}

template <class Gate, class T>
static void gate_backward_rows(const GateParams& p) {
  const Rows rows(p.a);
  const int64_t columns = p.a.size[3];
  parallel_ranges(rows.count, row_threads(p.threads, rows.count, columns, p.serial),
                  [&](int64_t begin, int64_t end, int) {
                    for (int64_t r = begin; r < end; r++) {
                      const T* a = row_of<const T>(p.a, rows, r);
                      const T* b = row_of<const T>(p.b, rows, r);
                      const T* grad = row_of<const T>(p.grad_out, rows, r);
                      T* grad_a = row_of<T>(p.grad_a, rows, r);
                      T* grad_b = row_of<T>(p.grad_b, rows, r);
                      for_pairs(columns, [&]<int V>(int64_t j, int n) {
                        vf x[V], y[V], g[V], d[V], da[V], db[V];
                        fetch(p.prefetch, a + j, b + j, grad + j);
                        get_pair<V>(a + j, n, x);
                        sigmoid_divisors<V>(x, d, a);
                        get_pair<V>(b + j, n, y);
                        get_pair<V>(grad + j, n, g);
                        FASTATTN_EACH(i, V) Gate::backward(splat(1.0f) / d[i], x[i], y[i], g[i], &da[i], &db[i]);
                        put_product<V>(grad_a + j, n, da);
                        put_product<V>(grad_b + j, n, db);
                      });
                    }
                  });
}

// The loop over heads is the inner one, so that a token's cos and sin row is read once from memory and then from L1.
// Two: the row has separate values for the second half. The inverse rotation is the transpose, which exchanges the
// halves' sines.
template <class T, bool Two>
static void rotary_rows_of(const RotaryParams& p) {
  const int64_t heads = p.x.size[1], length = p.x.size[2], half = p.x.size[3] / 2;
  const int64_t tokens = p.x.size[0] * length;
  const vf sign = splat(p.inverse ? -1.0f : 1.0f);
  const int threads = row_threads(p.threads, tokens, heads * half * 2, p.serial);
  parallel_ranges(tokens, threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; t++) {
      const int64_t batch = t / length, i = t % length;
      const int64_t row = ((const int32_t*)p.rows.data)[batch * p.rows.stride[0] + i];
      const float* cos = (const float*)p.cos.data + row * (Two ? 2 : 1) * half;
      const float* sin = (const float*)p.sin.data + row * (Two ? 2 : 1) * half;
      const float* to_left = Two && p.inverse ? sin + half : sin;
      const float* to_right = Two && !p.inverse ? sin + half : sin;
      for (int64_t h = 0; h < heads; h++) {
        const T* x = (const T*)p.x.data + batch * p.x.stride[0] + h * p.x.stride[1] + i * p.x.stride[2];
        T* out = (T*)p.out.data + batch * p.out.stride[0] + h * p.out.stride[1] + i * p.out.stride[2];
        for_pairs(half, [&]<int V>(int64_t j, int n) {
          vf left[V], right[V];
          FASTATTN_EACH(i, V) {
            const int64_t at = j + i * W;
            const vf first = get(x + at, n), second = get(x + half + at, n);
            const vf c = get(cos + at, n), s = get(to_left + at, n) * sign;
            left[i] = first * c - second * s;
            if constexpr (Two)
              right[i] = second * get(cos + half + at, n) + first * (get(to_right + at, n) * sign);
            else
              right[i] = second * c + first * s;
          }
          put_ordered<V>(out + j, n, left);
          put_ordered<V>(out + half + j, n, right);
        });
      }
    }
  });
}
template <class T>
static void rotary_rows(const RotaryParams& p) {
  if (p.cos.size[3] == p.x.size[3])
    rotary_rows_of<T, true>(p);
  else
    rotary_rows_of<T, false>(p);
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
