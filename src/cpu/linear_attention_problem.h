// A call of linear attention: its tasks, its tensors as panels, and the queries and keys of a chunk.
#pragma once

#include "arena.h"
#include "limits.h"
#include "math.h"
#include "pack.h"
#include "parallel.h"

namespace fastattn {
namespace FASTATTN_ISA {

constexpr int64_t kChunk = limits::chunk;
constexpr int64_t kChunkRows = (kChunk + kRows - 1) / kRows * kRows;
constexpr int64_t kPairs = (kChunkRows + W - 1) / W * W;  // floats between rows of a matrix of pairs of tokens
static_assert(kChunk % kPanel == 0);

// One head's plane of a tensor (A, B, rows, columns), from a row on.
FASTATTN_INLINE Matrix plane_of(const Tensor& t, int64_t a, int64_t b, int64_t row) {
  if (!t.data) return {nullptr, 0, t.dtype};
  const int64_t offset = a * t.stride[0] + b * t.stride[1] + row * t.stride[2];
  const int64_t width = t.dtype == DType::f32 ? 4 : 2;
  return {(const char*)t.data + offset * width, t.stride[2], t.dtype};
}

// Calls f(panel's first column, constant of its vectors) for each panel of [0, columns), a multiple of W.
template <class F>
FASTATTN_INLINE void for_panels(int64_t columns, const F& f) {
  for (int64_t d = 0; d < columns; d += kPanel) {
    const int64_t vecs = min64(kPanel, columns - d) / W;
    if constexpr (kVecs == 4) {
      if (vecs == 4) f(d, std::integral_constant<int, 4>{});
      if (vecs == 3) f(d, std::integral_constant<int, 3>{});
    }
    if (vecs == 2) f(d, std::integral_constant<int, 2>{});
    if (vecs == 1) f(d, std::integral_constant<int, 1>{});
  }
}

// f(row, column, place) for vectors of rows of `columns` columns that are kept as panels
// of `capacity` rows.
template <class F>
FASTATTN_INLINE void for_vectors(int64_t rows, int64_t columns, int64_t capacity, const F& f) {
  const int64_t padded = round_up(columns, W);
  for (int64_t d = 0; d < padded; d += kPanel) {
    const int64_t width = min64(kPanel, padded - d);
    for (int64_t i = 0; i < rows; i++)
      for (int64_t j = 0; j < width; j += W) f(i, d + j, d * capacity + i * width + j);
  }
}

// Rows of one dtype to panels: columns [first, first + columns) of `given`, a column of 1 if `one`, then zeros.
static void load_panels(float* to, int64_t capacity, const Matrix& from, int64_t rows, int64_t first, int64_t columns,
                        int64_t given, bool one) {
  with_dtype(from.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* data = (const T*)from.data;
    for_vectors(rows, columns, capacity, [&](int64_t i, int64_t d, int64_t place) {
      const int64_t left = given - first - d;
      const T* x = data + i * from.stride + first + d;
      vf value = left >= W ? load(x) : left > 0 ? load_n(x, (int)left) : vf{};
      if (one && left >= 0 && left < W) value = select(iota() == (int32_t)left, splat(1.0f), value);
      store(to + place, value);
    });
  });
}
// Panels to rows; columns from `given` on are left out.
static void store_panels(const Matrix& to, const float* from, int64_t capacity, int64_t rows, int64_t first,
                         int64_t columns, int64_t given) {
  with_dtype(to.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* data = (T*)to.data;
    for_vectors(rows, columns, capacity, [&](int64_t i, int64_t d, int64_t place) {
      const int64_t left = min64(given - first, columns) - d;
      T* x = data + i * to.stride + first + d;
      if (left >= W)
        store(x, load(from + place));
      else if (left > 0)
        store_n(x, load(from + place), (int)left);
    });
  });
}

// The transpose of panels (rows, columns): as panels of kPanel rows, each (columns, kPanel), zero beyond `rows`.
static void transpose_panels(float* to, const float* from, int64_t capacity, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < round_up(rows, kPanel); r += W) {
    float* panel = to + r / kPanel * kPanel * columns + r % kPanel;
    for (int64_t d = 0; d < columns; d += W) {
      const int64_t first = d / kPanel * kPanel, width = min64(kPanel, columns - first);
      vf block[W];
      FASTATTN_UNROLL
      for (int i = 0; i < W; i++)
        block[i] = r + i < rows ? load(from + first * capacity + (r + i) * width + (d - first)) : vf{};
      transpose(block);
      FASTATTN_UNROLL
      for (int i = 0; i < W; i++) store(panel + (d + i) * kPanel, block[i]);
    }
  }
}

// The rows that the next chunk reads, prefetched one by one while this chunk is computed: a token's heads lie side by
// side in memory, so a head's rows are far apart and the processor does not prefetch them.
class RowsAhead {
 public:
  void clear() { tensors_ = next_ = 0; }
  void add(const Matrix& rows, int64_t count, int64_t columns) {
    const int64_t width = rows.dtype == DType::f32 ? 4 : 2;
    of_[tensors_++] = {(const char*)rows.data, rows.stride * width, columns * width};
    count_ = count;
  }
  // The next row, if there is one.
  void step() {
    if (next_ >= tensors_ * count_) return;
    const Run& run = of_[next_ / count_];
    const char* row = run.data + next_++ % count_ * run.stride;
    for (int64_t b = 0; b < run.bytes; b += 64) __builtin_prefetch(row + b, 0, 2);
  }

 private:
  struct Run {
    const char* data;
    int64_t stride, bytes;
  };
  Run of_[4];
  int64_t tensors_ = 0, count_ = 0, next_ = 0;
};

// A document of a batch: `length` tokens from `begin` on, the index of its state, and that of its first kept state.
struct LinearSequence {
  int64_t batch, begin, length, state, kept;
};

// The work of one task: value heads [head, head + heads) of a key head, columns [column, column + columns) of their
// states, and the index of its part among all parts and among the parts of columns.
struct LinearTask {
  LinearSequence sequence;
  int64_t key_head, head, heads, column, columns, part, value_part;
};

struct LinearProblem {
  const LinearAttentionParams& p;
  int64_t key_heads, group, length, key_dim, value_dim, columns, sequences, kept;
  int64_t key_stride;  // floats between rows of a chunk's keys; beyond key_dim they are 0
  int64_t state_rows;  // of a state's panels
  int64_t part_columns;

  explicit LinearProblem(const LinearAttentionParams& p)
      : p(p),
        key_heads(p.q.size[1]),
        group(key_heads ? p.v.size[1] / key_heads : 0),
        length(p.q.size[2]),
        key_dim(p.q.size[3]),
        value_dim(p.v.size[3]),
        columns(value_dim + (p.normalize ? 1 : 0)),
        sequences(p.offsets.data ? p.offsets.size[3] - 1 : p.q.size[0]),
        kept(p.states.data && p.v.size[1] ? p.states.size[1] / p.v.size[1] : 0),
        key_stride(round_up(max64(round_up(key_dim, kPanel), round_up(key_dim, kRows)), W)),
        state_rows(round_up(key_dim, kRows)) {
    const int64_t panels = (columns + kPanel - 1) / kPanel;
    part_columns = (panels + p.value_parts - 1) / p.value_parts * kPanel;
  }

  int64_t tasks() const { return sequences * key_heads * p.head_parts * p.value_parts; }
  int64_t heads_of_part() const { return (group + p.head_parts - 1) / p.head_parts; }

  LinearSequence sequence(int64_t n) const {
    if (!p.offsets.data) return {n, 0, length, n, 0};
    const int64_t* cut = (const int64_t*)p.offsets.data + n;
    return {0, cut[0], cut[1] - cut[0], n, p.causal ? cut[0] / kChunk + n : n};
  }
  LinearTask task(int64_t n) const {
    const int64_t value_part = n % p.value_parts, head_part = n / p.value_parts % p.head_parts;
    const int64_t key_head = n / (p.value_parts * p.head_parts) % key_heads;
    LinearTask task;
    task.sequence = sequence(n / (p.value_parts * p.head_parts * key_heads));
    task.key_head = key_head;
    const int64_t first = group * head_part / p.head_parts, end = group * (head_part + 1) / p.head_parts;
    task.head = key_head * group + first;
    task.heads = end - first;
    task.column = min64(value_part * part_columns, columns);
    task.columns = min64(part_columns, columns - task.column);
    task.part = head_part * p.value_parts + value_part;
    task.value_part = value_part;
    return task;
  }
  // A head's kept state after `chunk` of the sequence's chunks.
  Matrix kept_state(const LinearSequence& s, int64_t head, int64_t chunk) const {
    return plane_of(p.states, s.batch, head * kept + s.kept + chunk, 0);
  }
  // The rows that the chunk at token `first` reads for one value head; for a task's last head also those of the keys.
  void look_ahead(RowsAhead& ahead, const LinearTask& t, int64_t head, int64_t first, const Tensor* grad_out) const {
    ahead.clear();
    if (first < 0 || first >= t.sequence.length) return;
    const int64_t rows = min64(kChunk, t.sequence.length - first), token = t.sequence.begin + first;
    const int64_t values = max64(0, min64(t.columns, value_dim - t.column));
    const auto from_column = [&](const Tensor& x) {
      Matrix plane = plane_of(x, t.sequence.batch, head, token);
      plane.data = (const char*)plane.data + t.column * (x.dtype == DType::f32 ? 4 : 2);
      return plane;
    };
    ahead.add(from_column(p.v), rows, values);
    if (grad_out) ahead.add(from_column(*grad_out), rows, values);
    if (head + 1 < t.head + t.heads) return;
    ahead.add(plane_of(p.q, t.sequence.batch, t.key_head, token), rows, key_dim);
    ahead.add(plane_of(p.k, t.sequence.batch, t.key_head, token), rows, key_dim);
  }

  int64_t padded_columns() const { return round_up(min64(part_columns, columns), W); }
  int threads() const { return threads_for(p.threads, p.v.size[0] * p.v.size[1] * length * key_dim * value_dim); }

  // A task's columns of a state (dk, columns) as panels; 0 if the state is absent.
  void load_state(float* to, const LinearTask& t, const Matrix& from) const {
    const int64_t padded = round_up(t.columns, W);
    memset(to, 0, size_t(state_rows * padded) * 4);
    if (from.data) load_panels(to, state_rows, from, key_dim, t.column, t.columns, columns, false);
  }
  void store_state(const Matrix& to, const float* from, const LinearTask& t) const {
    store_panels(to, from, state_rows, key_dim, t.column, t.columns, columns);
  }
  // A task's columns of a chunk's rows of v or its output's gradient as panels, 0 up to a whole group of rows.
  void load_values(float* to, const Tensor& from, const LinearTask& t, int64_t head, int64_t first, int64_t rows,
                   bool ones) const {
    const int64_t padded = round_up(t.columns, W);
    load_panels(to, kChunkRows, plane_of(from, t.sequence.batch, head, t.sequence.begin + first), rows, t.column,
                t.columns, value_dim, ones);
    for (int64_t d = 0; d < padded; d += kPanel) {
      const int64_t width = min64(kPanel, padded - d);
      memset(to + d * kChunkRows + rows * width, 0, size_t((round_up(rows, kRows) - rows) * width) * 4);
    }
  }
  // Panels to a chunk's rows of a tensor of v's shape.
  void store_values(const Tensor& to, const float* from, const LinearTask& t, int64_t head, int64_t first,
                    int64_t rows) const {
    store_panels(plane_of(to, t.sequence.batch, head, t.sequence.begin + first), from, kChunkRows, rows, t.column,
                 t.columns, value_dim);
  }
};

// One thread's copy of a chunk's queries and keys, and their products, which all value heads of a key head share.
struct LinearKeys {
  const LinearProblem& problem;
  float *q, *k;                // (kChunkRows, key_stride)
  float *q_factor, *k_factor;  // (kChunkRows) of qk_norm
  float* transposed;           // k as panels of tokens, contracted over channels
  float *qk, *kk;              // (kChunkRows, kPairs) products, at and below the diagonal
  int64_t rows = 0, groups = 0;

  LinearKeys(const LinearProblem& problem, Arena& arena)
      : problem(problem),
        q(arena.take<float>(kChunkRows * problem.key_stride)),
        k(arena.take<float>(kChunkRows * problem.key_stride)),
        q_factor(arena.take<float>(kChunkRows)),
        k_factor(arena.take<float>(kChunkRows)),
        transposed(arena.take<float>(kChunk * problem.key_dim)),
        qk(arena.take<float>(kChunkRows * kPairs)),
        kk(arena.take<float>(kChunkRows * kPairs)) {}

  void load(const LinearTask& t, int64_t first, int64_t count) {
    const LinearAttentionParams& p = problem.p;
    rows = count, groups = (count + kRows - 1) / kRows;
    load_rows(q, q_factor, plane_of(p.q, t.sequence.batch, t.key_head, t.sequence.begin + first));
    load_rows(k, k_factor, plane_of(p.k, t.sequence.batch, t.key_head, t.sequence.begin + first));
  }
  // Products of all pairs at or below the diagonal.
  void multiply() {
    pack_transposed<Singles>(transposed, {k, problem.key_stride, DType::f32}, rows, problem.key_dim);
    products(qk, q);
    if (problem.p.delta_rule) products(kk, k);
  }

  static void scale_row(float* x, int64_t columns, float factor) {
    for (int64_t d = 0; d < columns; d += W) store(x + d, FASTATTN_ISA::load(x + d) * factor);
  }

 private:
  void load_rows(float* to, float* factors, const Matrix& from) {
    pack_rows<Singles>((float*)to, problem.key_stride, from, rows, problem.key_dim, 1.0f);
    if (!problem.p.qk_norm) return;
    for (int64_t i = 0; i < rows; i++) {
      float* x = to + i * problem.key_stride;
      vf sum{};
      for (int64_t d = 0; d < problem.key_dim; d += W) sum += FASTATTN_ISA::load(x + d) * FASTATTN_ISA::load(x + d);
      factors[i] = 1.0f / __builtin_sqrtf(reduce_add(sum) + 1e-6f);
      scale_row(x, problem.key_dim, factors[i]);
    }
  }
  FASTATTN_NOINLINE_MEMBER void products(float* to, const float* x) {
    const int64_t stride = problem.key_stride;
    for (int64_t j = 0; j < rows; j += kPanel)
      for (int64_t g = j / kRows; g < groups; g++)
        product<Singles>(x + g * kRows * stride, stride, transposed + j * problem.key_dim, problem.key_dim,
                         [&](int i, int v, vf value) { store(to + (g * kRows + i) * kPairs + j + v * W, value); });
  }
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
