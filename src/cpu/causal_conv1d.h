// A causal depthwise convolution of a few taps: lanes are channels, and a task has a panel of them over a slice of
// tokens.
#pragma once

#include "arena.h"
#include "limits.h"
#include "sequences.h"

namespace fastattn {
namespace FASTATTN_ISA {

constexpr int64_t kConvPanel = 512;  // channels: a panel's values between tokens stay in the first-level cache
constexpr int kConvRows = 4;         // tokens that are processed together

// T: the type of x and out. Taps: the number of taps, or 0 if it is known at run time.
template <class T, int Taps>
class CausalConv {
 public:
  explicit CausalConv(const CausalConv1dParams& p)
      : p(p),
        batches(p.x.size[1]),
        length(p.x.size[2]),
        channels(p.x.size[3]),
        taps((int)p.weight.size[3]),
        panels((channels + kConvPanel - 1) / kConvPanel),
        slices((length + p.slice - 1) / p.slice),
        threads(row_threads(p.threads, batches * length, channels)),
        sequences(p.cu_seqlens, batches, length) {}

  void forward() const {
    run([&](Arena& arena) { take(arena); },
        [&](const Task& task, Arena arena) {
          const Panel panel = take(arena);
          PanelRows<T> x(p.x, task.batch, task.first, task.count, panel.x);
          sequences.within(task.batch, task.begin, task.end, [&](int64_t s, int64_t t0, int64_t t1) {
            begin_history(task, panel, x, s, t0);
            for (int64_t t = t0; t < t1;) t += in_rows(t1 - t, [&]<int R>() { activate<R>(task, panel, x, t); });
          });
        });
    if (p.state.data) keep_states();
  }

  void backward() const {
    run([&](Arena& arena) { take_gradients(arena, take(arena)); },
        [&](const Task& task, Arena arena) {
          const Panel panel = take(arena);
          const Gradients grads = take_gradients(arena, panel);
          PanelRows<T> x(p.x, task.batch, task.first, task.count, panel.x);
          PanelRows<T> grad(p.grad_out, task.batch, task.first, task.count, grads.out);
          memset(grads.sums, 0, size_t((taps + 1) * kConvPanel) * 4);
          sequences.within(task.batch, task.begin, task.end, [&](int64_t s, int64_t t0, int64_t t1) {
            differentiate(task, panel, grads, x, grad, s, t0, t1);
          });
          for (int k = 0; k <= taps; k++)
            memcpy((float*)p.grad_sums.data +
                       ((task.batch * slices + task.begin / p.slice) * (taps + 1) + k) * channels + task.first,
                   grads.sums + k * kConvPanel, size_t(task.count) * 4);
        });
    for (int64_t s = 0; s < sequences.count(); s++)
      if (p.grad_initial_state.data && sequences.begin(s) == sequences.end(s)) pass_gradient(s);
  }

 private:
  const CausalConv1dParams& p;
  const int64_t batches, length, channels;
  const int taps;
  const int64_t panels, slices;
  const int threads;
  const Sequences sequences;

  struct Task {
    int64_t batch, begin, end, first, count;  // tokens, channels
    const float* weights;                     // (taps + 1, kConvPanel), the bias last; zero beyond the channels
  };
  // float32 rows of kConvPanel: copies of tokens with strided channels, and the inputs before the next token.
  struct Panel {
    T *x, *state;
    float* history;  // taps - 1
  };
  Panel take(Arena& arena) const {
    T* x = arena.take<T>(PanelRows<T>::tile(kConvPanel));
    T* state = arena.take<T>(PanelRows<T>::tile(kConvPanel));
    return {x, state, arena.take<float>((taps - 1) * kConvPanel)};
  }
  // The same for the backward. pending: gradients of the latest inputs, to which the next tokens add.
  struct Gradients {
    T *out, *unused;
    float *pending, *sums;  // taps - 1; taps + 1
  };
  Gradients take_gradients(Arena& arena, const Panel&) const {
    T* out = arena.take<T>(PanelRows<T>::tile(kConvPanel));
    T* unused = arena.take<T>(kConvPanel);
    float* pending = arena.take<float>((taps - 1) * kConvPanel);
    return {out, unused, pending, arena.take<float>((taps + 1) * kConvPanel)};
  }

  // body(task, arena) of every task: a panel of channels over a slice of a batch's tokens.
  template <class LayOut, class Body>
  void run(const LayOut& lay_out, const Body& body) const {
    float* weights = nullptr;
    Blocks memory;
    with_scratch(0, [&](Arena& arena) {
      weights = arena.take<float>(panels * (taps + 1) * kConvPanel);
      memory = arena.blocks(threads, bytes_of(lay_out));
    });
    read_weights(weights);
    parallel_items(batches * slices * panels, threads, [&](int64_t number, int thread) {
      const int64_t panel = number % panels, slice = number / panels % slices, first = panel * kConvPanel;
      const Task task{number / panels / slices,
                      slice * p.slice,
                      min64(length, (slice + 1) * p.slice),
                      first,
                      min64(kConvPanel, channels - first),
                      weights + panel * (taps + 1) * kConvPanel};
      body(task, memory[thread]);
    });
  }

  void read_weights(float* to) const {
    memset(to, 0, size_t(panels * (taps + 1) * kConvPanel) * 4);
    const auto place = [&](int64_t channel, int k) {
      return to + (channel / kConvPanel * (taps + 1) + k) * kConvPanel + channel % kConvPanel;
    };
    with_dtype(p.weight.dtype, [&](auto* type) {
      const auto* from = (decltype(type))p.weight.data;
      for (int64_t c = 0; c < channels; c++)
        for (int k = 0; k < taps; k++) *place(c, k) = one(from + c * p.weight.stride[2] + k * p.weight.stride[3]);
    });
    if (!p.bias.data) return;
    with_dtype(p.bias.dtype, [&](auto* type) {
      const auto* from = (decltype(type))p.bias.data;
      for (int64_t c = 0; c < channels; c++) *place(c, taps) = one(from + c * p.bias.stride[3]);
    });
  }

  // Calls f<R>() for R <= `rows` tokens that are processed together; returns R.
  template <class F>
  FASTATTN_INLINE_MEMBER int64_t in_rows(int64_t rows, const F& f) const {
    if (rows < kConvRows) return f.template operator()<1>(), 1;
    return f.template operator()<kConvRows>(), kConvRows;
  }

  // The inputs before token t of sequence s. Before its first token they are the initial state, or zeros.
  void begin_history(const Task& task, const Panel& panel, PanelRows<T>& x, int64_t s, int64_t t) const {
    PanelRows<T> state(p.initial_state, s, task.first, task.count, panel.state);
    const int64_t before = taps - 1, begin = sequences.begin(s);
    for (int64_t i = 0; i < before; i++) {
      const int64_t at = t - before + i;
      float* to = panel.history + i * kConvPanel;
      memset(to, 0, kConvPanel * 4);
      if (at < begin && !p.initial_state.data) continue;
      const T* from = at < begin ? state[at - begin + before] : x[at];
      for_columns(task.count, [&](int64_t j, int n) FASTATTN_INLINE_LAMBDA { store(to + j, get(from + j, n)); });
    }
  }

  // x: the inputs of R outputs, which include taps - 1 earlier ones; pre: the outputs before the activation.
  template <int R>
  FASTATTN_INLINE_MEMBER void convolve(const Task& task, const Panel& panel, const T* const* in, int64_t j, int n,
                                       vf* x, vf* pre) const {
    const int K = Taps ? Taps : taps;
    FASTATTN_EACH(k, K - 1) x[k] = load(panel.history + k * kConvPanel + j);
    FASTATTN_EACH(i, R) x[K - 1 + i] = get(in[i] + j, n);
    FASTATTN_EACH(k, K - 1) store(panel.history + k * kConvPanel + j, x[R + k]);
    const vf bias = load(task.weights + K * kConvPanel + j);
    FASTATTN_EACH(i, R) pre[i] = bias;
    FASTATTN_EACH(k, K) {
      const vf w = load(task.weights + k * kConvPanel + j);
      FASTATTN_EACH(i, R) pre[i] += w * x[i + k];
    }
  }
  static constexpr int kMost = Taps ? Taps : limits::taps;

  template <int R>
  void activate(const Task& task, const Panel& panel, PanelRows<T>& rows, int64_t t) const {
    const T* in[R];
    for (int i = 0; i < R; i++) in[i] = rows[t + i];
    T* out = (T*)p.out.data + (task.batch * length + t) * channels + task.first;
    for_columns(task.count, [&](int64_t j, int n) FASTATTN_INLINE_LAMBDA {
      vf x[kMost + R], y[R];
      convolve<R>(task, panel, in, j, n, x, y);
      if (p.silu) {
        vf d[R];
        sigmoid_divisors<R>(y, d, (const T*)nullptr);
        FASTATTN_EACH(i, R) y[i] = y[i] / d[i];
      }
      FASTATTN_EACH(i, R) put(out + i * channels + j, y[i], n);
    });
  }

  // Tokens [t0, t1) of a sequence in order. An input's gradient is complete after the last token that reads it, so the
  // later tokens that read one of these inputs are processed too, without entering the sums.
  void differentiate(const Task& task, const Panel& panel, const Gradients& grads, PanelRows<T>& x, PanelRows<T>& grad,
                     int64_t s, int64_t t0, int64_t t1) const {
    const int64_t before = taps - 1, begin = sequences.begin(s), end = sequences.end(s);
    const int64_t last = min64(t1 + before, end);
    begin_history(task, panel, x, s, t0);
    for (int64_t i = 0; i < before; i++) {
      float* to = grads.pending + i * kConvPanel;
      const T* later = later_gradient(task, s, t0 - before + i);
      memset(to, 0, kConvPanel * 4);
      if (later)
        for_columns(task.count, [&](int64_t j, int n) FASTATTN_INLINE_LAMBDA { store(to + j, get(later + j, n)); });
    }
    // the address of token t's input gradient
    const auto place = [&](int64_t t) -> T* {
      if (t >= t0 && t < t1) return (T*)p.grad_x.data + (task.batch * length + t) * channels + task.first;
      const bool initial = t0 == begin && t < t0 && p.grad_initial_state.data;
      return initial ? initial_gradient(s, t - begin + before) + task.first : grads.unused;
    };
    int64_t t = t0;
    for (; t < last;)
      t += in_rows((t < t1 ? t1 : last) - t, [&]<int R>() {
        const T *in[R], *incoming[R], *later[R];
        T* out[R];
        for (int i = 0; i < R; i++) {
          in[i] = x[t + i], incoming[i] = grad[t + i];
          later[i] = later_gradient(task, s, t + i), out[i] = place(t + i - before);
        }
        if (later[R - 1])
          pull<R, true>(task, panel, grads, in, incoming, later, out, t < t1);
        else
          pull<R, false>(task, panel, grads, in, incoming, later, out, t < t1);
      });
    for (int64_t i = 0; i < before; i++) {
      T* to = place(t - before + i);
      const float* from = grads.pending + i * kConvPanel;
      for_columns(task.count, [&](int64_t j, int n) FASTATTN_INLINE_LAMBDA { put(to + j, load(from + j), n); });
    }
  }

  template <int R, bool kLater>
  void pull(const Task& task, const Panel& panel, const Gradients& grads, const T* const* in, const T* const* incoming,
            const T* const* later, T* const* out, bool counts) const {
    const int K = Taps ? Taps : taps;
    for_columns(task.count, [&](int64_t j, int n) FASTATTN_INLINE_LAMBDA {
      vf x[kMost + R], pre[R], g[R], dx[kMost + R];
      convolve<R>(task, panel, in, j, n, x, pre);
      FASTATTN_EACH(i, R) g[i] = get(incoming[i] + j, n);
      if (p.silu) {
        vf d[R];
        sigmoid_divisors<R>(pre, d, (const float*)nullptr);  // the taps' gradients may be float32
        FASTATTN_EACH(i, R) {
          const vf s = splat(1.0f) / d[i];
          g[i] *= s + pre[i] * s * (splat(1.0f) - s);
        }
      }
      if (counts) {
        FASTATTN_EACH(k, K + 1) {
          float* to = grads.sums + k * kConvPanel + j;
          vf sum = load(to);
          FASTATTN_EACH(i, R) sum += k < K ? g[i] * x[i + k] : g[i];
          store(to, sum);
        }
      }
      FASTATTN_EACH(k, K - 1) dx[k] = load(grads.pending + k * kConvPanel + j);
      FASTATTN_EACH(i, R) dx[K - 1 + i] = kLater && later[i] ? get(later[i] + j, n) : vf{};
      FASTATTN_EACH(i, R) {  // in the order of tokens, so that sums do not depend on the blocks
        FASTATTN_EACH(k, K) dx[i + k] += load(task.weights + k * kConvPanel + j) * g[i];
      }
      FASTATTN_EACH(i, R) put(out[i] + j, dx[i], n);
      FASTATTN_EACH(k, K - 1) store(grads.pending + k * kConvPanel + j, dx[R + k]);
    });
  }

  // The gradient of the next state with respect to an input, or null.
  const T* later_gradient(const Task& task, int64_t s, int64_t t) const {
    const int64_t i = t - (sequences.end(s) - (taps - 1));
    if (!p.grad_state.data || i < 0 || i >= taps - 1) return nullptr;
    return (const T*)p.grad_state.data + (s * (taps - 1) + i) * channels + task.first;
  }
  T* initial_gradient(int64_t s, int64_t i) const {
    return (T*)p.grad_initial_state.data + (s * (taps - 1) + i) * channels;
  }
  // A sequence without tokens returns its initial state.
  void pass_gradient(int64_t s) const {
    const size_t bytes = size_t((taps - 1) * channels) * sizeof(T);
    if (p.grad_state.data)
      memcpy(initial_gradient(s, 0), (const T*)p.grad_state.data + s * (taps - 1) * channels, bytes);
    else
      memset((void*)initial_gradient(s, 0), 0, bytes);
  }

  void keep_states() const {
    const int64_t before = taps - 1;
    parallel_ranges(sequences.count() * before, threads, [&](int64_t first, int64_t last, int) {
      for (int64_t i = first; i < last; i++) {
        const int64_t s = i / before, t = sequences.end(s) - before + i % before, begin = sequences.begin(s);
        T* to = (T*)p.state.data + i * channels;
        const Tensor& from = t >= begin ? p.x : p.initial_state;
        if (!from.data) {
          memset((void*)to, 0, size_t(channels) * sizeof(T));
          continue;
        }
        const int64_t batch = t >= begin && p.cu_seqlens.data ? 0 : s, row = t >= begin ? t : t - begin + before;
        const T* x = (const T*)from.data + batch * from.stride[1] + row * from.stride[2];
        for (int64_t c = 0; c < channels; c++) to[c] = x[c * from.stride[3]];
      }
    });
  }
};

template <class F>
FASTATTN_INLINE void with_conv(const CausalConv1dParams& p, const F& f) {
  with_dtype(p.x.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t taps = p.weight.size[3];
    if (taps == 4)
      f(CausalConv<T, 4>(p));
    else if (taps == 3)
      f(CausalConv<T, 3>(p));
    else if (taps == 2)
      f(CausalConv<T, 2>(p));
    else
      f(CausalConv<T, 0>(p));
  });
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
