// h_t = a_t h_{t-1} + b_t. Lanes are channels; tokens are processed in order. A task has a panel of channels of one
// sequence. With fewer tasks than threads, time is cut into segments: first each segment's product of a and its h from
// a zero state, then the state before each segment, then the segments themselves.
#pragma once

#include "arena.h"
#include "limits.h"
#include "math.h"
#include "sequences.h"

namespace fastattn {
namespace FASTATTN_ISA {

constexpr int64_t kScanPanel = limits::scan_slice;  // channels
constexpr int kScanRows = 4;                        // tokens in registers

// The arithmetic of a number type and of its factors. `pull(da, f)` is the gradient of the value from which f is made.
struct RealScan {
  static constexpr int kUnit = 1;
  FASTATTN_INLINE vf factor(vf a) { return a; }
  FASTATTN_INLINE vf pull(vf da, vf) { return da; }
  FASTATTN_INLINE vf times(vf a, vf h) { return a * h; }
  FASTATTN_INLINE vf times_conjugate(vf a, vf h) { return a * h; }
};
struct LogScan : RealScan {
  FASTATTN_INLINE vf factor(vf a) { return exp(a); }
  FASTATTN_INLINE vf pull(vf da, vf f) { return da * f; }
};
// Complex numbers: real and imaginary parts alternate.
struct PairScan : RealScan {
  static constexpr int kUnit = 2;
  template <int... L>
  FASTATTN_INLINE vf product(vf a, vf h, float sign, std::integer_sequence<int, L...>) {
    const vf real = __builtin_shufflevector(a, a, (L & ~1)...), imaginary = __builtin_shufflevector(a, a, (L | 1)...);
    const vf swapped = __builtin_shufflevector(h, h, (L ^ 1)...);
    const vf signs = {(L & 1 ? sign : -sign)...};
    return real * h + imaginary * signs * swapped;
  }
  FASTATTN_INLINE vf times(vf a, vf h) { return product(a, h, 1, std::make_integer_sequence<int, W>{}); }
  // conj(a) * h
  FASTATTN_INLINE vf times_conjugate(vf a, vf h) { return product(a, h, -1, std::make_integer_sequence<int, W>{}); }
};

// T: the type of b and h; A: that of a.
template <class Scan, class T, class A>
class LinearScan {
 public:
  LinearScan(const LinearScanParams& p, bool backward)
      : p(p),
        batches(p.out.size[0] * p.out.size[1]),
        length(p.out.size[2]),
        channels(p.out.size[3]),
        sequences(p.cu_seqlens, batches, length),
        forwards(backward == (p.reverse != 0)),
        segments(p.segments),
        threads(row_threads(p.threads, batches * length, channels * kUnit)) {
    const bool sums = backward && p.grad_a.data && p.grad_a_kind == 1;
    panel = sums ? p.slice : kScanPanel;
    while (!sums && panel > 16 && sequences.count() * panels() < threads) panel /= 2;
  }

  void forward() const {
    run([&](Task& task) { this->carry_in(task, p.initial); },
        [&](Task& task) {
          PanelRows<ElementA> a(p.a, task.batch, task.first, task.count, task.tile_a);
          PanelRows<Element> b(p.b, task.batch, task.first, task.count, task.tile_b);
          in_order(task, [&]<int R>(const int64_t* t) {
            const A* rows_a[R];
            const T* rows_b[R];
            T* out[R];
            for (int i = 0; i < R; i++)
              rows_a[i] = (const A*)a[t[i]], rows_b[i] = (const T*)b[t[i]], out[i] = row<T>(p.out, task, t[i]);
            for_columns(task.count * kUnit, [&](int64_t j, int n) FASTATTN_INLINE_LAMBDA {
              vf h = load(task.carry + j);
              FASTATTN_EACH(i, R) {
                h = Scan::times(Scan::factor(get(rows_a[i] + j, n)), h) + get(rows_b[i] + j, n);
                put(out[i] + j, h, n);
              }
              store(task.carry + j, h);
            });
          });
        },
        p.b, [](vf a, vf b, vf h) { return Scan::times(a, h) + b; });
  }

  // From the last token to the first: g_t = grad_out_t + conj(a_{t+1}) g_{t+1} is b_t's gradient, g_t conj(h_{t-1})
  // a_t's.
  void backward() const {
    run([&](Task& task) { memset(task.carry, 0, size_t(task.padded) * 4); }, [&](Task& task) { pull(task); },
        p.grad_out, [](vf a, vf g, vf carried) { return Scan::times_conjugate(a, g + carried); });
  }

 private:
  static constexpr int kUnit = Scan::kUnit;
  using Element = std::conditional_t<kUnit == 2, Pair, T>;
  using ElementA = std::conditional_t<kUnit == 2, Pair, A>;
  const LinearScanParams& p;
  const int64_t batches, length, channels;
  const Sequences sequences;
  const bool forwards;  // the order of tokens
  const int64_t segments;
  const int threads;
  int64_t panel;

  int64_t panels() const { return (channels + panel - 1) / panel; }

  struct Task {
    int64_t s, batch, segment;
    int64_t first, count, padded;  // channels; floats that a carried row has
    int64_t begin, end;            // tokens
    ElementA* tile_a;
    Element *tile_b, *tile_grad;
    float *carry, *sums;
    bool last;  // the sequence's last segment in the scan's order
  };

  Task task_of(int64_t number, Arena& arena) const {
    Task task;
    const int64_t one = number / segments;
    task.segment = number % segments, task.last = task.segment == segments - 1;
    task.s = one / panels(), task.batch = p.cu_seqlens.data ? 0 : task.s;
    task.first = one % panels() * panel, task.count = min64(panel, channels - task.first);
    task.padded = round_up(panel * kUnit, W);
    const int64_t begin = sequences.begin(task.s), tokens = sequences.end(task.s) - begin;
    const int64_t place = forwards ? task.segment : segments - 1 - task.segment;
    task.begin = begin + tokens * place / segments, task.end = begin + tokens * (place + 1) / segments;
    lay_out(task, arena);
    return task;
  }
  void lay_out(Task& task, Arena& arena) const {
    task.tile_a = arena.take<ElementA>(PanelRows<ElementA>::tile(panel));
    task.tile_b = arena.take<Element>(PanelRows<Element>::tile(panel));
    task.carry = arena.take<float>(round_up(panel * kUnit, W));
    task.sums = arena.take<float>(round_up(panel * kUnit, W));
  }

  template <class E>
  E* row(const Tensor& t, const Task& task, int64_t token) const {
    return (E*)t.data + ((task.batch * length + token) * channels + task.first) * kUnit;
  }
  // The row (S, D) before a sequence; zeros if it is absent.
  void carry_in(Task& task, const Tensor& initial) const {
    memset(task.carry, 0, size_t(task.padded) * 4);
    if (initial.data) memcpy(task.carry, state(initial, task), size_t(task.count * kUnit) * 4);
  }
  float* state(const Tensor& t, const Task& task) const {
    return (float*)t.data + (task.s * channels + task.first) * kUnit;
  }

  // f<R>(tokens) over [begin, end) in the scan's order, or over all but the last of them.
  template <class F>
  FASTATTN_INLINE_MEMBER void in_order(const Task& task, const F& f, int64_t but = 0) const {
    const int64_t count = task.end - task.begin - but;
    int64_t t[kScanRows], i = 0;
    const auto token = [&](int64_t i) { return forwards ? task.begin + i : task.end - 1 - i; };
    for (; i + kScanRows <= count; i += kScanRows) {
      for (int r = 0; r < kScanRows; r++) t[r] = token(i + r);
      f.template operator()<kScanRows>(t);
    }
    for (; i < count; i++) t[0] = token(i), f.template operator()<1>(t);
  }

  // first(task) sets the row carried into a sequence; scan(task) processes the task's tokens. With segments, step(a,
  // given, carried) computes the row carried into each segment from `given` rows.
  template <class First, class Body, class Step>
  void run(const First& first, const Body& scan, const Tensor& given, const Step& step) const {
    const int64_t count = sequences.count() * panels() * segments, padded = round_up(panel * kUnit, W);
    Blocks memory;
    float* begins = nullptr;  // (tasks, 2, padded): a segment's product of factors, and its result from a zero state
    with_scratch(0, [&](Arena& arena) {
      memory = arena.blocks(threads, bytes_of([&](Arena& one) {
                              Task task;
                              lay_out(task, one);
                            }));
      if (segments > 1) begins = arena.take<float>(count * 2 * padded);
    });
    if (begins) {
      parallel_items(count, threads, [&](int64_t number, int thread) {
        Arena arena = memory[thread];
        Task task = task_of(number, arena);
        float *product = begins + number * 2 * padded, *sum = product + padded;
        for (int64_t j = 0; j < padded; j++) product[j] = kUnit == 1 || j % 2 == 0, sum[j] = 0;
        if (task.last) return;
        advance<true>(task, given, step, product);
        advance<false>(task, given, step, sum);
      });
      for (int64_t number = 0; number < count; number++) {
        Arena arena = memory[0];
        Task task = task_of(number, arena);
        float *product = begins + number * 2 * padded, *sum = product + padded;
        if (task.segment == 0)
          first(task);
        else
          memcpy(task.carry, product - padded, size_t(padded) * 4);  // the previous segment's result, stored there
        vf within{};
        for (int64_t j = 0; j < padded; j += W) within += load(product + j) * 0.0f;
        const bool finite = reduce_add(within) == 0;
        for (int64_t j = 0; j < padded; j += W) {
          const vf before = load(task.carry + j), after = Scan::times(load(product + j), before) + load(sum + j);
          store(product + j, before);
          store(sum + j, after);
        }
        if (finite) continue;
        // a product may overflow although its factor is small
        if (!task.last) advance<false>(task, given, step, task.carry);
        memcpy(sum, task.carry, size_t(padded) * 4);
      }
    }
    parallel_items(count, threads, [&](int64_t number, int thread) {
      Arena arena = memory[thread];
      Task task = task_of(number, arena);
      if (begins)
        memcpy(task.carry, begins + number * 2 * padded, size_t(padded) * 4);
      else
        first(task);
      scan(task);
    });
  }

  // The row carried over the task's tokens; with kAlone as if the given rows were zero.
  template <bool kAlone, class Step>
  void advance(Task& task, const Tensor& given, const Step& step, float* carried) const {
    PanelRows<ElementA> a(p.a, task.batch, task.first, task.count, task.tile_a);
    PanelRows<Element> x(given, task.batch, task.first, task.count, task.tile_b);
    in_order(task, [&]<int R>(const int64_t* t) {
      for (int i = 0; i < R; i++) {
        const A* factors = (const A*)a[t[i]];
        const T* row = (const T*)x[t[i]];
        for_columns(task.count * kUnit, [&](int64_t j, int n) FASTATTN_INLINE_LAMBDA {
          const vf f = Scan::factor(get(factors + j, n));
          store(carried + j, step(f, kAlone ? vf{} : get(row + j, n), load(carried + j)));
        });
      }
    });
  }

  void pull(Task& task) const {
    PanelRows<ElementA> a(p.a, task.batch, task.first, task.count, task.tile_a);
    PanelRows<Element> grad(p.grad_out, task.batch, task.first, task.count, task.tile_b);
    memset(task.sums, 0, size_t(task.padded) * 4);
    const int64_t back = forwards ? 1 : -1;  // offset from a token to its predecessor in the scan's order
    const bool to_first = task.last && task.begin < task.end;
    const auto rows = [&]<int R, class Before>(const int64_t* t, const Before* const* before) {
      const A* factors[R];
      const T* gradients[R];
      for (int i = 0; i < R; i++) factors[i] = (const A*)a[t[i]], gradients[i] = (const T*)grad[t[i]];
      pull_rows<R>(task, t, factors, gradients, before);
    };
    in_order(
        task,
        [&]<int R>(const int64_t* t) {
          const T* before[R];
          for (int i = 0; i < R; i++) before[i] = row<const T>(p.out, task, t[i] + back);
          rows.template operator()<R, T>(t, before);
        },
        to_first);
    if (to_first) {
      static const float zeros[kScanPanel * kUnit] = {};
      const int64_t t = forwards ? task.end - 1 : task.begin;
      const float* initial = p.initial.data ? state(p.initial, task) : zeros;
      rows.template operator()<1, float>(&t, &initial);
    }
    if (task.last && p.grad_initial.data)
      memcpy(state(p.grad_initial, task), task.carry, size_t(task.count * kUnit) * 4);
    if (p.grad_a.data && p.grad_a_kind == 2) {
      float* sums = (float*)p.grad_a.data + ((task.s * segments + task.segment) * channels + task.first) * kUnit;
      memcpy(sums, task.sums, size_t(task.count * kUnit) * 4);
    }
  }

  // R tokens; before: the rows of h from which each was computed.
  template <int R, class Before>
  FASTATTN_INLINE_MEMBER void pull_rows(Task& task, const int64_t* t, const A* const* factors,
                                        const T* const* gradients, const Before* const* before) const {
    const bool wanted = p.grad_a.data;
    T* grad_b[R];
    A* grad_a[R];
    for (int i = 0; i < R; i++) {
      grad_b[i] = row<T>(p.grad_b, task, t[i]);
      grad_a[i] = wanted && p.grad_a_kind == 0 ? row<A>(p.grad_a, task, t[i]) : nullptr;
    }
    vf over_channels[R] = {};
    for_columns(task.count * kUnit, [&](int64_t j, int n) FASTATTN_INLINE_LAMBDA {
      vf carried = load(task.carry + j), over_tokens{};
      FASTATTN_EACH(i, R) {
        const vf g = get(gradients[i] + j, n) + carried, f = Scan::factor(get(factors[i] + j, n));
        put(grad_b[i] + j, g, n);
        if (wanted) {
          const vf of_a = Scan::pull(Scan::times_conjugate(get(before[i] + j, n), g), f);
          if (grad_a[i])
            put(grad_a[i] + j, of_a, n);
          else
            over_channels[i] += of_a, over_tokens += of_a;
        }
        carried = Scan::times_conjugate(f, g);
      }
      store(task.carry + j, carried);
      if (wanted && p.grad_a_kind == 2) store(task.sums + j, load(task.sums + j) + over_tokens);
    });
    if (!wanted || p.grad_a_kind != 1) return;
    for (int i = 0; i < R; i++) {
      float* to = (float*)p.grad_a.data + ((task.first / p.slice * batches + task.batch) * length + t[i]) * kUnit;
      if constexpr (kUnit == 1) {
        *to = reduce_add(over_channels[i]);
      } else {
        const vi imaginary = -(iota() & 1);
        to[0] = reduce_add(select(imaginary, vf{}, over_channels[i]));
        to[1] = reduce_add(select(imaginary, over_channels[i], vf{}));
      }
    }
  }
};

template <class F>
FASTATTN_INLINE void with_scan(const LinearScanParams& p, bool backward, const F& f) {
  const DType dtype = p.out.dtype;
  if (p.pairs) return f(LinearScan<PairScan, float, float>(p, backward));
  with_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto of = [&]<class A>(A*) {
      if (p.log_a)
        f(LinearScan<LogScan, T, A>(p, backward));
      else
        f(LinearScan<RealScan, T, A>(p, backward));
    };
    if (p.a.dtype == DType::f32)
      of((float*)nullptr);
    else
      of((T*)nullptr);
  });
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
