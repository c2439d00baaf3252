// Row kernels of a recurrence step: one pass over memory each, float32 inside, one rounding at the end.
#pragma once
#include "parallel.h"

namespace fastattn {
namespace FASTATTN_ISA {

constexpr int64_t kSerialElements = 1 << 14;  // below this a second thread costs more to start than it saves
FASTATTN_INLINE int row_threads(int threads, int64_t rows, int64_t columns) {
  return rows * columns < kSerialElements ? 1 : threads;
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

template <class T>
static void rms_norm_rows(const RmsNormParams& p) {
  const Rows rows(p.x);
  const int64_t columns = p.x.size[3];
  const T* weight = (const T*)p.weight.data;
  parallel_ranges(rows.count, row_threads(p.threads, rows.count, columns), [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; r++) {
      const T* x = row_of<const T>(p.x, rows, r);
      T* normed = row_of<T>(p.normed, rows, r);
      vf squares[4] = {};
      const T* source = x;
      if (p.residual.data) {
        const T* residual = row_of<const T>(p.residual, rows, r);
        T* total = row_of<T>(p.total, rows, r);
        int lane = 0;
        for_columns(columns, [&](int64_t j, int n) {
          const vf s = rounded_to(get(x + j, n) + get(residual + j, n), total);
          put(total + j, s, n);
          squares[lane & 3] += s * s;
          lane++;
        });
        source = total;
      } else {
        int lane = 0;
        for_columns(columns, [&](int64_t j, int n) {
          const vf s = get(x + j, n);
          squares[lane & 3] += s * s;
          lane++;
        });
      }
      const float sum = reduce_add((squares[0] + squares[1]) + (squares[2] + squares[3]));
      const float rstd = 1.0f / __builtin_sqrtf(sum / (float)columns + (float)p.eps);
      *row_of<float>(p.rstd, rows, r) = rstd;
      // the row is in L1 by now
      for_columns(columns, [&](int64_t j, int n) {
        vf y = get(source + j, n) * splat(rstd);
        if (weight) y *= get(weight + j, n);
        put(normed + j, y, n);
      });
    }
  });
}

// dx = rstd * (g - x * rstd^2 * mean(g * x)), g = grad_normed * weight; dweight sums grad_normed * x * rstd by thread.
template <class T>
static void rms_norm_backward_rows(const RmsNormBackwardParams& p) {
  const Rows rows(p.total);
  const int64_t columns = p.total.size[3];
  const T* weight = (const T*)p.weight.data;
  parallel_ranges(rows.count, p.threads, [&](int64_t begin, int64_t end, int thread) {
    float* partial = weight ? (float*)p.weight_partials.data + thread * columns : nullptr;
    for (int64_t r = begin; r < end; r++) {
      const T* x = row_of<const T>(p.total, rows, r);
      const T* grad_normed = row_of<const T>(p.grad_normed, rows, r);
      const T* grad_total = p.grad_total.data ? row_of<const T>(p.grad_total, rows, r) : nullptr;
      T* grad = row_of<T>(p.grad, rows, r);
      const float rstd = *row_of<const float>(p.rstd, rows, r);
      vf dots[2] = {};
      int lane = 0;
      for_columns(columns, [&](int64_t j, int n) {
        const vf xj = get(x + j, n);
        vf g = get(grad_normed + j, n);
        if (weight) {
          put(partial + j, get(partial + j, n) + g * xj * splat(rstd), n);
          g *= get(weight + j, n);
        }
        dots[lane & 1] += g * xj;
        lane++;
      });
      const float mean = reduce_add(dots[0] + dots[1]) / (float)columns;
      const vf slope = splat(mean * rstd * rstd);
      for_columns(columns, [&](int64_t j, int n) {
        vf g = get(grad_normed + j, n);
        if (weight) g *= get(weight + j, n);
        vf y = (g - get(x + j, n) * slope) * splat(rstd);
        if (grad_total) y += get(grad_total + j, n);
        put(grad + j, y, n);
      });
    }
  });
}

// Gates: forward(s, a, b) and backward(s, a, b, grad, &da, &db) with s = sigmoid(a).
struct SwiGlu {
  FASTATTN_INLINE vf forward(vf s, vf a, vf b) { return a * s * b; }
  FASTATTN_INLINE void backward(vf s, vf a, vf b, vf grad, vf* da, vf* db) {
    const vf silu = a * s;
    *db = grad * silu;
    *da = grad * b * (s + silu * (splat(1.0f) - s));
  }
};
struct Gated {
  FASTATTN_INLINE vf forward(vf s, vf, vf b) { return s * b; }
  FASTATTN_INLINE void backward(vf s, vf, vf b, vf grad, vf* da, vf* db) {
    *db = grad * s;
    *da = grad * b * s * (splat(1.0f) - s);
  }
};

// f.template operator()<U>(column, n): U whole vectors (n == W) at a time, then one by one, the last of n < W.
template <int U, class F>
FASTATTN_INLINE void for_blocks(int64_t columns, const F& f) {
  int64_t j = 0;
  for (; j + U * W <= columns; j += U * W) f.template operator()<U>(j, W);
  for (; j + W <= columns; j += W) f.template operator()<1>(j, W);
  if (j < columns) f.template operator()<1>(j, (int)(columns - j));
}

constexpr int kGateVectors = 2;

template <class Gate, class T>
static void gate_rows(const GateParams& p) {
  const Rows rows(p.a);
  const int64_t columns = p.a.size[3];
  parallel_ranges(rows.count, row_threads(p.threads, rows.count, columns), [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; r++) {
      const T* a = row_of<const T>(p.a, rows, r);
      const T* b = row_of<const T>(p.b, rows, r);
      T* out = row_of<T>(p.out, rows, r);
      for_blocks<kGateVectors>(columns, [&]<int U>(int64_t j, int n) {
        vf x[U], s[U];
        FASTATTN_EACH(i, U) x[i] = get(a + j + i * W, n);
        sigmoids<U>(x, s);
        FASTATTN_EACH(i, U) put(out + j + i * W, Gate::forward(s[i], x[i], get(b + j + i * W, n)), n);
      });
    }
  });
}

template <class Gate, class T>
static void gate_backward_rows(const GateParams& p) {
  const Rows rows(p.a);
  const int64_t columns = p.a.size[3];
  parallel_ranges(rows.count, row_threads(p.threads, rows.count, columns), [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; r++) {
      const T* a = row_of<const T>(p.a, rows, r);
      const T* b = row_of<const T>(p.b, rows, r);
      const T* grad = row_of<const T>(p.grad_out, rows, r);
      T* grad_a = row_of<T>(p.grad_a, rows, r);
      T* grad_b = row_of<T>(p.grad_b, rows, r);
      for_blocks<kGateVectors>(columns, [&]<int U>(int64_t j, int n) {
        vf x[U], s[U];
        FASTATTN_EACH(i, U) x[i] = get(a + j + i * W, n);
        sigmoids<U>(x, s);
        FASTATTN_EACH(i, U) {
          const int64_t c = j + i * W;
          vf da, db;
          Gate::backward(s[i], x[i], get(b + c, n), get(grad + c, n), &da, &db);
          put(grad_a + c, da, n);
          put(grad_b + c, db, n);
        }
      });
    }
  });
}

// Tokens outer, heads inner: a token's cos and sin row is read once from memory and then from L1.
template <class T>
static void rotary_rows(const RotaryParams& p) {
  const int64_t heads = p.x.size[1], length = p.x.size[2], half = p.x.size[3] / 2;
  const int64_t tokens = p.x.size[0] * length;
  const vf sign = splat(p.inverse ? -1.0f : 1.0f);
  const int threads = row_threads(p.threads, tokens, heads * half * 2);
  parallel_ranges(tokens, threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; t++) {
      const int64_t batch = t / length, i = t % length;
      const int64_t row = ((const int32_t*)p.rows.data)[batch * p.rows.stride[0] + i];
      const float* cos = (const float*)p.cos.data + row * half;
      const float* sin = (const float*)p.sin.data + row * half;
      for (int64_t h = 0; h < heads; h++) {
        const T* x = (const T*)p.x.data + batch * p.x.stride[0] + h * p.x.stride[1] + i * p.x.stride[2];
        T* out = (T*)p.out.data + batch * p.out.stride[0] + h * p.out.stride[1] + i * p.out.stride[2];
        for_columns(half, [&](int64_t j, int n) {
          const vf first = get(x + j, n), second = get(x + half + j, n);
          const vf c = get(cos + j, n), s = get(sin + j, n) * sign;
          put(out + j, first * c - second * s, n);
          put(out + half + j, second * c + first * s, n);
        });
      }
    }
  });
}

// --- entry points: one a kernel, switching on the dtype -------------------------------------------------------------

static void rms_norm(const RmsNormParams& p) {
  with_dtype(p.x.dtype, [&](auto* t) { rms_norm_rows<std::remove_pointer_t<decltype(t)>>(p); });
}
static void rms_norm_backward(const RmsNormBackwardParams& p) {
  with_dtype(p.total.dtype, [&](auto* t) { rms_norm_backward_rows<std::remove_pointer_t<decltype(t)>>(p); });
}
static void swiglu(const GateParams& p) {
  with_dtype(p.a.dtype, [&](auto* t) { gate_rows<SwiGlu, std::remove_pointer_t<decltype(t)>>(p); });
}
static void swiglu_backward(const GateParams& p) {
  with_dtype(p.a.dtype, [&](auto* t) { gate_backward_rows<SwiGlu, std::remove_pointer_t<decltype(t)>>(p); });
}
static void gated(const GateParams& p) {
  with_dtype(p.a.dtype, [&](auto* t) { gate_rows<Gated, std::remove_pointer_t<decltype(t)>>(p); });
}
static void gated_backward(const GateParams& p) {
  with_dtype(p.a.dtype, [&](auto* t) { gate_backward_rows<Gated, std::remove_pointer_t<decltype(t)>>(p); });
}
static void rotary(const RotaryParams& p) {
  with_dtype(p.x.dtype, [&](auto* t) { rotary_rows<std::remove_pointer_t<decltype(t)>>(p); });
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
