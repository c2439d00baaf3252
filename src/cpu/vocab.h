// Row kernels of the output layer: what happens to logits between the matrix products of a loss over classes.
#pragma once
#include "recurrence.h"

namespace fastattn {
namespace FASTATTN_ISA {

FASTATTN_INLINE int64_t index_at(const Tensor& t, int64_t i) {
  return t.dtype == DType::i64 ? ((const int64_t*)t.data)[i * t.stride[3]] : ((const int32_t*)t.data)[i * t.stride[3]];
}
FASTATTN_INLINE float* float_at(const Tensor& t, int64_t i) { return (float*)t.data + i * t.stride[3]; }

constexpr float kInfinity = __builtin_inff();

FASTATTN_INLINE vf absolute(vf x) { return as_vf(as_vu(x) & splat_u(0x7fffffff)); }

// Below 0.6 a polynomial (relative error 8e-8), so that small values keep their digits.
FASTATTN_INLINE vf tanh(vf x) {
  const vf z = x * x;
  vf p = splat(-0.005905856844f);
  p = p * z + splat(0.02080537379f);
  p = p * z + splat(-0.0537866801f);
  p = p * z + splat(0.1333195865f);
  p = p * z + splat(-0.3333329856f);
  const vf small = x + x * (z * p);
  const vf large = splat(1.0f) - splat(2.0f) / (exp(x + x) + splat(1.0f));
  return select(absolute(x) < splat(0.6f), small, large);
}

// StableMax's s(x) = x + 1 for x >= 0, 1 / (1 - x) below.
FASTATTN_INLINE vf stable(vf x) {
  const vf r = splat(1.0f) + absolute(x);
  return select(x >= splat(0.0f), r, splat(1.0f) / r);
}
FASTATTN_INLINE float symlog(float x) { return x >= 0 ? __builtin_log1pf(x) : -__builtin_log1pf(-x); }

template <class T>
FASTATTN_INLINE float scalar_at(const T* p) {
  return get(p, 1)[0];
}

// x + bias, capped, over the temperature, in place.
template <class T>
FASTATTN_INLINE void prepare_row(T* x, int64_t columns, const float* bias, float cap, float over_temperature) {
  const vf over = splat(over_temperature), up = splat(cap), down = splat(cap != 0 ? 1.0f / cap : 0.0f);
  for_columns(columns, [&](int64_t j, int n) {
    vf y = get(x + j, n);
    if (bias) y += get(bias + j, n);
    if (cap != 0) y = up * tanh(y * down);
    put(x + j, y * over, n);
  });
}

template <class T>
FASTATTN_INLINE float row_maximum(const T* x, int64_t columns) {
  vf m[4] = {splat(-kInfinity), splat(-kInfinity), splat(-kInfinity), splat(-kInfinity)};
  int64_t j = 0;
  for (; j + 4 * W <= columns; j += 4 * W)
    for (int i = 0; i < 4; i++) m[i] = vmax(load(x + j + i * W), m[i]);
  for (; j + W <= columns; j += W) m[0] = vmax(load(x + j), m[0]);
  float best = reduce_max(vmax(vmax(m[0], m[1]), vmax(m[2], m[3])));
  for (; j < columns; j++) {
    const float y = scalar_at(x + j);
    best = y > best ? y : best;
  }
  return best;
}

// Sum of f over a row; the lanes that a last part of a vector lacks count as zero.
template <class T, class F>
FASTATTN_INLINE float row_sum(const T* x, int64_t columns, const F& f) {
  vf s[4] = {};
  int64_t j = 0;
  for (; j + 4 * W <= columns; j += 4 * W)
    for (int i = 0; i < 4; i++) s[i] += f(load(x + j + i * W));
  for (; j + W <= columns; j += W) s[0] += f(load(x + j));
  float sum = reduce_add((s[0] + s[1]) + (s[2] + s[3]));
  if (j < columns) {
    const vf last = f(load_n(x + j, (int)(columns - j)));
    for (int i = 0; i < (int)(columns - j); i++) sum += last[i];
  }
  return sum;
}

// out = e^(x - shift), and its sum.
static float exponentials(const float* x, float* out, int64_t columns, vf shift) {
  vf s[4] = {};
  const auto put_at = [&](int64_t j) {
    const vf e = exp(load(x + j) - shift);
    store(out + j, e);
    return e;
  };
  int64_t j = 0;
  for (; j + 4 * W <= columns; j += 4 * W)
    for (int i = 0; i < 4; i++) s[i] += put_at(j + i * W);
  for (; j + W <= columns; j += W) s[0] += put_at(j);
  float sum = reduce_add((s[0] + s[1]) + (s[2] + s[3]));
  if (j < columns) {
    const int n = (int)(columns - j);
    const vf e = exp(load_n(x + j, n) - shift);
    store_n(out + j, e, n);
    for (int i = 0; i < n; i++) sum += e[i];
  }
  return sum;
}

// Statistics and gradient of a whole row of prepared logits, with one exponential an element; the target's share is
// left in.
static void softmax_row(const VocabRowsParams& p, int64_t r, const float* x, float* out, int64_t columns) {
  const float largest = row_maximum(x, columns);
  const float sum = exponentials(x, out, columns, splat(largest));
  const float lse = largest + __builtin_logf(sum);
  *float_at(p.row_max, r) = largest;
  *float_at(p.row_sum, r) = sum;
  *float_at(p.lse, r) = lse;
  const vf weight = splat(*float_at(p.grad, r) * (1.0f + 2.0f * (float)p.z_loss * lse) / sum);
  for_columns(columns, [&](int64_t j, int n) { put(out + j, get(out + j, n) * weight, n); });
}

template <class T, bool Stable>
static void vocab_rows_of(const VocabRowsParams& p) {
  const int64_t columns = p.x.size[3];
  const float cap = (float)p.softcap;
  const bool prepared = p.bias.data || p.softcap != 0 || p.temperature.data;
  const int threads = row_threads(p.threads, p.x.size[2], columns);
  parallel_ranges(p.x.size[2], threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; r++) {
      T* x = (T*)p.x.data + r * p.x.stride[2];
      T* out = (T*)p.out.data + r * p.out.stride[2];
      const int64_t target = index_at(p.target, r);
      if (target == p.ignore_index) {
        if (p.statistics) *float_at(p.picked, r) = *float_at(p.lse, r) = 0;
        if (p.gradient) for_columns(columns, [&](int64_t j, int n) { put(out + j, vf{}, n); });
        continue;
      }
      const float temperature = p.temperature.data ? *float_at(p.temperature, r) : 1.0f;
      const float over = 1.0f / temperature;
      if (prepared) prepare_row(x, columns, (const float*)p.bias.data, cap, over);
      const int64_t column = target - p.first;
      const bool here = column >= 0 && column < columns;
      const float y = here ? scalar_at(x + column) : 0.0f;
      float sum = 0;

      if constexpr (!Stable && std::is_same_v<T, float>) {
        if (p.statistics && p.gradient && cap == 0 && !p.temperature.data) {
          softmax_row(p, r, x, out, columns);
          if (here) *float_at(p.picked, r) = y, out[column] -= *float_at(p.grad, r);
          continue;
        }
      }
      if (p.statistics) {
        float* total = float_at(p.row_sum, r);
        if constexpr (Stable) {
          *total += row_sum(x, columns, [](vf a) { return stable(a); });
        } else {
          float* largest = float_at(p.row_max, r);
          const float tile = row_maximum(x, columns);
          const float next = tile > *largest ? tile : *largest;
          if (next > -kInfinity) {
            const vf shift = splat(next);
            const float before = *total > 0 ? *total * exp(splat(*largest - next))[0] : *total;
            *total = before + row_sum(x, columns, [&](vf a) { return exp(a - shift); });
          } else {
            *total += row_sum(x, columns, [](vf a) { return select(a == a, vf{}, a); });  // a NaN stays one
          }
          *largest = next;
        }
        if (here) *float_at(p.picked, r) = Stable ? symlog(y) : y;
        sum = *total;
        if (p.gradient) *float_at(p.lse, r) = (Stable ? 0.0f : *float_at(p.row_max, r)) + __builtin_logf(sum);
      }

      if (p.gradient) {
        const float lse = *float_at(p.lse, r), grad = *float_at(p.grad, r);
        const float scale = grad * (1.0f + 2.0f * (float)p.z_loss * lse);
        const float share = !Stable ? scale : scale / (p.statistics ? sum : (float)__builtin_exp((double)lse));
        const vf weight = splat(share), shift = splat(lse), back = splat(temperature / (cap != 0 ? cap : 1.0f));
        vf dots = {};
        // of the normaliser by a prepared logit: softmax, or s(a) / (1 + |a|) over the sum
        const auto normaliser = [&](vf a) {
          if constexpr (!Stable) return weight * exp(a - shift);
          const vf inverse = splat(1.0f) / (splat(1.0f) + absolute(a));
          return weight * select(a >= vf{}, splat(1.0f), inverse * inverse);
        };
        // from a prepared logit back to the one that came from the product
        const auto chain = [&](vf g, vf a) {
          if (p.temperature.data) g *= splat(over);
          return cap != 0 ? g * (splat(1.0f) - (a * back) * (a * back)) : g;
        };
        const auto by_temperature = [&](vf g, vf a) {
          if (p.temperature.data) dots += select(g == vf{}, g, g * a);
        };
        for_columns(columns, [&](int64_t j, int n) {
          const vf a = get(x + j, n);
          vf g = normaliser(a);
          if (n < W) {  // lanes past the end hold zeros, whose share must not be counted
            vf kept = {};
            for (int i = 0; i < n; i++) kept[i] = g[i];
            g = kept;
          }
          by_temperature(g, a);
          put(out + j, chain(g, a), n);
        });
        if (here) {  // again as a whole: a sure target's gradient is less than the rounding of its share
          vf g = {}, a = {};
          g[0] = Stable ? -grad / (1.0f + __builtin_fabsf(y)) : -grad;
          a[0] = y;
          by_temperature(g, a);
          put(out + column, chain(normaliser(a) + g, a), 1);
        }
        if (p.temperature.data) *float_at(p.grad_temperature, r) -= reduce_add(dots) * over;
      }
    }
  });
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
