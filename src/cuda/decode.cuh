// One token of a hierarchical recurrence at batch 1, as one persistent cooperative kernel.
//
// Each block pass is matrix-vector work: every weight is read once, by the one warp that owns its row, while the states
// (a few kilobytes) stay in shared memory and L2. Five grid barriers separate a pass's stages:
//   gqkv | attention over the cache, keys split over blocks | gate and output projection | gate_up | down
#pragma once
#include "params.h"

namespace fastattn {
namespace cuda {

constexpr int64_t kSpan = 64;  // keys of one piece of attention work

// Floats of workspace: x, zH, zL, gqkv, hidden of the MLP, and (top, total, accumulator) of each piece of attention.
inline int64_t decode_workspace(const DecodeParams& p) {
  const int64_t width = (int64_t)p.heads * p.head_dim, pieces = (p.capacity + kSpan - 1) / kSpan;
  return 3 * (int64_t)p.hidden + 4 * width + p.inner + p.heads * pieces * (p.head_dim + 2);
}
// Bytes of dynamic shared memory of a block.
inline int64_t decode_shared(const DecodeParams& p) {
  const int64_t width = (int64_t)p.heads * p.head_dim;
  const int64_t longest = width > p.inner ? width : p.inner;
  return 4 * (longest > p.hidden ? longest : p.hidden);
}

#if defined(__CUDACC__)
extern __shared__ float decode_vector[];
#else
static float decode_vector[1 << 16];
#endif

// vector = rms(x): every block forms it for itself.
FASTATTN_DEVICE void load_norm(const float* x, int n, float eps, float* scratch) {
  float squares = 0;
  for (int i = thread(); i < n; i += threads()) {
    const float value = fresh(x + i);
    decode_vector[i] = value;
    squares += value * value;
  }
  const float scale = reciprocal_sqrt(block_sum(squares, scratch) / n + eps);
  for (int i = thread(); i < n; i += threads()) decode_vector[i] *= scale;
  barrier();
}

template <class T, int THREADS>
struct Decode {
  static constexpr int kWarps = THREADS / kWarp > 0 ? THREADS / kWarp : 1;
  static constexpr int kMostDim = 256;

  const DecodeParams& p;
  float* scratch;
  float *x, *z_h, *z_l, *gqkv, *mlp, *tops, *totals, *parts;
  int64_t width, pieces, warp, warps;

  FASTATTN_DEVICE Decode(const DecodeParams& params, float* shared) : p(params), scratch(shared) {
    width = (int64_t)p.heads * p.head_dim;
    pieces = p.position / kSpan + 1;
    x = p.workspace;
    z_h = x + p.hidden;
    z_l = z_h + p.hidden;
    gqkv = z_l + p.hidden;
    mlp = gqkv + 4 * width;
    tops = mlp + p.inner;
    totals = tops + p.heads * pieces;
    parts = totals + p.heads * pieces;
    warp = block() * kWarps + thread() / kWarp;
    warps = blocks() * kWarps;
  }
  FASTATTN_DEVICE bool leads() const { return thread() % kWarp == 0; }

  // out[r] = (add ? out[r] : 0) + weight row r . vector
  FASTATTN_DEVICE void rows(const T* weight, int64_t count, int columns, float* out, bool add) const {
    for (int64_t r = warp; r < count; r += warps) {
      const float value = warp_dot(weight + r * columns, decode_vector, columns);
      if (leads()) out[r] = add ? fresh(out + r) + value : value;
    }
  }

  FASTATTN_DEVICE float rotated(const float* head, int i) const {
    const int half = p.head_dim / 2, j = i < half ? i : i - half;
    const float first = fresh(head + j), second = fresh(head + j + half);
    return i < half ? first * p.cos[j] - second * p.sin[j] : second * p.cos[j] + first * p.sin[j];
  }

  // Pieces of kSpan keys of a head, one a warp: running maximum, sum and accumulator; the newest key joins the cache.
  FASTATTN_DEVICE void attend(int64_t slot) const {
    constexpr int kEach = (kMostDim + kWarp - 1) / kWarp;
    const int lane = thread() % kWarp, dim = p.head_dim;
    const float scale = reciprocal_sqrt((float)dim);
    for (int64_t work = warp; work < p.heads * pieces; work += warps) {
      const int64_t head = work / pieces, piece = work % pieces;
      T* keys = (T*)p.k_cache + (slot * p.heads + head) * p.capacity * dim;
      T* values = (T*)p.v_cache + (slot * p.heads + head) * p.capacity * dim;
      float q[kEach], acc[kEach];
      for (int e = 0; e < kEach; e++) {
        const int i = lane + e * kWarp;
        q[e] = i < dim ? rotated(gqkv + width + head * dim, i) * scale : 0;
        acc[e] = 0;
      }
      const int64_t begin = piece * kSpan, end = begin + kSpan <= p.position ? begin + kSpan : p.position + 1;
      LogSum sum;
      for (int64_t t = begin; t < end; t++) {
        float k[kEach], v[kEach], s = 0;
        for (int e = 0; e < kEach; e++) {
          const int i = lane + e * kWarp;
          k[e] = v[e] = 0;
          if (i >= dim) continue;
          if (t == p.position) {
            narrow(rotated(gqkv + 2 * width + head * dim, i), keys + t * dim + i);
            narrow(fresh(gqkv + 3 * width + head * dim + i), values + t * dim + i);
          }
          k[e] = widen(keys[t * dim + i]);
          v[e] = widen(values[t * dim + i]);
          s += q[e] * k[e];
        }
        s = warp_sum(s);
        const float high = fmaxf(sum.top, s), old = expf(sum.top - high), weight = expf(s - high);
        for (int e = 0; e < kEach; e++) acc[e] = acc[e] * old + weight * v[e];
        sum.add(s, 1);
      }
      for (int e = 0; e < kEach; e++)
        if (lane + e * kWarp < dim) parts[work * dim + lane + e * kWarp] = acc[e];
      if (leads()) {
        tops[work] = sum.top;
        totals[work] = sum.total;
      }
    }
  }

  // vector = sigmoid(gate) * attention, pieces merged in order: every block forms it for itself.
  FASTATTN_DEVICE void load_gated() const {
    for (int64_t i = thread(); i < width; i += threads()) {
      const int64_t head = i / p.head_dim, first = head * pieces;
      float top = kLowest;
      for (int64_t j = 0; j < pieces; j++) top = fmaxf(top, fresh(tops + first + j));
      float value = 0, total = 0;
      for (int64_t j = 0; j < pieces; j++) {
        const float factor = expf(fresh(tops + first + j) - top);
        value += factor * fresh(parts + (first + j) * p.head_dim + i % p.head_dim);
        total += factor * fresh(totals + first + j);
      }
      decode_vector[i] = value / total / (1 + expf(-fresh(gqkv + i)));
    }
    barrier();
  }

  FASTATTN_DEVICE void layer(int stack, int64_t index, int64_t slot) const {
    const int hidden = p.hidden, inner = p.inner;
    load_norm(x, hidden, p.eps, scratch);
    rows((const T*)p.gqkv[stack] + index * 4 * width * hidden, 4 * width, hidden, gqkv, false);
    grid_barrier();
    attend(slot);
    grid_barrier();
    load_gated();
    rows((const T*)p.out[stack] + index * hidden * width, hidden, (int)width, x, true);
    grid_barrier();
    load_norm(x, hidden, p.eps, scratch);
    const T* gate_up = (const T*)p.gate_up[stack] + index * 2 * inner * hidden;
    for (int64_t r = warp; r < inner; r += warps) {
      const float gate = warp_dot(gate_up + r * hidden, decode_vector, hidden);
      const float up = warp_dot(gate_up + (inner + r) * hidden, decode_vector, hidden);
      if (leads()) mlp[r] = gate / (1 + expf(-gate)) * up;
    }
    grid_barrier();
    for (int i = thread(); i < inner; i += threads()) decode_vector[i] = fresh(mlp + i);
    barrier();
    rows((const T*)p.down[stack] + index * hidden * inner, hidden, inner, x, true);
    grid_barrier();
  }

  // z = rms(layers(z + other)), the norm at the stack's exit
  FASTATTN_DEVICE void stack(int which, int64_t call, float* z, const float* other) const {
    for (int64_t i = block() * threads() + thread(); i < p.hidden; i += blocks() * threads())
      x[i] = fresh(z + i) + fresh(other + i);
    grid_barrier();
    for (int64_t index = 0; index < p.layers; index++) layer(which, index, call * p.layers + index);
    load_norm(x, p.hidden, p.eps, scratch);
    if (block() == 0)
      for (int i = thread(); i < p.hidden; i += threads()) z[i] = decode_vector[i];
    grid_barrier();
  }

  FASTATTN_DEVICE void run() const {
    for (int64_t i = block() * threads() + thread(); i < p.hidden; i += blocks() * threads()) {
      z_h[i] = p.z_h[i];
      z_l[i] = p.z_l[i];
    }
    grid_barrier();
    for (int h = 0; h < p.h_cycles; h++) {
      const int64_t call = (int64_t)h * (p.l_cycles + 1);
      for (int l = 0; l < p.l_cycles; l++) stack(0, call + l, z_l, z_h);
      stack(1, call + p.l_cycles, z_h, z_l);
    }
    if (block() == 0)
      for (int i = thread(); i < p.hidden; i += threads()) p.result[i] = fresh(z_h + i);
  }
};

template <class T, int THREADS>
FASTATTN_KERNEL decode_step(DecodeParams p) {
  __shared__ float scratch[THREADS / kWarp > 0 ? THREADS / kWarp : 1];
  Decode<T, THREADS>(p, scratch).run();
}

}  // namespace cuda
}  // namespace fastattn
