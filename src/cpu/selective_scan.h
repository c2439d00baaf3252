// Mamba's selective scan. Lanes are channels. A task has a slice of the channels of a batch entry and loops over tokens
// and the N numbers of a state. The backward recomputes the states between two checkpoints for W channels at a time.
#pragma once

#include "arena.h"
#include "attention_score.h"
#include "math.h"
#include "sequences.h"

namespace fastattn {
namespace FASTATTN_ISA {

constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;

// T: the type of u, dt, B, C, z and out.
template <class T>
class SelectiveScan {
 public:
  explicit SelectiveScan(const SelectiveScanParams& p)
      : p(p),
        batches(p.u.size[1]),
        length(p.u.size[2]),
        channels(p.u.size[3]),
        states(p.A.size[3]),
        width(round_up(p.slice, W)),
        slices((channels + p.slice - 1) / p.slice),
        checkpoints((length + p.interval - 1) / p.interval),
        threads(row_threads(p.threads, batches * length, channels * states)),
        sequences(p.cu_seqlens, batches, length) {}

  void forward() const {
    run([&](Arena& arena) { take(arena); },
        [&](int64_t batch, int64_t first, int64_t count, Arena arena) {
          Slice slice = take(arena);
          read_parameters(slice, first, count);
          Streams rows(*this, batch, first, count, slice);
          for (int64_t s = sequences.first_of(batch); s < sequences.last_of(batch); s++) {
            begin_state(slice, s);
            for (int64_t t = sequences.begin(s), end; t < sequences.end(s); t = end) {
              end = min64(sequences.end(s), (t / p.interval + 1) * p.interval);
              if (t % p.interval == 0 && p.checkpoints.data) keep(slice, batch, t);
              int64_t i = t;
              for (; i + 2 <= end; i += 2) step<2>(slice, rows, batch, i);
              if (i < end) step<1>(slice, rows, batch, i);
            }
            if (p.state.data) transpose_out((float*)p.state.data + (s * channels + first) * states, slice.h, count);
          }
        });
  }

  void backward() const {
    run([&](Arena& arena) { take_gradients(arena, take(arena)); },
        [&](int64_t batch, int64_t first, int64_t count, Arena arena) {
          Slice slice = take(arena);
          Gradients grads = take_gradients(arena, slice);
          read_parameters(slice, first, count);
          Streams rows(*this, batch, first, count, slice);
          PanelRows<T> incoming(p.grad_out, batch, first, count, grads.tile);
          memset(grads.A, 0, size_t(states * width) * 4);
          memset(grads.D, 0, size_t(width) * 4);
          memset(grads.bias, 0, size_t(width) * 4);
          for (int64_t s = sequences.last_of(batch) - 1; s >= sequences.first_of(batch); s--) {
            const int64_t begin = sequences.begin(s);
            memset(grads.h, 0, size_t(states * width) * 4);
            if (p.grad_state.data)
              transpose_in(grads.h, (const float*)p.grad_state.data + (s * channels + first) * states, count);
            for (int64_t last = sequences.end(s), t; last > begin; last = t) {
              t = max64(begin, (last - 1) / p.interval * p.interval);
              if (t == begin)
                begin_state(slice, s);
              else
                restore(slice, batch, t);
              differentiate(slice, grads, rows, incoming, batch, t, last);
            }
            if (p.grad_initial_state.data)
              transpose_out((float*)p.grad_initial_state.data + (s * channels + first) * states, grads.h, count);
          }
          for (int64_t n = 0; n < states; n++)
            memcpy((float*)p.grad_A.data + (batch * states + n) * channels + first, grads.A + n * width,
                   size_t(count) * 4);
          if (p.grad_D.data) memcpy((float*)p.grad_D.data + batch * channels + first, grads.D, size_t(count) * 4);
          if (p.grad_dt_bias.data)
            memcpy((float*)p.grad_dt_bias.data + batch * channels + first, grads.bias, size_t(count) * 4);
        });
  }

 private:
  const SelectiveScanParams& p;
  const int64_t batches, length, channels, states, width, slices, checkpoints;
  const int threads;
  const Sequences sequences;

  // A task's memory: (N, width) states and A in units of ln 2, (width,) parameters, two tokens' B and C, row copies.
  struct Slice {
    int64_t first, count;
    float *h, *A, *D, *bias, *B, *C;
    T *tile_u, *tile_dt, *tile_z, *tile_B, *tile_C;
  };
  Slice take(Arena& arena) const {
    Slice slice;
    for (float** to : {&slice.h, &slice.A}) *to = arena.take<float>(states * width);
    for (float** to : {&slice.D, &slice.bias}) *to = arena.take<float>(width);
    for (float** to : {&slice.B, &slice.C}) *to = arena.take<float>(p.interval * numbers());
    for (T** to : {&slice.tile_u, &slice.tile_dt, &slice.tile_z}) *to = arena.take<T>(PanelRows<T>::tile(p.slice));
    for (T** to : {&slice.tile_B, &slice.tile_C}) *to = arena.take<T>(PanelRows<T>::tile(states));
    return slice;
  }
  int64_t numbers() const { return round_up(states, W); }

  // The backward's further memory: gradients (N, width) of h and A, (width,) of D and dt_bias. For the tokens between
  // two checkpoints and one vector of channels: (tokens + 1, N) vectors of h, (tokens, N) vectors of e^(d A) and of the
  // summands of B's and C's gradients, and (tokens,) vectors.
  struct Gradients {
    float *h, *A, *D, *bias;
    vf *states, *decays, *B, *C, *d, *slope, *u, *dy;
    T* tile;
  };
  Gradients take_gradients(Arena& arena, const Slice&) const {
    Gradients grads;
    for (float** to : {&grads.h, &grads.A}) *to = arena.take<float>(states * width);
    for (float** to : {&grads.D, &grads.bias}) *to = arena.take<float>(width);
    grads.states = arena.take<vf>((p.interval + 1) * states);
    for (vf** to : {&grads.decays, &grads.B, &grads.C}) *to = arena.take<vf>(p.interval * states);
    for (vf** to : {&grads.d, &grads.slope, &grads.u, &grads.dy}) *to = arena.take<vf>(p.interval);
    grads.tile = arena.take<T>(PanelRows<T>::tile(p.slice));
    return grads;
  }

  struct Streams {
    PanelRows<T> u, dt, z, B, C;
    Streams(const SelectiveScan& scan, int64_t batch, int64_t first, int64_t count, const Slice& slice)
        : u(scan.p.u, batch, first, count, slice.tile_u),
          dt(scan.p.dt, batch, first, count, slice.tile_dt),
          z(scan.p.z, batch, first, count, slice.tile_z),
          B(scan.p.B, batch, 0, scan.states, slice.tile_B),
          C(scan.p.C, batch, 0, scan.states, slice.tile_C) {}
  };

  // body(batch, first channel, channels, arena) of every task.
  template <class LayOut, class Body>
  void run(const LayOut& lay_out, const Body& body) const {
    Blocks memory;
    with_scratch(0, [&](Arena& arena) { memory = arena.blocks(threads, bytes_of(lay_out)); });
    parallel_items(batches * slices, threads, [&](int64_t task, int thread) {
      const int64_t first = task % slices * p.slice;
      body(task / slices, first, min64(p.slice, channels - first), memory[thread]);
    });
  }

  // Lanes beyond the channels have zeros.
  void read_parameters(Slice& slice, int64_t first, int64_t count) const {
    slice.first = first, slice.count = count;
    memset(slice.h, 0, size_t(states * width) * 4);  // a checkpoint has no lanes beyond the channels
    transpose_in(slice.A, (const float*)p.A.data + first * states, count);
    for (int64_t i = 0; i < states * width; i++) slice.A[i] *= kLog2e;
    const auto read = [&](float* to, const Tensor& from) {
      memset(to, 0, size_t(width) * 4);
      if (from.data) memcpy(to, (const float*)from.data + first, size_t(count) * 4);
    };
    read(slice.D, p.D), read(slice.bias, p.dt_bias);
  }
  // (count, N) to (N, width) and back.
  void transpose_in(float* to, const float* from, int64_t count) const {
    memset(to, 0, size_t(states * width) * 4);
    for (int64_t c = 0; c < count; c++)
      for (int64_t n = 0; n < states; n++) to[n * width + c] = from[c * states + n];
  }
  void transpose_out(float* to, const float* from, int64_t count) const {
    for (int64_t c = 0; c < count; c++)
      for (int64_t n = 0; n < states; n++) to[c * states + n] = from[n * width + c];
  }
  void begin_state(Slice& slice, int64_t s) const {
    if (p.initial_state.data)
      transpose_in(slice.h, (const float*)p.initial_state.data + (s * channels + slice.first) * states, slice.count);
    else
      memset(slice.h, 0, size_t(states * width) * 4);
  }
  float* checkpoint(const Slice& slice, int64_t batch, int64_t t, int64_t n) const {
    return (float*)p.checkpoints.data + ((batch * checkpoints + t / p.interval) * states + n) * channels + slice.first;
  }
  void keep(const Slice& slice, int64_t batch, int64_t t) const {
    for (int64_t n = 0; n < states; n++)
      memcpy(checkpoint(slice, batch, t, n), slice.h + n * width, size_t(slice.count) * 4);
  }
  void restore(Slice& slice, int64_t batch, int64_t t) const {
    for (int64_t n = 0; n < states; n++)
      memcpy(slice.h + n * width, checkpoint(slice, batch, t, n), size_t(slice.count) * 4);
  }

  // A token's B and C in float32.
  void read_numbers(Streams& rows, int64_t t, float* B, float* C) const {
    const T *b = rows.B[t], *c = rows.C[t];
    for_columns(states, [&](int64_t n, int m) FASTATTN_INLINE_LAMBDA {
      store(B + n, get(b + n, m));
      store(C + n, get(c + n, m));
    });
  }
  FASTATTN_INLINE_MEMBER vf step_size(const T* dt, const float* bias, int n, vf* slope) const {
    const vf x = get(dt, n) + load(bias);
    *slope = splat(1.0f);
    return p.dt_softplus ? SoftplusScore<Arithmetic>::weight_and_slope(x, kLog2e, {}, slope) : x;
  }
  T* row(const Tensor& t, int64_t batch, int64_t token, int64_t first) const {
    return (T*)t.data + (batch * length + token) * channels + first;
  }

  // R tokens from t on.
  template <int R>
  void step(Slice& slice, Streams& rows, int64_t batch, int64_t t) const {
    const T *of_u[R], *of_dt[R], *of_z[R];
    T* out[R];
    for (int i = 0; i < R; i++) {
      of_u[i] = rows.u[t + i], of_dt[i] = rows.dt[t + i], of_z[i] = p.z.data ? rows.z[t + i] : nullptr;
      out[i] = row(p.out, batch, t + i, slice.first);
      read_numbers(rows, t + i, slice.B + i * numbers(), slice.C + i * numbers());
    }
    for_columns(slice.count, [&](int64_t j, int m) FASTATTN_INLINE_LAMBDA {
      vf d[R], u[R], du[R], y[R], slope;
      FASTATTN_EACH(i, R) {
        d[i] = step_size(of_dt[i] + j, slice.bias + j, m, &slope);
        u[i] = get(of_u[i] + j, m);
        du[i] = d[i] * u[i];
        y[i] = load(slice.D + j) * u[i];
      }
      for (int64_t n = 0; n < states; n++) {
        const vf A = load(slice.A + n * width + j);
        vf h = load(slice.h + n * width + j);
        FASTATTN_EACH(i, R) {
          h = exp2_any(d[i] * A) * h + du[i] * slice.B[i * numbers() + n];
          y[i] += h * slice.C[i * numbers() + n];
        }
        store(slice.h + n * width + j, h);
      }
      FASTATTN_EACH(i, R) {
        if (of_z[i]) {
          vf z = get(of_z[i] + j, m), divisor;
          sigmoid_divisors<1>(&z, &divisor, (const T*)nullptr);
          y[i] *= z / divisor;
        }
        put(out[i] + j, y[i], m);
      }
    });
  }

  // Tokens [begin, end) between two checkpoints; slice.h is the state before them. grads.h is the gradient of the state
  // after them and becomes the gradient of the state before them.
  void differentiate(Slice& slice, Gradients& grads, Streams& rows, PanelRows<T>& incoming, int64_t batch,
                     int64_t begin, int64_t end) const {
    const int64_t tokens = end - begin;
    for (int64_t i = 0; i < tokens; i++)
      read_numbers(rows, begin + i, slice.B + i * numbers(), slice.C + i * numbers());
    memset((void*)grads.B, 0, size_t(tokens * states) * sizeof(vf));
    memset((void*)grads.C, 0, size_t(tokens * states) * sizeof(vf));
    for_columns(slice.count, [&](int64_t j, int m) FASTATTN_INLINE_LAMBDA {
      replay(slice, grads, rows, incoming, batch, begin, tokens, j, m);
      pull(slice, grads, batch, begin, tokens, j, m);
    });
    const int64_t at = ((slice.first / p.slice * batches + batch) * length + begin) * states;
    for (int64_t i = 0; i < tokens * states; i++) {
      ((float*)p.grad_B.data)[at + i] = reduce_add(grads.B[i]);
      ((float*)p.grad_C.data)[at + i] = reduce_add(grads.C[i]);
    }
  }

  // Recomputes the states of the channels at j, the gradient of C.h + D u, and z's gradient.
  void replay(const Slice& slice, Gradients& grads, Streams& rows, PanelRows<T>& incoming, int64_t batch, int64_t begin,
              int64_t tokens, int64_t j, int m) const {
    const vf D = load(slice.D + j);
    vf of_D{};
    for (int64_t n = 0; n < states; n++) grads.states[n] = load(slice.h + n * width + j);
    for (int64_t i = 0; i < tokens; i++) {
      const vf u = grads.u[i] = get(rows.u[begin + i] + j, m);
      const vf d = grads.d[i] = step_size(rows.dt[begin + i] + j, slice.bias + j, m, grads.slope + i);
      const vf du = d * u, *before = grads.states + i * states;
      const float *B = slice.B + i * numbers(), *C = slice.C + i * numbers();
      vf *after = grads.states + (i + 1) * states, *decays = grads.decays + i * states, y = D * u;
      for (int64_t n = 0; n < states; n++) {
        decays[n] = exp2_any(d * load(slice.A + n * width + j));
        const vf h = decays[n] * before[n] + du * B[n];
        after[n] = h;
        y += h * C[n];
      }
      vf dy = get(incoming[begin + i] + j, m);
      if (p.z.data) {
        vf z = get(rows.z[begin + i] + j, m), divisor;
        sigmoid_divisors<1>(&z, &divisor, (const T*)nullptr);
        const vf s = splat(1.0f) / divisor;
        put(row(p.grad_z, batch, begin + i, slice.first) + j, dy * y * (s + z * s * (splat(1.0f) - s)), m);
        dy *= z * s;
      }
      grads.dy[i] = dy;
      of_D += dy * u;
    }
    store(grads.D + j, load(grads.D + j) + of_D);
  }

  void pull(const Slice& slice, Gradients& grads, int64_t batch, int64_t begin, int64_t tokens, int64_t j,
            int m) const {
    vf of_bias{};
    for (int64_t i = tokens - 1; i >= 0; i--) {
      const vf dy = grads.dy[i], d = grads.d[i], u = grads.u[i], du = d * u;
      const vf *before = grads.states + i * states, *after = before + states, *decays = grads.decays + i * states;
      const float *B = slice.B + i * numbers(), *C = slice.C + i * numbers();
      vf of_exponent{}, of_du{};  // the first in units of 1 / ln 2
      for (int64_t n = 0; n < states; n++) {
        float *carried = grads.h + n * width + j, *of_A = grads.A + n * width + j;
        const vf g = load(carried) + dy * C[n];
        grads.C[i * states + n] += dy * after[n];
        grads.B[i * states + n] += g * du;
        const vf through = g * decays[n], e = through * before[n];
        store(of_A, load(of_A) + e * d);
        of_exponent += e * load(slice.A + n * width + j);
        of_du += g * B[n];
        store(carried, through);
      }
      const vf of_dt = (of_exponent * kLn2 + of_du * u) * grads.slope[i];
      put(row(p.grad_u, batch, begin + i, slice.first) + j, dy * load(slice.D + j) + of_du * d, m);
      put(row(p.grad_dt, batch, begin + i, slice.first) + j, of_dt, m);
      of_bias += of_dt;
    }
    store(grads.bias + j, load(grads.bias + j) + of_bias);
  }
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
