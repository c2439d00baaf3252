// Sinkhorn's iterations in the log domain, base 2: v = -LSE over tokens (x + u), u = -LSE over groups (x + v), and the
// result 2^(x + u + v), with x = scores * log2(e) / temperature. Row potentials u follow from column potentials v, so
// only v is kept. The backward recomputes v and runs the iterations in reverse.
#pragma once

#include <utility>

#include "arena.h"
#include "limits.h"
#include "math.h"
#include "parallel.h"

namespace fastattn {
namespace FASTATTN_ISA {

constexpr int64_t kSinkhornTokens = 256;  // tokens of a chunk, a task of the form without causal
constexpr int64_t kSinkhornBlock = 64;    // tokens between two kept states of the causal form
constexpr float kNowhere = -1e30f;        // x of a column that does not exist: finite, so differences are not NaN

// The rows of one sequence, of which `count` are valid.
struct SinkhornSequence {
  int64_t begin, count;
};

struct SinkhornProblem {
  const SinkhornParams& p;
  int64_t groups, columns, sequences;
  float scale, back;  // factors: from scores to x; from the gradient of ln(2) x to that of scores

  explicit SinkhornProblem(const SinkhornParams& p)
      : p(p), groups(p.scores.size[3]), columns(round_up(groups, W)), sequences(p.begins.size[3]) {
    scale = (float)(1.4426950408889634 / p.temperature);
    back = (float)(1 / p.temperature);
  }
  SinkhornSequence sequence(int64_t s) const {
    return {((const int64_t*)p.begins.data)[s], ((const int64_t*)p.counts.data)[s]};
  }
  // The rows of a sequence whose column sums run over all these rows. The later rows' sums run up to each row.
  SinkhornSequence together(int64_t s) const {
    const SinkhornSequence all = sequence(s);
    return p.causal ? SinkhornSequence{all.begin, prefix(s)} : all;
  }
  SinkhornSequence one_by_one(int64_t s) const {
    const SinkhornSequence all = sequence(s), first = together(s);
    return {all.begin + first.count, all.count - first.count};
  }
  int64_t prefix(int64_t s) const { return p.prefixes.data ? ((const int64_t*)p.prefixes.data)[s] : 0; }
  // `count` numbers of a contiguous (rows, groups) tensor from row `row` on, times `factor`.
  void read(float* to, const Tensor& from, int64_t row, int64_t count, float factor) const {
    with_dtype(from.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      const T* x = (const T*)from.data + row * groups;
      int64_t i = 0;
      for (; i + W <= count; i += W) store(to + i, load(x + i) * factor);
      if (i < count) store_n(to + i, load_n(x + i, (int)(count - i)) * factor, (int)(count - i));
    });
  }
  void write(const Tensor& to, int64_t row, const float* from, int64_t count, float factor) const {
    with_dtype(to.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      T* x = (T*)to.data + row * groups;
      int64_t i = 0;
      for (; i + W <= count; i += W) store(x + i, load(from + i) * factor);
      if (i < count) store_n(x + i, load_n(from + i, (int)(count - i)) * factor, (int)(count - i));
    });
  }
  void write_potentials(int64_t s, const float* v) const {
    float* to = (float*)p.potentials.data + s * groups;
    for (int64_t g = 0; g < groups; g++) to[g] = (float)(v[g] * 0.693147180559945309);
  }
};

// For the rows of each sequence that share their sums, (groups) for every iteration from 1 on: their potentials v and,
// in the backward, the later rows' contributions to v's gradients. Null where no sequence has such rows.
struct SinkhornTogether {
  const SinkhornProblem& problem;
  float *potentials = nullptr, *slopes = nullptr;  // (sequences, iterations + 1, groups)

  static int64_t floats(const SinkhornProblem& problem) {
    return problem.sequences * (problem.p.iterations + 1) * problem.groups;
  }
  float* potential(int64_t s, int64_t t) const { return potentials + place(s, t); }
  float* slope(int64_t s, int64_t t) const { return slopes + place(s, t); }

 private:
  int64_t place(int64_t s, int64_t t) const { return (s * (problem.p.iterations + 1) + t) * problem.groups; }
};

// --- column sums over the whole sequence: chunks of tokens as (groups, tokens) ---------------------------------------

struct SinkhornChunk {
  const SinkhornProblem& problem;
  float* x;         // (groups, kSinkhornTokens), 0 beyond `tokens`
  float* gradient;  // of ln(2) x, of x's shape; null in the forward
  int64_t tokens;

  vf at(int64_t g, int64_t j) const { return load(x + g * kSinkhornTokens + j); }

  // -inf beyond the last token, so that the weight there is 0.
  vf valid(vf u, int64_t j) const { return select(iota() + (int32_t)j < (int32_t)tokens, u, splat(-__builtin_inff())); }

  // u of W tokens. v is null before the first iteration.
  vf row_potential(const float* v, int64_t j) const {
    if (!v) return valid(vf{}, j);
    vf top = splat(-__builtin_inff()), sum{};
    for (int64_t g = 0; g < problem.groups; g++) top = vmax(top, at(g, j) + v[g]);
    for (int64_t g = 0; g < problem.groups; g++) sum += exp2_bounded(at(g, j) + v[g] - top);
    return valid(-(top + log2_positive(sum)), j);
  }

  void transpose_in(float* to, const float* from) const {
    memset(to, 0, size_t(problem.groups * kSinkhornTokens) * 4);
    for (int64_t i = 0; i < tokens; i++)
      for (int64_t g = 0; g < problem.groups; g++) to[g * kSinkhornTokens + i] = from[i * problem.groups + g];
  }
  void transpose_out(float* to, const float* from) const {
    for (int64_t i = 0; i < tokens; i++)
      for (int64_t g = 0; g < problem.groups; g++) to[i * problem.groups + g] = from[g * kSinkhornTokens + i];
  }

  // Maxima and sums (groups each) of 2^(x + u) over the chunk.
  void column_sums(const float* v, float* top, float* sum) const {
    float u[kSinkhornTokens];
    for (int64_t j = 0; j < kSinkhornTokens; j += W) store(u + j, row_potential(v, j));
    for (int64_t g = 0; g < problem.groups; g++) {
      vf most = splat(-__builtin_inff()), total{};
      for (int64_t j = 0; j < tokens; j += W) most = vmax(most, at(g, j) + load(u + j));
      top[g] = reduce_max(most);
      for (int64_t j = 0; j < tokens; j += W) total += exp2_bounded(at(g, j) + load(u + j) - top[g]);
      sum[g] = reduce_add(total);
    }
  }

  void assign(const float* v, float* to) const {
    for (int64_t j = 0; j < tokens; j += W) {
      const vf u = row_potential(v, j);
      for (int64_t g = 0; g < problem.groups; g++)
        store(to + g * kSinkhornTokens + j, exp2_bounded(at(g, j) + v[g] + u));
    }
  }

  // Backward of the result and the last u, from `gradient`: sums (groups) become the sums of v's gradient.
  void begin_reverse(const float* v, float* sums) const {
    reverse_rows(v, sums, [&](int64_t g, int64_t j, vf p) { return load(gradient + g * kSinkhornTokens + j) * p; });
  }
  // Backward of v_t, whose gradient is `slope`, and of the previous u, whose v is `before` (null: none, and no sums).
  void reverse(const float* v, const float* slope, const float* before, float* sums) const {
    const auto through_v = [&](int64_t g, int64_t j, vf u) { return -exp2_bounded(at(g, j) + v[g] + u) * slope[g]; };
    if (!before) {
      for (int64_t j = 0; j < tokens; j += W) {
        const vf u = valid(vf{}, j);
        for (int64_t g = 0; g < problem.groups; g++) {
          float* to = gradient + g * kSinkhornTokens + j;
          store(to, load(to) + through_v(g, j, u));
        }
      }
      return;
    }
    vf part[limits::groups] = {};
    for (int64_t j = 0; j < tokens; j += W) {
      const vf u = row_potential(before, j);
      vf slope_u{};
      for (int64_t g = 0; g < problem.groups; g++) {
        float* to = gradient + g * kSinkhornTokens + j;
        const vf y = through_v(g, j, u);
        slope_u += y;
        store(to, load(to) + y);
      }
      for (int64_t g = 0; g < problem.groups; g++) {
        float* to = gradient + g * kSinkhornTokens + j;
        const vf y = -exp2_bounded(at(g, j) + before[g] + u) * slope_u;
        part[g] += y;
        store(to, load(to) + y);
      }
    }
    for (int64_t g = 0; g < problem.groups; g++) sums[g] = reduce_add(part[g]);
  }

 private:
  template <class Slope>
  void reverse_rows(const float* v, float* sums, const Slope& slope) const {
    vf part[limits::groups] = {};
    for (int64_t j = 0; j < tokens; j += W) {
      const vf u = row_potential(v, j);
      vf share[limits::groups], slope_u{};
      for (int64_t g = 0; g < problem.groups; g++) {
        share[g] = exp2_bounded(at(g, j) + v[g] + u);
        slope_u += slope(g, j, share[g]);
      }
      for (int64_t g = 0; g < problem.groups; g++) {
        const vf y = slope(g, j, share[g]) - share[g] * slope_u;
        part[g] += y;
        store(gradient + g * kSinkhornTokens + j, y);
      }
    }
    for (int64_t g = 0; g < problem.groups; g++) sums[g] = reduce_add(part[g]);
  }
};

// rest(SinkhornTogether): forward and backward of the other rows, called when these rows' potentials are known.
template <bool kBackward, class Rest>
static void sinkhorn_together(const SinkhornProblem& problem, const Rest& rest) {
  const SinkhornParams& p = problem.p;
  const int64_t groups = problem.groups, tile = groups * kSinkhornTokens, iterations = p.iterations;
  int64_t chunks = 0;
  for (int64_t s = 0; s < problem.sequences; s++)
    chunks += (problem.together(s).count + kSinkhornTokens - 1) / kSinkhornTokens;
  if (chunks == 0) return rest(SinkhornTogether{problem});
  // first chunk of each sequence, sequence of each chunk; potentials of every iteration; partial results; chunks
  int64_t *first = nullptr, *owner = nullptr;
  float* partial = nullptr;
  SinkhornTogether v{problem};
  Blocks tiles, copies;  // for each chunk x and, backward, the gradient; for each thread
  const auto take_tiles = [&](Arena& arena) {
    float* x = arena.take<float>(tile);
    return std::pair(x, kBackward ? arena.take<float>(tile) : nullptr);
  };
  with_scratch(0, [&](Arena& arena) {
    first = arena.take<int64_t>(problem.sequences + 1);
    owner = arena.take<int64_t>(chunks);
    v.potentials = arena.take<float>(SinkhornTogether::floats(problem));
    if (kBackward && p.causal) v.slopes = arena.take<float>(SinkhornTogether::floats(problem));
    partial = arena.take<float>(chunks * 2 * groups);
    tiles = arena.blocks(chunks, bytes_of(take_tiles), 64);
    copies = arena.blocks(p.threads, bytes_of([&](Arena& measure) { measure.take<float>(tile); }), 64);
  });
  const auto copy_of = [&](int thread) { return copies[thread].template take<float>(tile); };
  first[0] = 0;
  for (int64_t s = 0; s < problem.sequences; s++) {
    first[s + 1] = first[s] + (problem.together(s).count + kSinkhornTokens - 1) / kSinkhornTokens;
    for (int64_t c = first[s]; c < first[s + 1]; c++) owner[c] = s;
  }
  const auto row_of = [&](int64_t c) {
    return problem.together(owner[c]).begin + (c - first[owner[c]]) * kSinkhornTokens;
  };
  const auto chunk = [&](int64_t c) {
    const int64_t left = problem.together(owner[c]).count - (c - first[owner[c]]) * kSinkhornTokens;
    Arena arena = tiles[c];
    const auto [x, gradient] = take_tiles(arena);
    return SinkhornChunk{problem, x, gradient, min64(left, kSinkhornTokens)};
  };
  const auto potential = [&](int64_t s, int64_t t) { return v.potential(s, t); };
  const auto each = [&](const auto& run) { parallel_items(chunks, p.threads, run); };

  each([&](int64_t c, int thread) {
    const SinkhornChunk here = chunk(c);
    float* copy = copy_of(thread);
    problem.read(copy, p.scores, row_of(c), here.tokens * groups, problem.scale);
    here.transpose_in(here.x, copy);
    if (!kBackward) return;
    problem.read(copy, p.grad, row_of(c), here.tokens * groups, 1.0f);
    here.transpose_in(here.gradient, copy);
  });
  for (int64_t t = 1; t <= iterations; t++) {
    each([&](int64_t c, int) {
      float* to = partial + c * 2 * groups;
      chunk(c).column_sums(t > 1 ? potential(owner[c], t - 1) : nullptr, to, to + groups);
    });
    for (int64_t s = 0; s < problem.sequences; s++)
      for (int64_t g = 0; g < groups; g++) {
        float top = -__builtin_inff();
        for (int64_t c = first[s]; c < first[s + 1]; c++) {
          const float other = partial[c * 2 * groups + g];
          top = other > top ? other : top;
        }
        double sum = 0;
        for (int64_t c = first[s]; c < first[s + 1]; c++) {
          const float* from = partial + c * 2 * groups + g;
          sum += (double)from[groups] * __builtin_exp2((double)(from[0] - top));
        }
        potential(s, t)[g] = (float)-((double)top + __builtin_log2(sum));
      }
  }
  if (v.slopes) memset(v.slopes, 0, size_t(SinkhornTogether::floats(problem)) * 4);
  rest(v);
  if (!kBackward) {
    each([&](int64_t c, int thread) {
      const SinkhornChunk here = chunk(c);
      float* copy = copy_of(thread);
      here.assign(potential(owner[c], iterations), copy);
      here.transpose_out(here.x, copy);
      problem.write(p.out, row_of(c), here.x, here.tokens * groups, 1.0f);
    });
    for (int64_t s = 0; s < problem.sequences; s++)
      if (first[s] < first[s + 1] && problem.one_by_one(s).count == 0)  // the last token's
        problem.write_potentials(s, potential(s, iterations));
    return;
  }
  for (int64_t t = iterations; t >= 0; t--) {
    // partial holds v's gradient of iteration t + 1 for each chunk; its sum is stored in place of unused potentials
    for (int64_t s = 0; s < problem.sequences && t < iterations; s++)
      for (int64_t g = 0; g < groups; g++) {
        double sum = v.slopes ? v.slope(s, t + 1)[g] : 0;
        for (int64_t c = first[s]; c < first[s + 1]; c++) sum += partial[c * 2 * groups + g];
        potential(s, 0)[g] = (float)sum;
      }
    each([&](int64_t c, int) {
      const int64_t s = owner[c];
      float* sums = partial + c * 2 * groups;
      if (t == iterations)
        chunk(c).begin_reverse(potential(s, t), sums);
      else
        chunk(c).reverse(potential(s, t + 1), potential(s, 0), t ? potential(s, t) : nullptr, sums);
    });
  }
  each([&](int64_t c, int thread) {
    const SinkhornChunk here = chunk(c);
    float* copy = copy_of(thread);
    here.transpose_out(copy, here.gradient);
    problem.write(p.out, row_of(c), copy, here.tokens * groups, problem.back);
  });
}

// --- column sums up to each token: one token at a time, with lanes of groups -----------------------------------------

struct SinkhornScan {
  const SinkhornProblem& problem;
  int64_t columns, iterations;
  float *top, *sum;  // (iterations, columns): running maximum and sum of 2^(x + u)

  vi exists(int64_t g) const { return iota() + (int32_t)g < (int32_t)problem.groups; }

  static int64_t words(const SinkhornProblem& problem) { return 2 * problem.p.iterations * problem.columns; }
  SinkhornScan(const SinkhornProblem& problem, float* memory)
      : problem(problem),
        columns(problem.columns),
        iterations(problem.p.iterations),
        top(memory),
        sum(memory + iterations * columns) {}

  // Start from the sums of the tokens of sequence s that share their sums.
  void reset(int64_t s, const SinkhornTogether& before) {
    for (int64_t i = 0; i < iterations * columns; i++) top[i] = -__builtin_inff(), sum[i] = 0;
    if (problem.prefix(s) == 0) return;
    for (int64_t t = 0; t < iterations; t++)
      for (int64_t g = 0; g < problem.groups; g++)
        top[t * columns + g] = -before.potential(s, t + 1)[g], sum[t * columns + g] = 1;
  }
  // x (tokens, columns) of `tokens` rows of the sequence.
  void read(float* x, float* copy, const Tensor& from, int64_t row, int64_t tokens, float factor, float missing) const {
    problem.read(copy, from, row, tokens * problem.groups, factor);
    for (int64_t i = 0; i < tokens; i++) {
      memcpy(x + i * columns, copy + i * problem.groups, size_t(problem.groups) * 4);
      for (int64_t g = problem.groups; g < columns; g++) x[i * columns + g] = missing;
    }
  }

  // One token through every iteration: v (iterations, columns) and u (iterations + 1), u[0] = 0.
  void step(const float* x, float* v, float* u) {
    u[0] = 0;
    for (int64_t t = 0; t < iterations; t++) {
      float *m = top + t * columns, *s = sum + t * columns, *to = v + t * columns;
      vf most = splat(-__builtin_inff()), total{};
      for (int64_t g = 0; g < columns; g += W) {
        const vf y = load(x + g) + u[t], before = load(m + g), now = vmax(before, y);
        const vf added = load(s + g) * exp2_bounded(before - now) + exp2_bounded(y - now);
        store(m + g, now);
        store(s + g, added);
        const vf found = -(now + log2_positive(added));
        store(to + g, found);
        most = vmax(most, select(exists(g), load(x + g) + found, splat(kNowhere)));
      }
      const float highest = reduce_max(most);
      for (int64_t g = 0; g < columns; g += W)
        total += keep(exists(g), exp2_bounded(load(x + g) + load(to + g) - highest));
      u[t + 1] = -(highest + log2_positive(splat(reduce_add(total)))[0]);
    }
  }
  vf share(const float* x, const float* v, float u, int64_t g) const {
    return keep(exists(g), exp2_bounded(at_most(load(x + g) + load(v + g) + u, 0.0f)));
  }
};

static void sinkhorn_one_by_one(const SinkhornProblem& problem, const SinkhornTogether& before) {
  const SinkhornParams& p = problem.p;
  const int64_t groups = problem.groups, columns = problem.columns, iterations = p.iterations;
  const int64_t tile = kSinkhornBlock * columns;
  struct Buffers {
    float *state, *x, *copy, *v, *u;
  };
  const auto take = [&](Arena& arena) {
    return Buffers{arena.take<float>(SinkhornScan::words(problem)), arena.take<float>(tile),
                   arena.take<float>(kSinkhornBlock * groups), arena.take<float>(iterations * columns),
                   arena.take<float>(iterations + 1)};
  };
  Blocks memory;  // of each thread
  with_scratch(1, [&](Arena& arena) { memory = arena.blocks(p.threads, bytes_of(take)); });
  parallel_items(problem.sequences, p.threads, [&](int64_t s, int thread) {
    const SinkhornSequence sequence = problem.one_by_one(s);
    if (sequence.count == 0) return;
    Arena arena = memory[thread];
    const auto [state, x, copy, v, u] = take(arena);
    SinkhornScan scan(problem, state);
    const float* last = v + (iterations - 1) * columns;
    scan.reset(s, before);
    for (int64_t i = 0; i < sequence.count; i += kSinkhornBlock) {
      const int64_t tokens = min64(kSinkhornBlock, sequence.count - i);
      scan.read(x, copy, p.scores, sequence.begin + i, tokens, problem.scale, kNowhere);
      for (int64_t j = 0; j < tokens; j++) {
        float* row = x + j * columns;
        scan.step(row, v, u);
        for (int64_t g = 0; g < columns; g += W) store(row + g, scan.share(row, last, u[iterations], g));
        memmove(x + j * groups, row, size_t(groups) * 4);
      }
      problem.write(p.out, sequence.begin + i, x, tokens * groups, 1.0f);
    }
    problem.write_potentials(s, last);
  });
}

// In reverse over the tokens, all iterations at once. v_t(l) = -log sum_{j <= l} 2^(x + u)(j) passes its gradient to
// all earlier tokens j, with the factor 2^((x + u)(j) + v_t(l)). The sum over l of factor * gradient is carried
// relative to v_t of the current token, which grows in this direction, so it never overflows.
static void sinkhorn_one_by_one_backward(const SinkhornProblem& problem, const SinkhornTogether& before) {
  const SinkhornParams& p = problem.p;
  const int64_t groups = problem.groups, columns = problem.columns, iterations = p.iterations;
  const int64_t tile = kSinkhornBlock * columns, state = SinkhornScan::words(problem), steps = iterations * columns;
  int64_t longest = 0;
  for (int64_t s = 0; s < problem.sequences; s++) longest = max64(longest, problem.one_by_one(s).count);
  const int64_t blocks = (longest + kSinkhornBlock - 1) / kSinkhornBlock;
  struct Buffers {
    float *running, *states, *x, *gradient, *copy, *v, *carried, *later, *slope, *u;
  };
  const auto take = [&](Arena& arena) {
    return Buffers{arena.take<float>(state),
                   arena.take<float>(blocks * state),
                   arena.take<float>(tile),
                   arena.take<float>(tile),
                   arena.take<float>(kSinkhornBlock * groups),
                   arena.take<float>(kSinkhornBlock * steps),
                   arena.take<float>(steps),
                   arena.take<float>(steps),
                   arena.take<float>(columns),
                   arena.take<float>(kSinkhornBlock * (iterations + 1))};
  };
  Blocks memory;  // of each thread
  with_scratch(1, [&](Arena& arena) { memory = arena.blocks(p.threads, bytes_of(take)); });
  parallel_items(problem.sequences, p.threads, [&](int64_t s, int thread) {
    const SinkhornSequence sequence = problem.one_by_one(s);
    if (sequence.count == 0) return;
    Arena arena = memory[thread];
    const auto [running, states, x, gradient, copy, v, carried, later, slope, u] = take(arena);
    SinkhornScan scan(problem, running);
    const int64_t used = (sequence.count + kSinkhornBlock - 1) / kSinkhornBlock;
    scan.reset(s, before);
    for (int64_t b = 0; b < used; b++) {
      memcpy(states + b * state, running, size_t(state) * 4);
      if (b + 1 == used) break;
      scan.read(x, copy, p.scores, sequence.begin + b * kSinkhornBlock, kSinkhornBlock, problem.scale, kNowhere);
      for (int64_t j = 0; j < kSinkhornBlock; j++) scan.step(x + j * columns, v, u);
    }
    memset(carried, 0, size_t(steps) * 4);
    memset(later, 0, size_t(steps) * 4);
    for (int64_t b = used - 1; b >= 0; b--) {
      const int64_t row = sequence.begin + b * kSinkhornBlock;
      const int64_t tokens = min64(kSinkhornBlock, sequence.count - b * kSinkhornBlock);
      memcpy(running, states + b * state, size_t(state) * 4);
      scan.read(x, copy, p.scores, row, tokens, problem.scale, kNowhere);
      scan.read(gradient, copy, p.grad, row, tokens, 1.0f, 0.0f);
      for (int64_t j = 0; j < tokens; j++) scan.step(x + j * columns, v + j * steps, u + j * (iterations + 1));
      for (int64_t j = tokens - 1; j >= 0; j--) {
        const float *here = x + j * columns, *potential = v + j * steps, *rows = u + j * (iterations + 1);
        float* to = gradient + j * columns;
        vf total{};
        for (int64_t g = 0; g < columns; g += W) {
          const vf y = load(to + g) * scan.share(here, potential + steps - columns, rows[iterations], g);
          store(to + g, y);
          store(slope + g, y);
          total += y;
        }
        float slope_u = reduce_add(total);
        for (int64_t t = iterations - 1; t >= 0; t--) {
          const float* now = potential + t * columns;
          float *carry = carried + t * columns, *after = later + t * columns;
          total = vf{};
          for (int64_t g = 0; g < columns; g += W) {
            const vf through_u = -scan.share(here, now, rows[t + 1], g) * slope_u;
            const vf fade = exp2_bounded(at_most(load(after + g) - load(now + g), 0.0f));
            const vf whole = load(slope + g) + through_u + load(carry + g) * fade;
            const vf through_v = -scan.share(here, now, rows[t], g) * whole;
            store(carry + g, whole);
            store(after + g, load(now + g));
            store(to + g, load(to + g) + through_u + through_v);
            store(slope + g, vf{});
            total += through_v;
          }
          slope_u = reduce_add(total);
        }
      }
      for (int64_t j = 0; j < tokens; j++) memmove(gradient + j * groups, gradient + j * columns, size_t(groups) * 4);
      problem.write(p.out, row, gradient, tokens * groups, problem.back);
    }
    for (int64_t t = 0; t < iterations && problem.prefix(s); t++)
      for (int64_t g = 0; g < groups; g++)
        before.slope(s, t + 1)[g] =
            carried[t * columns + g] *
            exp2_bounded(at_most(splat(later[t * columns + g] - before.potential(s, t + 1)[g]), 0.0f))[0];
  });
}

template <bool kBackward>
static void sinkhorn(const SinkhornProblem& problem) {
  sinkhorn_together<kBackward>(problem, [&](const SinkhornTogether& before) {
    if (!problem.p.causal) return;
    if constexpr (kBackward)
      sinkhorn_one_by_one_backward(problem, before);
    else
      sinkhorn_one_by_one(problem, before);
  });
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
