// Attention of a few query rows against many keys, as decoding has them: keys and values are read once, where they lie,
// by all rows of a key head. The keys are cut into chunks of a fixed size, one task each; partial results are merged in
// their order.
#pragma once

#include "attention_problem.h"

namespace fastattn {
namespace FASTATTN_ISA {

// What a chunk of keys gives one row: weighted values, and by lanes the row sum; `top` is the maximum they are relative
// to.
struct Partial {
  float* out;   // (value columns)
  float* sums;  // (W)
  float* top;
};

template <class Score>
struct DecodeChunk {
  static constexpr int64_t kTile = 64;  // keys whose weights are formed at a time

  const Problem& problem;
  int64_t rows, q_columns, out_columns;
  float *q, *scores;  // (rows, q_columns), (rows, kTile)
  RowRanges ranges;

  static int64_t partial_floats(const Problem& problem) { return round_up(problem.value_dim, W) + W + 16; }
  static Partial partial(const Problem& problem, float* memory) {
    const int64_t columns = round_up(problem.value_dim, W);
    return {memory, memory + columns, memory + columns + W};
  }

  DecodeChunk(const Problem& problem, int64_t rows, Arena& arena)
      : problem(problem),
        rows(rows),
        q_columns(round_up(problem.head_dim, W)),
        out_columns(round_up(problem.value_dim, W)),
        q(arena.take<float>(round_up(rows, 4) * q_columns)),
        scores(arena.take<float>(round_up(rows, 4) * kTile)),
        ranges(round_up(rows, kRows), arena) {}

  // Keys [begin, end) of one key head for all rows of its query heads, (group, q_length) in order.
  void run(const Sequence& s, int64_t kv_head, int64_t begin, int64_t end, float* partials) {
    const AttentionParams& p = problem.p;
    const int64_t count = problem.group * s.q_length, stride = partial_floats(problem);
    int64_t first = INT32_MAX, last = 0;
    for (int64_t r = 0; r < count; r++) {
      s.interval(r % s.q_length, ranges.low + r, ranges.high + r);
      first = min64(first, ranges.low[r]);
      last = max64(last, ranges.high[r]);
      const Partial to = partial(problem, partials + r * stride);
      memset(to.out, 0, size_t(out_columns + W) * 4);
      *to.top = -__builtin_inff();
    }
    first = max64(first, begin);
    last = min64(last, end);
    if (first >= last) return;
    memset(q, 0, size_t(round_up(rows, 4) * q_columns) * 4);
    for (int64_t r = 0; r < count; r++) {
      const Matrix row = matrix(p.q, s.batch, kv_head * problem.group + r / s.q_length, s.q_begin + r % s.q_length);
      with_dtype(row.dtype, [&](auto* type) {
        const auto* x = (decltype(type))row.data;
        for (int64_t j = 0; j < problem.head_dim; j += W) {
          const vf value = j + W <= problem.head_dim ? load(x + j) : load_n(x + j, (int)(problem.head_dim - j));
          store(q + r * q_columns + j, value * problem.sign);
        }
      });
    }
    for (int64_t n = begin + (first - begin) / kTile * kTile; n < last; n += kTile) {
      const int64_t keys = min64(kTile, end - n);
      with_dtype(p.k.dtype, [&](auto* type) {
        const auto* k = (decltype(type))matrix(p.k, s.batch, kv_head, s.k_begin + n).data;
        const auto* v = (decltype(type))matrix(p.v, s.batch, kv_head, s.k_begin + n).data;
        if (count == 1)
          score<1, 4>(k, keys, 1);
        else
          score<4, 2>(k, keys, count);
        for (int64_t r = 0; r < count; r++) weigh(s, kv_head, r, n, keys, partial(problem, partials + r * stride));
        if (count == 1)
          add_values<1>(v, keys, 1, partials);
        else
          add_values<4>(v, keys, count, partials);
      });
    }
  }

  // scores (rows, keys) = q k^T, R rows and K keys at a time.
  template <int R, int K, class T>
  FASTATTN_NOINLINE_MEMBER void score(const T* k, int64_t keys, int64_t count) {
    const int64_t stride = problem.p.k.stride[2], whole = problem.head_dim / W * W;
    for (int64_t j = 0; j < keys; j += K)
      for (int64_t r = 0; r < count; r += R) {
        const T* key[K];
        FASTATTN_UNROLL
        for (int b = 0; b < K; b++) key[b] = k + min64(j + b, keys - 1) * stride;
        vf acc[R][K];
        FASTATTN_UNROLL
        for (int a = 0; a < R; a++) {
          FASTATTN_UNROLL
          for (int b = 0; b < K; b++) acc[a][b] = vf{};
        }
        const auto step = [&](int64_t d, const auto& get) {
          vf x[K];
          FASTATTN_UNROLL
          for (int b = 0; b < K; b++) x[b] = get(key[b] + d);
          FASTATTN_UNROLL
          for (int a = 0; a < R; a++) {
            const vf y = load(q + (r + a) * q_columns + d);
            FASTATTN_UNROLL
            for (int b = 0; b < K; b++) acc[a][b] += y * x[b];
          }
        };
        for (int64_t d = 0; d < whole; d += W)
          step(d, [](const T* at) __attribute__((always_inline)) { return load(at); });
        if (whole < problem.head_dim) {
          const int left = (int)(problem.head_dim - whole);
          step(whole, [left](const T* at) __attribute__((always_inline)) { return load_n(at, left); });
        }
        FASTATTN_UNROLL
        for (int a = 0; a < R; a++) {
          FASTATTN_UNROLL
          for (int b = 0; b < K; b++)
            if (j + b < kTile) scores[(r + a) * kTile + j + b] = reduce_add(acc[a][b]);
        }
      }
  }

  // Scores of one row to weights; its partial sum and values become relative to the new maximum.
  void weigh(const Sequence& s, int64_t kv_head, int64_t r, int64_t n, int64_t keys, Partial to) {
    const AttentionParams& p = problem.p;
    const int64_t head = kv_head * problem.group + r / s.q_length, i = r % s.q_length;
    float* x = scores + r * kTile;
    const Columns columns{0, round_up(keys, W)};
    if (problem.program.on()) run_by_class(problem, s, head, i, n, columns, x);
    const float c = problem.program.on() ? exponent_of(problem) : make_scores(problem, s, head, i, n, columns, keys, x);
    const RowMask mask(p, s, ranges, head, i, r, n, keys, p.dense.data);
    ScoreRow constants = Score::constants(s.bias);
    if (Score::kMaximum) {
      vf top = splat(-__builtin_inff());
      for (int64_t j = 0; j < columns.end; j += W) {
        const vf masked = select(mask.at(j), load(x + j), splat(-__builtin_inff()));
        store(x + j, masked);
        top = vmax(top, masked);
      }
      const float found = reduce_max(top);
      if (found > *to.top) {
        const float drop = (float)(divisor_exponent(*to.top, c) - divisor_exponent(found, c));
        const vf factor = splat(exp2_bounded(splat(drop))[0]);
        for (int64_t j = 0; j < out_columns + W; j += W) store(to.out + j, load(to.out + j) * factor);
        *to.top = found;
      }
      constants.shift = shift_of(x, columns, *to.top, c);
    }
    vf total = load(to.sums);
    for (int64_t j = 0; j < columns.end; j += W) {
      vf w = Score::weight(load(x + j), c, constants);
      if (!Score::kMaximum) w = keep(mask.at(j), w);
      total += w;
      store(x + j, w);
    }
    store(to.sums, total);
    if (problem.dropout.on()) drop_row(problem.dropout, drawn_row(problem, s, head, i, n), x, columns);
  }

  // out (rows, columns) += weights (rows, keys) * v (keys, columns), R rows and two vectors at a time.
  template <int R, class T>
  FASTATTN_NOINLINE_MEMBER void add_values(const T* v, int64_t keys, int64_t count, float* partials) {
    const int64_t stride = problem.p.v.stride[2], each = partial_floats(problem);
    float unused[2 * W];
    for (int64_t d = 0; d < problem.value_dim; d += 2 * W)
      for (int64_t r = 0; r < count; r += R) {
        const int64_t left = problem.value_dim - d;
        float* to[R];
        vf acc[R][2];
        FASTATTN_UNROLL
        for (int a = 0; a < R; a++) {
          to[a] = r + a < count ? partials + (r + a) * each + d : unused;
          acc[a][0] = load(to[a]);
          acc[a][1] = left > W ? load(to[a] + W) : vf{};
        }
        const auto step = [&](int64_t j, vf x, vf y) __attribute__((always_inline)) {
          FASTATTN_UNROLL
          for (int a = 0; a < R; a++) {
            const vf w = splat(scores[(r + a) * kTile + j]);
            acc[a][0] += w * x;
            acc[a][1] += w * y;
          }
        };
        if (left >= 2 * W) {
          for (int64_t j = 0; j < keys; j++) step(j, load(v + j * stride + d), load(v + j * stride + d + W));
        } else {
          for (int64_t j = 0; j < keys; j++) {
            const T* at = v + j * stride + d;
            step(j, left >= W ? load(at) : load_n(at, (int)left), left > W ? load_n(at + W, (int)(left - W)) : vf{});
          }
        }
        FASTATTN_UNROLL
        for (int a = 0; a < R; a++) {
          store(to[a], acc[a][0]);
          if (left > W) store(to[a] + W, acc[a][1]);
        }
      }
  }
};

// sum(a * b) of two rows of any one dtype, in the order in which DecodeChunk adds.
FASTATTN_NOINLINE float dot_rows(Matrix a, int64_t row_a, Matrix b, int64_t row_b, int64_t columns) {
  float result = 0;
  with_dtype(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T *x = (const T*)a.data + row_a * a.stride, *y = (const T*)b.data + row_b * b.stride;
    vf sum{};
    int64_t j = 0;
    for (; j + W <= columns; j += W) sum += load(x + j) * load(y + j);
    if (j < columns) sum += load_n(x + j, (int)(columns - j)) * load_n(y + j, (int)(columns - j));
    result = reduce_add(sum);
  });
  return result;
}

// A row of softplus weights whose sum is less than this is softmax's, to which it tends: e^s differs from log(1 + e^s)
// by half of it at most. The row's maximum then keeps the sum from underflowing.
constexpr float kLimitSum = 1e-20f;

FASTATTN_NOINLINE void limit_row(const Problem& problem, const Sequence& s, int64_t head, int64_t row) {
  constexpr int64_t kTile = 64;
  const AttentionParams& p = problem.p;
  static_assert(kRows * sizeof(int32_t) <= 64);
  alignas(64) char memory[12 * (64 + kArenaGap)];  // six pieces each
  Arena arena(memory, sizeof memory);
  RowRanges all(kRows, arena), ranges(kRows, arena);
  all.fill(s, row, 1);
  const float c = exponent_of(problem);
  float x[kTile], out[256 + W] = {}, sum = 0, top = -__builtin_inff();
  const Matrix q = matrix(p.q, s.batch, head, s.q_begin + row);
  problem.lists.each_tile(s.batch, head, row, all.begin, all.end, kTile, [&](int64_t n, int64_t last) {
    ranges.clip(all, 1, n, last);
    const int64_t keys = min64(last, s.keys) - n;
    const Columns columns{0, round_up(keys, W)};
    const Matrix k = matrix(p.k, s.batch, head / problem.group, s.k_begin + n),
                 v = matrix(p.v, s.batch, head / problem.group, s.k_begin + n);
    for (int64_t j = 0; j < kTile; j++) x[j] = j < keys ? dot_rows(q, 0, k, j, problem.head_dim) * problem.sign : 0.0f;
    if (problem.program.on())
      run_by_class(problem, s, head, row, n, columns, x);
    else
      make_scores(problem, s, head, row, n, columns, keys, x);
    const RowMask mask(p, s, ranges, head, row, 0, n, keys, p.dense.data);
    vf highest = splat(-__builtin_inff());
    for (int64_t j = 0; j < columns.end; j += W) {
      const vf masked = select(mask.at(j), load(x + j), splat(-__builtin_inff()));
      store(x + j, masked);
      highest = vmax(highest, masked);
    }
    const float found = reduce_max(highest);
    float kept = 1;
    if (found > top) {
      kept = exp2_bounded(splat((float)(divisor_exponent(top, c) - divisor_exponent(found, c))))[0];
      top = found;
    }
    ScoreRow constants;
    constants.shift = shift_of(x, columns, top, c);
    vf total{};
    for (int64_t j = 0; j < columns.end; j += W) {
      const vf w = SoftmaxScore<Arithmetic>::weight(load(x + j), c, constants);
      total += w;
      store(x + j, w);
    }
    sum = sum * kept + reduce_add(total);
    if (problem.dropout.on()) drop_row(problem.dropout, drawn_row(problem, s, head, row, n), x, columns);
    with_dtype(v.dtype, [&](auto* type) {
      const auto* values = (decltype(type))v.data;
      for (int64_t d = 0; d < problem.value_dim; d += W) {
        vf acc = load(out + d) * kept;
        const int left = (int)min64(W, problem.value_dim - d);
        for (int64_t j = 0; j < keys; j++)
          acc += splat(x[j]) * (left == W ? load(values + j * v.stride + d) : load_n(values + j * v.stride + d, left));
        store(out + d, acc);
      }
    });
  });
  finish_row<SoftmaxScore<Arithmetic>>(problem, s, head, row, out, problem.value_dim, sum, top);
}

// finish_row, of a row whose weights may all have underflowed.
template <class Score>
FASTATTN_INLINE void finish_row_or_limit(const Problem& problem, const Sequence& s, int64_t head, int64_t row,
                                         const float* from, float sum, float top) {
  if (Score::kLimit && sum < kLimitSum)
    limit_row(problem, s, head, row);
  else
    finish_row<Score>(problem, s, head, row, from, problem.value_dim, sum, top);
}

// Sequences of few rows a key head are decoded, the others, and those with lists, tiled; it depends on nothing but the
// sequence.
FASTATTN_INLINE bool decodes(const Problem& problem, const Sequence& s) {
  return !problem.lists.on() && problem.group * s.q_length <= problem.p.decode_rows;
}

// forward_decoded of p's score, compiled apart from the tiled kernels.
void attention_decode(const AttentionParams& p);

template <class Score>
static void forward_decoded(const AttentionParams& p) {
  using Chunk = DecodeChunk<Score>;
  const Problem problem(p);
  int64_t longest_k = 0, rows = 0;
  for (int64_t i = 0; i < problem.sequences; i++) {
    const Sequence s = problem.sequence(i);
    if (!decodes(problem, s)) continue;
    longest_k = max64(longest_k, s.keys);
    rows = max64(rows, problem.group * s.q_length);
  }
  if (rows == 0) return;
  const int64_t chunk = round_up(p.chunk_k, Chunk::kTile), chunks = max64(1, (longest_k + chunk - 1) / chunk);
  const int64_t pairs = problem.sequences * problem.kv_heads;
  const int64_t stride = Chunk::partial_floats(problem), pair_floats = round_up(chunks * rows * stride, 16);
  const int64_t chunk_bytes = bytes_of([&](Arena& arena) { Chunk(problem, rows, arena); });
  const int threads = threads_for(p.threads, pairs * rows * longest_k * (problem.head_dim + problem.value_dim));
  Blocks memory;  // of each thread
  float* partials = nullptr;
  with_scratch(0, [&](Arena& arena) {
    memory = arena.blocks(threads, chunk_bytes);
    partials = arena.take<float>(pairs * pair_floats);
  });
  const float c = exponent_of(problem);

  parallel_items(pairs * chunks, threads, [&](int64_t task, int thread) {
    const int64_t pair = task / chunks, begin = task % chunks * chunk;
    const Sequence s = problem.sequence(pair / problem.kv_heads);
    if (!decodes(problem, s) || (begin > 0 && begin >= s.keys)) return;
    Arena arena = memory[thread];
    Chunk(problem, rows, arena)
        .run(s, pair % problem.kv_heads, begin, min64(begin + chunk, s.keys),
             partials + pair * pair_floats + task % chunks * rows * stride);
  });
  parallel_items(pairs, threads, [&](int64_t pair, int) {
    const Sequence s = problem.sequence(pair / problem.kv_heads);
    if (!decodes(problem, s)) return;
    for (int64_t r = 0; r < problem.group * s.q_length; r++) {
      const auto of = [&](int64_t i) {
        return Chunk::partial(problem, partials + pair * pair_floats + (i * rows + r) * stride);
      };
      const Partial total = of(0);
      const int64_t width = total.top - total.out;
      for (int64_t i = 1; i * chunk < s.keys; i++) {
        const Partial part = of(i);
        float mine = 1, theirs = 1;
        if (Score::kMaximum) {
          if (*part.top == -__builtin_inff()) continue;
          const float top = *part.top > *total.top ? *part.top : *total.top;
          const double whole = divisor_exponent(top, c);
          mine = exp2_bounded(splat((float)(divisor_exponent(*total.top, c) - whole)))[0];
          theirs = exp2_bounded(splat((float)(divisor_exponent(*part.top, c) - whole)))[0];
          *total.top = top;
        }
        for (int64_t j = 0; j < width; j += W)
          store(total.out + j, load(total.out + j) * mine + load(part.out + j) * theirs);
      }
      const int64_t head = pair % problem.kv_heads * problem.group + r / s.q_length;
      finish_row_or_limit<Score>(problem, s, head, r % s.q_length, total.out, reduce_add(load(total.sums)), *total.top);
    }
  });
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
