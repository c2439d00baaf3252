// One token of a hierarchical recurrence at batch 1, as one persistent cooperative kernel.
//
// Each block pass is matrix-vector work: every weight is read once, by the one warp that owns its row, while the states
// (a few kilobytes) stay in shared memory and L2. Five grid barriers separate a pass's stages:
//   gqkv | attention over the cache, keys split over blocks | gate and output projection | gate_up | down
#pragma once
#include "params.h"

namespace fastattn {
namespace cuda {

// The vector of the next product; its size is the largest of hidden, heads * head_dim and inner.
extern __shared__ __align__(16) float decode_vector[];

// vector = rms(x); every block computes it.
FASTATTN_DEVICE void load_norm(const float* x, int n, float eps, float* scratch) {
  float squares = 0;
  for (int i = thread(); i < n; i += threads()) {
    const float value = fresh(x + i);
    decode_vector[i] = value;
    squares += value * value;
  }
  const float scale = rsqrtf(block_sum(squares, scratch) / n + eps);
  for (int i = thread(); i < n; i += threads()) decode_vector[i] *= scale;
  barrier();
}

// DIM: a multiple of 32, at least head_dim. ROWS: rows of a weight that a warp loads at a time. SPAN: keys of one unit
// of attention work.
template <class T, int DIM, int THREADS, int ROWS, int SPAN>
struct Decode {
  static constexpr int kWarps = THREADS / kWarp;
  static constexpr int kEach = DIM / kWarp;                   // elements of a key in a lane
  static constexpr int kAhead = kEach < 16 ? 16 / kEach : 1;  // keys in flight in a warp

  const DecodeParams& p;
  float *scratch, *turn;  // shared: a float a warp; cosine and sine of this position, head_dim / 2 each
  float *x, *z_h, *z_l, *gqkv, *mlp, *tops, *totals, *parts;
  int64_t width, position, pieces, warp, warps;

  FASTATTN_DEVICE Decode(const DecodeParams& params, float* sums, float* angles)
      : p(params), scratch(sums), turn(angles) {
    width = (int64_t)p.heads * p.head_dim;
    position = p.positions ? *p.positions : p.position;
    pieces = position / SPAN + 1;
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
  // Row `r` of a weight, or its last row if `r` is beyond.
  FASTATTN_DEVICE static const T* row_of(const void* weight, int64_t r, int64_t count, int columns) {
    return (const T*)weight + (r < count ? r : count - 1) * columns;
  }

  // out[r] = (add ? out[r] : 0) + weight row r . vector
  FASTATTN_DEVICE void rows(const void* weight, int64_t count, int columns, float* out, bool add) const {
    for (int64_t first = warp * ROWS; first < count; first += warps * ROWS) {
      const T* row[ROWS];
      float sum[ROWS];
      for (int i = 0; i < ROWS; i++) row[i] = row_of(weight, first + i, count, columns);
      warp_dots(row, decode_vector, columns, sum);
      for (int i = 0; i < ROWS; i++)
        if (leads() && first + i < count) out[first + i] = (add ? fresh(out + first + i) : 0) + sum[i];
    }
  }

  FASTATTN_DEVICE float rotated(const float* head, int i) const {
    const int half = p.head_dim / 2, j = i < half ? i : i - half;
    const float first = fresh(head + j), second = fresh(head + j + half), cosine = turn[j], sine = turn[j + half];
    return i < half ? first * cosine - second * sine : second * cosine + first * sine;
  }

  // Each warp takes a piece of SPAN keys of a head: running maximum, sum, accumulator. The new key is appended.
  FASTATTN_DEVICE void attend(int64_t slot) const {
    const int lane = thread() % kWarp, dim = p.head_dim;
    const float scale = rsqrtf((float)dim);
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
      LogSum sum;
      const auto take = [&](const float (&k)[kEach], const float (&v)[kEach]) {
        float s = 0;
        for (int e = 0; e < kEach; e++) s += q[e] * k[e];
        s = warp_sum(s);
        const float high = fmaxf(sum.top, s), old = expf(sum.top - high), weight = expf(s - high);
        for (int e = 0; e < kEach; e++) acc[e] = acc[e] * old + weight * v[e];
        sum.add(s, 1);
      };
      const int64_t begin = piece * SPAN, end = begin + SPAN < position ? begin + SPAN : position;
      for (int64_t t = begin; t < end; t += kAhead) {
        float k[kAhead][kEach], v[kAhead][kEach];
        for (int a = 0; a < kAhead; a++)
          for (int e = 0; e < kEach; e++) {
            const int i = lane + e * kWarp;
            const bool there = i < dim && t + a < end;
            k[a][e] = there ? widen(keys[(t + a) * dim + i]) : 0;
            v[a][e] = there ? widen(values[(t + a) * dim + i]) : 0;
          }
        for (int a = 0; a < kAhead; a++)
          if (t + a < end) take(k[a], v[a]);
      }
      if (piece == pieces - 1) {
        float k[kEach], v[kEach];
        for (int e = 0; e < kEach; e++) {
          const int i = lane + e * kWarp;
          const int64_t at = position * dim + i;
          k[e] = v[e] = 0;
          if (i >= dim) continue;
          narrow(rotated(gqkv + 2 * width + head * dim, i), keys + at);
          narrow(fresh(gqkv + 3 * width + head * dim + i), values + at);
          k[e] = widen(keys[at]);  // as rounded to T
          v[e] = widen(values[at]);
        }
        take(k, v);
      }
      for (int e = 0; e < kEach; e++)
        if (lane + e * kWarp < dim) parts[work * dim + lane + e * kWarp] = acc[e];
      if (leads()) {
        tops[work] = sum.top;
        totals[work] = sum.total;
      }
    }
  }

  // vector = sigmoid(gate) * attention, with the pieces merged in order; every block computes it.
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

  // mlp = silu(gate rows . vector) * (up rows . vector)
  FASTATTN_DEVICE void gate_up(const void* weight) const {
    for (int64_t first = warp * ROWS; first < p.inner; first += warps * ROWS) {
      const T* row[2 * ROWS];
      float sum[2 * ROWS];
      for (int i = 0; i < ROWS; i++) {
        row[i] = row_of(weight, first + i, p.inner, p.hidden);
        row[ROWS + i] = row[i] + (int64_t)p.inner * p.hidden;
      }
      warp_dots(row, decode_vector, p.hidden, sum);
      for (int i = 0; i < ROWS; i++)
        if (leads() && first + i < p.inner) mlp[first + i] = sum[i] / (1 + expf(-sum[i])) * sum[ROWS + i];
    }
  }

  FASTATTN_DEVICE void layer(int stack, int index, int64_t slot) const {
    load_norm(x, p.hidden, p.eps, scratch);
    rows(p.gqkv[stack][index], 4 * width, p.hidden, gqkv, false);
    grid_barrier();
    attend(slot);
    grid_barrier();
    load_gated();
    rows(p.out[stack][index], p.hidden, (int)width, x, true);
    grid_barrier();
    load_norm(x, p.hidden, p.eps, scratch);
    gate_up(p.gate_up[stack][index]);
    grid_barrier();
    for (int i = thread(); i < p.inner; i += threads()) decode_vector[i] = fresh(mlp + i);
    barrier();
    rows(p.down[stack][index], p.hidden, p.inner, x, true);
    grid_barrier();
  }

  // z = rms(layers(z + other)), the norm at the stack's exit
  FASTATTN_DEVICE void stack(int which, int64_t call, float* z, const float* other) const {
    for (int64_t i = block() * threads() + thread(); i < p.hidden; i += blocks() * threads())
      x[i] = fresh(z + i) + fresh(other + i);
    grid_barrier();
    for (int index = 0; index < p.layers; index++) layer(which, index, call * p.layers + index);
    load_norm(x, p.hidden, p.eps, scratch);
    if (block() == 0)
      for (int i = thread(); i < p.hidden; i += threads()) z[i] = decode_vector[i];
    grid_barrier();
  }

  FASTATTN_DEVICE void run() const {
    const int half = p.head_dim / 2;
    for (int j = thread(); j < half; j += threads()) {
      const double angle = position * pow((double)p.theta, -2.0 * j / p.head_dim);
      turn[j] = (float)cos(angle);
      turn[j + half] = (float)sin(angle);
    }
    for (int64_t i = block() * threads() + thread(); i < p.hidden; i += blocks() * threads()) {
      z_h[i] = widen(((const T*)p.z_h)[i]);
      z_l[i] = widen(((const T*)p.z_l)[i]);  // the same thread adds the two
    }
    for (int h = 0; h < p.h_cycles; h++) {
      const int64_t call = (int64_t)h * (p.l_cycles + 1);
      for (int l = 0; l < p.l_cycles; l++) stack(0, call + l, z_l, z_h);
      stack(1, call + p.l_cycles, z_h, z_l);
    }
    if (block() == 0)
      for (int i = thread(); i < p.hidden; i += threads()) narrow(fresh(z_h + i), (T*)p.result + i);
  }
};

template <class T, int DIM, int THREADS, int ROWS, int SPAN>
FASTATTN_KERNEL(THREADS)
decode_step(DecodeParams p) {
  __shared__ float sums[THREADS / kWarp], angles[DIM];
  Decode<T, DIM, THREADS, ROWS, SPAN>(p, sums, angles).run();
}

}  // namespace cuda
}  // namespace fastattn
