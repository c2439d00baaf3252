// Row kernels of the output layer, which run on logits between the matrix products of a loss over classes.
#pragma once
#include "rowwise.h"

namespace fastattn {
namespace FASTATTN_ISA {

FASTATTN_INLINE int64_t index_at(const Tensor& t, int64_t i) {
  return t.dtype == DType::i64 ? ((const int64_t*)t.data)[i * t.stride[3]] : ((const int32_t*)t.data)[i * t.stride[3]];
}
FASTATTN_INLINE float* float_at(const Tensor& t, int64_t i) { return (float*)t.data + i * t.stride[3]; }

constexpr float kInfinity = __builtin_inff();

FASTATTN_INLINE float symlog(float x) { return x >= 0 ? __builtin_log1pf(x) : -__builtin_log1pf(-x); }

// The weight of a prepared logit relative to the row's largest, whose weight is 1: e^((x - largest) / temperature) for
// softmax, or s(x) / s(largest) with s(x) = x + 1 for x >= 0 and 1 / (1 - x) below for StableMax.
template <bool Stable>
struct Weights {
  vf largest, scale;  // scale: the temperature, or 1 + |largest|
  bool divided;       // softmax: there is a temperature; StableMax: largest is negative
  const float* log_count;
  FASTATTN_INLINE Weights make(float largest, const float* temperature, const float* log_count) {
    if (Stable) return {splat(largest), splat(1.0f + __builtin_fabsf(largest)), largest < 0, nullptr};
    return {splat(largest), splat(temperature ? *temperature : 1.0f), temperature != nullptr, log_count};
  }
  // of n columns from j on
  inline __attribute__((always_inline)) vf operator()(vf a, int64_t j, int n) const {
    if constexpr (Stable) {
      const vf r = splat(1.0f) + vabs(a);
      if (divided) return scale / r;
      const vi up = a >= vf{};
      return select(up, r, splat(1.0f)) / select(up, scale, r * scale);
    }
    vf above = distance(a);
    if (log_count) above += get(log_count + j, n);
    return exp(above);
  }
  inline __attribute__((always_inline)) vf distance(vf a) const {
    return divided ? (a - largest) / scale : a - largest;
  }
};

template <class T>
FASTATTN_INLINE float scalar_at(const T* p) {
  return get(p, 1)[0];
}

// In place: add the bias, apply the soft cap, and divide by the temperature if given.
template <class T>
FASTATTN_INLINE void prepare_row(T* x, int64_t columns, const float* bias, float cap, const float* temperature) {
  const vf up = splat(cap), over = splat(temperature ? *temperature : 1.0f);
  for_columns(columns, [&](int64_t j, int n) {
    vf y = get(x + j, n);
    if (bias) y += get(bias + j, n);
    if (cap != 0) y = up * tanh(y / up);
    put(x + j, temperature ? y / over : y, n);
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

// Sum of f(value, column, lanes) over a row. Lanes past the end of a row count as zero.
template <class T, class F>
FASTATTN_INLINE float row_sum(const T* x, int64_t columns, const F& f) {
  vf s[4] = {};
  int64_t j = 0;
  for (; j + 4 * W <= columns; j += 4 * W)
    for (int i = 0; i < 4; i++) s[i] += f(load(x + j + i * W), j + i * W, W);
  for (; j + W <= columns; j += W) s[0] += f(load(x + j), j, W);
  float sum = reduce_add((s[0] + s[1]) + (s[2] + s[3]));
  if (j < columns) {
    const int n = (int)(columns - j);
    const vf last = f(load_n(x + j, n), j, n);
    for (int i = 0; i < n; i++) sum += last[i];
  }
  return sum;
}

// out = the weights of x, and their sum.
static float weigh_row(const float* x, float* out, int64_t columns, const Weights<false>& weights) {
  return row_sum(x, columns, [&](vf a, int64_t j, int n) {
    const vf e = weights(a, j, n);
    put(out + j, e, n);
    return e;
  });
}

// Statistics and gradient of a whole row of prepared logits, with one exponential for each element. `column` is the
// target's column or -1. The weights are kept in out if its type holds them exactly, else in x.
template <class Out>
static void softmax_row(const VocabRowsParams& p, int64_t r, float* x, Out* out, int64_t columns, int64_t column) {
  float* weighed = x;
  if constexpr (std::is_same_v<Out, float>) weighed = out;
  const float largest = row_maximum(x, columns);
  const auto weights = Weights<false>::make(largest, nullptr, (const float*)p.log_count.data);
  const float sum = weigh_row(x, weighed, columns, weights);
  *float_at(p.row_max, r) = largest;
  *float_at(p.row_sum, r) = sum;
  const float lse = p.z_loss != 0 ? largest + __builtin_logf(sum) : 0.0f;
  const float grad = *float_at(p.grad, r), mass = p.mass.data ? *float_at(p.mass, r) : grad;
  const float share = mass * (1.0f + 2.0f * (float)p.z_loss * lse) / sum;
  const float target = column < 0 ? 0.0f : weighed[column] * share - grad;
  for_columns(columns, [&](int64_t j, int n) { put(out + j, get(weighed + j, n) * splat(share), n); });
  if (column >= 0) put(out + column, splat(target), 1);
}

template <class T, class Out, bool Stable>
static void vocab_rows_of(const VocabRowsParams& p) {
  const int64_t columns = p.x.size[3];
  const float cap = (float)p.softcap, z_loss = (float)p.z_loss;
  const bool prepared = p.bias.data || p.softcap != 0 || (Stable && p.temperature.data);
  const float* log_count = (const float*)p.log_count.data;
  const int threads = row_threads(p.threads, p.x.size[2], columns);
  parallel_ranges(p.x.size[2], threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; r++) {
      T* x = (T*)p.x.data + r * p.x.stride[2];
      Out* out = (Out*)p.out.data + r * p.out.stride[2];
      const int64_t target = index_at(p.target, r);
      if (target == p.ignore_index) {
        if (p.statistics) *float_at(p.picked, r) = 0;
        if (p.gradient) for_columns(columns, [&](int64_t j, int n) { put(out + j, vf{}, n); });
        continue;
      }
      const float* temperature = p.temperature.data ? float_at(p.temperature, r) : nullptr;
      if (prepared) prepare_row(x, columns, (const float*)p.bias.data, cap, Stable ? temperature : nullptr);
      const int64_t column = target - p.first;
      const bool here = column >= 0 && column < columns;
      const float y = here ? scalar_at(x + column) : 0.0f;
      float* largest = float_at(p.row_max, r);
      float* sum = float_at(p.row_sum, r);

      if constexpr (!Stable && std::is_same_v<T, float>) {
        if (p.statistics && p.gradient && cap == 0 && !temperature) {
          softmax_row(p, r, x, out, columns, here ? column : -1);
          if (here) *float_at(p.picked, r) = y;
          continue;
        }
      }
      if (p.statistics) {
        const float tile = row_maximum(x, columns);
        const float next = tile > *largest ? tile : *largest;
        if (next > -kInfinity) {
          const auto weights = Weights<Stable>::make(next, temperature, log_count);
          const auto before = Weights<Stable>::make(next, temperature, nullptr)(splat(*largest), 0, W);
          if (*sum > 0) *sum *= before[0];
          *sum += row_sum(x, columns, weights);
        } else {
          *sum += row_sum(x, columns, [](vf a, int64_t, int) { return select(a == a, vf{}, a); });  // a NaN stays one
        }
        *largest = next;
        if (here) *float_at(p.picked, r) = y;
      }

      if (p.gradient) {
        const float grad = *float_at(p.grad, r), mass = p.mass.data ? *float_at(p.mass, r) : grad;
        const auto weights = Weights<Stable>::make(*largest, temperature, log_count);
        // `mass` and `spread`: derivatives of the loss with respect to the log-sum-exp
        const float tau = temperature ? *temperature : 1.0f, top = Stable ? symlog(*largest) : *largest / tau;
        const float spread = z_loss != 0 ? 2.0f * z_loss * (top + __builtin_logf(*sum)) * mass : 0.0f;
        const vf share = splat((mass + spread) / *sum), over = splat(tau);
        const vf back = splat((Stable ? tau : 1.0f) / (cap != 0 ? cap : 1.0f));
        vf dots = {};
        // of the normaliser with respect to a prepared logit over its temperature
        const auto normaliser = [&](vf a, int64_t j, int n) {
          const vf g = share * weights(a, j, n);
          return Stable ? g / (splat(1.0f) + vabs(a)) : g;
        };
        // from there to the logit before preparation
        const auto chain = [&](vf g, vf a) {
          if (temperature) g /= over;
          return cap != 0 ? g * (splat(1.0f) - (a * back) * (a * back)) : g;
        };
        // For softmax the products use distances to the largest logit, which are small where gradients are large. Its
        // gradients sum to `spread` + mass - grad; the caller adds the latter two, which it has exactly.
        const auto by_temperature = [&](vf g, vf a) {
          if (temperature) dots += select(g == vf{}, g, g * (Stable ? a : weights.distance(a)));
        };
        for_columns(columns, [&](int64_t j, int n) {
          const vf a = get(x + j, n);
          vf g = normaliser(a, j, n);
          if (n < W) {  // lanes past the end hold zeros and must not be counted
            vf kept = {};
            for (int i = 0; i < n; i++) kept[i] = g[i];
            g = kept;
          }
          by_temperature(g, a);
          put(out + j, chain(g, a), n);
        });
        if (here) {  // computed anew: for a nearly certain target the difference would cancel
          vf g = {}, a = {};
          g[0] = Stable ? -grad / (1.0f + __builtin_fabsf(y)) : -grad;
          a[0] = y;
          by_temperature(g, a);
          if (!Stable && temperature && spread != 0) dots[0] += spread * top;
          put(out + column, chain(normaliser(a, column, 1) + g, a), 1);
        }
        if (temperature) *float_at(p.grad_temperature, r) -= reduce_add(dots) / tau;
      }
    }
  });
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
