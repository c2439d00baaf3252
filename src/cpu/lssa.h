// LSSA and LSSAR forward: s = softplus(c_i qh_i.kh_j), with a power w = relu(1 - (max - s) / (max - threshold))^power.
// A block computes its rows of scores once, takes their statistics, turns them into weights in place, and adds values.
#pragma once

#include "attention_rows.h"

namespace fastattn {
namespace FASTATTN_ISA {

// x^p for 0 <= x <= 1; 0^0 = 1, NaN stays NaN.
struct Power {
  float p;
  int whole;  // p where it is an integer, else -1
  explicit Power(double power) : p((float)power), whole(power == (double)(int)power ? (int)power : -1) {}
  FASTATTN_INLINE vf of(vf x, const Power& power) {
    if (power.whole < 0) return select(x > 0.0f, exp2_bounded(log2_positive(x) * power.p), x);
    vf result = splat(1.0f);
    for (int n = power.whole; n; n >>= 1) {
      if (n & 1) result *= x;
      x *= x;
    }
    return result;
  }
};

constexpr float kEqual = 8 * 1.1920929e-7f;  // scores of a row within kEqual * (1 + c) are all equal
constexpr int64_t kFew = 3;                  // rows with at most this many keys have no threshold
constexpr float kNegligible = 0x1p-25f;      // relative to a row's sum of weights, which is at least 1

// A row's factors: its scores are softplus(dot * scale * the key's reciprocal norm) with scale = c / |q|.
struct RowScale {
  float c, scale, reciprocal_norm;
  float top, reciprocal_height;  // highest score, 1 / (highest - threshold) or 0
  int64_t keys;
};

FASTATTN_INLINE void row_scales(RowScale* to, const Problem& problem, const RowRanges& ranges, const Sequence& s,
                                const BlockRows& rows) {
  const double log_dim = __builtin_log((double)problem.head_dim);
  for (int64_t r = 0; r < rows.count; r++) {
    RowScale& row = to[r];
    row.keys = attended(problem.p, ranges, s, rows, r);
    row.c = (float)(log_dim * __builtin_log((double)max64(row.keys, 1)));
    reciprocal_norms(&row.reciprocal_norm, matrix(problem.p.q, s.batch, rows.head_of(r), s.q_begin + rows.row_of(r)), 1,
                     problem.head_dim, 1);
    row.scale = row.c * row.reciprocal_norm;
  }
}

// Statistics of some of a row's keys: highest and lowest score, sum of distances below the highest, number of attended
// keys. The mean is computed as such a distance, which is accurate where the scores are close together. A NaN among the
// scores makes `below` NaN.
struct RowPart {
  float top, low, below, keys;
  void add(const RowPart& other) {
    const float highest = top > other.top ? top : other.top;
    below += keys * (highest - top) + other.below + other.keys * (highest - other.top);
    keys += other.keys;
    top = highest;
    low = low < other.low ? low : other.low;
  }
};

// The statistics of one row of the op: highest score, 1 / (highest - threshold), sum of weights.
FASTATTN_INLINE float* statistics_of(const LssaParams& p, const Sequence& s, const BlockRows& rows, int64_t r) {
  const int64_t row = (s.batch * p.q.size[1] + rows.head_of(r)) * p.q.size[2] + s.q_begin + rows.row_of(r);
  return (float*)p.statistics.data + row * 3;
}

template <class Unit>
struct LssaBlock {
  using Word = typename Unit::Word;
  using Weight = std::conditional_t<Unit::kStep == 2, bf16, float>;

  const Problem& problem;
  const LssaParams& p;
  Power power;
  int64_t block_q, block_k, stride, q_steps, out_columns, weight_stride;
  Word* q;                    // (block_q, q_steps) and the zero rows after a head's last
  float* scores;              // (block_q, stride) from key `base` on; -1 where a row does not attend
  Weight* weights;            // (block_q, weight_stride): the scores' own memory when they are floats
  float* out;                 // (block_q, out_columns)
  float *sums, *tops, *lows;  // (block_q, W) by lanes
  float* totals;              // (block_q, W) sums of weights, by lanes; without a power, of weights rounded to bf16
  RowScale* scale;
  RowRanges ranges;
  int64_t base = 0, end = 0;  // the block's range of keys, from the first key of a tile on

  LssaBlock(const Problem& problem, const LssaParams& p, int64_t block_q, int64_t block_k, int64_t stride, Arena& arena)
      : problem(problem),
        p(p),
        power(p.power),
        block_q(block_q),
        block_k(block_k),
        stride(stride),
        q_steps(steps_of<Unit>(problem.head_dim)),
        out_columns(round_up(problem.value_dim, W)),
        weight_stride(Unit::kStep == 2 ? block_k : stride),
        q(arena.take<Word>((block_q + kRows) * q_steps)),
        scores(arena.take<float>(block_q * stride)),
        weights(Unit::kStep == 2 ? arena.take<Weight>(block_q * block_k) : (Weight*)scores),
        out(arena.take<float>(block_q * out_columns)),
        sums(arena.take<float>(block_q * W)),
        tops(arena.take<float>(block_q * W)),
        lows(arena.take<float>(block_q * W)),
        totals(arena.take<float>(block_q * W)),
        scale(arena.take<RowScale>(block_q)),
        ranges(block_q, arena) {}

  template <class Panels>
  void run(const BlockRows& rows, const Sequence& s, const Panels& panels) {
    place(rows, s, 0, 1);
    score(rows, s, panels);
    for (int64_t r = 0; r < rows.count; r++) set_statistics(r, part_of(r));
    reweigh(rows, s, panels);
    for (int64_t r = 0; r < rows.count; r++) finish_row(rows, s, r);
  }

  // The block's rows, for the part-th of `parts` sets of tiles of keys that they attend.
  void place(const BlockRows& rows, const Sequence& s, int64_t part, int64_t parts) {
    fill_ranges(ranges, s, rows);
    row_scales(scale, problem, ranges, s, rows);
    const int64_t first = ranges.begin < ranges.end ? ranges.begin / block_k : 0;
    const int64_t tiles = max64(0, (ranges.end + block_k - 1) / block_k - first);
    base = (first + tiles * part / parts) * block_k;
    end = min64(ranges.end, (first + tiles * (part + 1) / parts) * block_k);
  }

  template <class Panels>
  void score(const BlockRows& rows, const Sequence& s, const Panels& panels) {
    const int64_t groups = (rows.count + kRows - 1) / kRows;
    memset(out, 0, size_t(groups * kRows * out_columns) * 4);
    memset(sums, 0, size_t(groups * kRows * W) * 4);
    memset(totals, 0, size_t(groups * kRows * W) * 4);
    for (int64_t i = 0; i < groups * kRows * W; i++) tops[i] = 0, lows[i] = __builtin_inff();
    if (base < end) pack_block<Unit>(q, q_steps, p.q, s, rows, problem.head_dim);
    for (int64_t n = base; n < end; n += block_k) {
      const int64_t there = min64(block_k, s.keys - n);
      tile_products<Unit>(scores + n - base, stride, q, q_steps, panels.key_panels(n), ranges, groups, n,
                          min64(round_up(min64(end - n, there), kPanel), block_k));
      score_tile(rows, s, n, there, panels.key_reciprocals(n));
      if (!p.reweigh) add_tile(rows, n, there, panels);
    }
  }

  template <class Panels>
  void reweigh(const BlockRows& rows, const Sequence& s, const Panels& panels) {
    if (!p.reweigh) return;
    for (int64_t n = base; n < end; n += block_k) add_tile(rows, n, min64(block_k, s.keys - n), panels);
  }

  // Adds sums and weighted values of another part of the same rows.
  void take(const LssaBlock& other, int64_t rows) {
    const auto sum = [](float* to, const float* from, int64_t n) {
      for (int64_t i = 0; i < n; i += W) store(to + i, load(to + i) + load(from + i));
    };
    sum(out, other.out, rows * out_columns);
    sum(sums, other.sums, rows * W);
    sum(totals, other.totals, rows * W);
  }

  // Without a power, values are divided by the sum of the rounded weights that they were multiplied by: the mean of
  // equal values is then that value, and weights that are all rounded the same way lose nothing. With a power the
  // largest weight is 1, which bf16 holds.
  void finish_row(const BlockRows& rows, const Sequence& s, int64_t r) {
    const float total = reduce_add(load((p.reweigh ? totals : sums) + r * W));
    const float weighed = Unit::kStep == 2 && !p.reweigh ? reduce_add(load(totals + r * W)) : total;
    float* statistics = statistics_of(p, s, rows, r);
    statistics[0] = p.reweigh ? scale[r].top : 0.0f;
    statistics[1] = p.reweigh ? scale[r].reciprocal_height : 1.0f;
    statistics[2] = total;
    store_row(matrix(p.out, s.batch, rows.head_of(r), s.q_begin + rows.row_of(r)), 0, out + r * out_columns,
              problem.value_dim, weighed == 0 ? 0.0f : 1 / weighed);
  }

  void score_tile(const BlockRows& rows, const Sequence& s, int64_t n, int64_t there, const float* reciprocals) {
    for (int64_t r = 0; r < rows.count; r++) {
      const Columns columns(ranges, r / kRows, n, there);
      if (columns.empty()) continue;
      const RowMask mask = row_mask(p, ranges, s, rows, r, n, there);
      float* x = scores + r * stride + (n - base);
      const float factor = scale[r].scale * kLog2E;
      if (mask.all(columns))
        score_row<false>(x, columns, factor, reciprocals, mask, r);
      else
        score_row<true>(x, columns, factor, reciprocals, mask, r);
    }
  }

  template <bool kMasked>
  void score_row(float* x, const Columns& columns, float factor, const float* reciprocals, const RowMask& mask,
                 int64_t r) {
    vf sum = load(sums + r * W), top = load(tops + r * W), low = load(lows + r * W);
    const float masked = p.reweigh ? -1.0f : 0.0f;
    for (int64_t j = columns.begin; j < columns.end; j += W) {
      const vf z = load(x + j) * (load(reciprocals + j) * factor);
      vf y = SoftplusScore<Arithmetic>::softplus(z, exp2_bounded(-vabs(z)));
      if (kMasked) {
        const vi attends = mask.at(j);
        low = vmin(low, select(attends, y, splat(__builtin_inff())));
        sum += keep(attends, y);
        y = select(attends, y, splat(masked));
      } else {
        low = vmin(low, y);
        sum += y;
      }
      top = vmax(top, y);
      store(x + j, y);
    }
    store(sums + r * W, sum);
    store(tops + r * W, top);
    store(lows + r * W, low);
  }

  // The statistics of row r over the keys of [base, end).
  RowPart part_of(int64_t r) const {
    const float sum = reduce_add(load(sums + r * W));
    RowPart part{reduce_max(load(tops + r * W)), -reduce_max(-load(lows + r * W)), sum - sum, 0};
    if (!p.reweigh || scale[r].keys <= kFew) return part;
    vf below{}, keys{};
    const int64_t g = r / kRows, high = min64(ranges.group_high[g], end) - base;
    const float* x = scores + r * stride;
    for (int64_t j = max64(ranges.group_low[g] - base, 0) / kPanel * kPanel; j < high; j += W) {
      const vi attends = load(x + j) >= 0.0f;
      below += keep(attends, part.top - load(x + j));
      keys += keep(attends, splat(1.0f));
    }
    part.below += reduce_add(below);
    part.keys = reduce_add(keys);
    return part;
  }

  void set_statistics(int64_t r, const RowPart& whole) {
    float height = whole.top;  // above the threshold
    if (scale[r].keys > kFew)
      height = whole.top - whole.low > kEqual * (1 + scale[r].c) ? whole.below / (float)scale[r].keys : 0.0f;
    scale[r].top = whole.top;
    const bool nan = whole.below != whole.below;
    scale[r].reciprocal_height = nan ? whole.below : height > 0 ? 1 / height : 0.0f;
  }

  // Turns the tile's scores into weights and adds the weighted values. A group whose weights are negligible in the
  // row's sum is left out.
  template <class Panels>
  void add_tile(const BlockRows& rows, int64_t n, int64_t there, const Panels& panels) {
    bool prepared = false;
    constexpr int64_t kStep = Unit::kStep;
    for (int64_t g = 0; g * kRows < rows.count; g++) {
      const Columns columns(ranges, g, n, there);
      if (columns.empty()) continue;
      bool counts = !p.reweigh;
      for (int64_t r = g * kRows; r < min64(rows.count, (g + 1) * kRows); r++) counts |= weigh_row(r, n, columns);
      if (!counts) continue;
      if (!prepared) panels.prepare_values(n);
      prepared = true;
      const int64_t begin = max64(ranges.group_low[g] - n, 0) / kStep;
      const int64_t end = (min64(ranges.group_high[g] - n, there) + kStep - 1) / kStep;
      const Word* a = (const Word*)(weights + g * kRows * weight_stride + (Unit::kStep == 2 ? 0 : n - base)) + begin;
      for (int64_t d = 0; d < out_columns; d += kPanel) {
        const int64_t width = min64(kPanel, out_columns - d);
        add_product<Unit>(int(width / W), out + g * kRows * out_columns + d, out_columns, a, weight_stride / kStep, 1,
                          panels.value_panel(n, d, width) + begin * width, end - begin);
      }
    }
  }

  // Whether some weight of the row is not negligible.
  bool weigh_row(int64_t r, int64_t n, const Columns& columns) {
    float* x = scores + r * stride + (n - base);
    Weight* w = Unit::kStep == 2 ? weights + r * weight_stride : (Weight*)x;
    if (!p.reweigh) {
      if (Unit::kStep == 1) return true;
      vf total = load(totals + r * W);
      for (int64_t j = columns.begin; j < columns.end; j += 2 * W) {
        store_factors(w + j, load(x + j), load(x + j + W));
        total += load(w + j) + load(w + j + W);
      }
      store(totals + r * W, total);
      return true;
    }
    const float top = scale[r].top, reciprocal = scale[r].reciprocal_height;
    if (reciprocal == 0) {
      for (int64_t j = columns.begin; j < columns.end; j += W) store(w + j, vf{});
      return false;
    }
    vf total = load(totals + r * W), most{};
    for (int64_t j = columns.begin; j < columns.end; j += 2 * W) {
      vf y[2];
      FASTATTN_EACH(i, 2) {
        y[i] = Power::of(at_least(1.0f - (top - load(x + j + i * W)) * reciprocal, 0.0f), power);
        total += y[i];
        most = vmax(most, y[i]);
      }
      store_factors(w + j, y[0], y[1]);
    }
    store(totals + r * W, total);
    return reduce_max(most) * (float)scale[r].keys >= kNegligible;
  }
};

constexpr int64_t kStreamedRows = 48;  // a key head that serves at most this many rows is packed a tile at a time
constexpr int64_t kPartKeys = 512;     // the fewest keys of a part
constexpr int64_t kScoreKib = 1024;    // scores of a block of rows

template <class Unit>
static void lssa_tiled(const LssaParams& p) {
  const Problem problem(p);
  const Longest longest(problem);
  const int64_t block_k = round_up(p.block_k, kPanel);
  const bool streamed = longest.q * problem.group <= kStreamedRows;
  int64_t block_q = streamed ? round_up(longest.q * problem.group, kRows) : p.block_q;
  const int64_t columns = block_columns(p, longest.k, block_q, block_k);
  if (!streamed) block_q = block_rows(block_q, columns, kScoreKib);
  const int64_t pairs = problem.sequences * problem.kv_heads;
  // with fewer heads than threads, the keys of a streamed head are divided into parts
  const int64_t parts = streamed ? max64(1, min64(p.threads / max64(pairs, 1), columns / kPartKeys)) : 1;
  const int64_t stride = score_stride((columns / block_k + parts - 1) / parts * block_k);
  if (!streamed) {
    const int64_t bytes = bytes_of([&](Arena& arena) { LssaBlock<Unit>(problem, p, block_q, block_k, stride, arena); });
    for_packed_blocks<Unit>(problem, longest, block_q, bytes, true, Together(),
                            [&](const BlockRows& rows, const Sequence& s, const auto& panels, Arena arena) {
                              LssaBlock<Unit>(problem, p, block_q, block_k, stride, arena).run(rows, s, panels(0));
                            });
    return;
  }
  const int64_t bytes = bytes_of([&](Arena& arena) {
    arena.take<RowPart>(block_q);
    StreamedPanels<Unit>(problem, problem.sequence(0), 0, block_k, arena);
    LssaBlock<Unit>(problem, p, block_q, block_k, stride, arena);
  });
  Blocks memory;
  with_scratch(0, [&](Arena& arena) { memory = arena.blocks(parts > 1 ? pairs * parts : p.threads, bytes); });
  const auto told = [&](int64_t slot) { return memory[slot].template take<RowPart>(block_q); };
  // run(block, its rows, sequence, panels) with the memory of a slot
  const auto with_block = [&](int64_t slot, int64_t pair, const auto& run) {
    const Sequence s = problem.sequence(pair / problem.kv_heads);
    if (s.q_length == 0) return;
    const int64_t head = pair % problem.kv_heads;
    Arena arena = memory[slot];
    arena.take<RowPart>(block_q);
    const StreamedPanels<Unit> panels(problem, s, head, block_k, arena);
    LssaBlock<Unit> block(problem, p, block_q, block_k, stride, arena);
    run(block, BlockRows{head * problem.group, 0, s.q_length, s.q_length * problem.group}, s, panels);
  };
  if (parts == 1) {
    parallel_items(pairs, p.threads, [&](int64_t pair, int thread) {
      with_block(thread, pair, [](auto& block, const BlockRows& rows, const Sequence& s, const auto& panels) {
        block.run(rows, s, panels);
      });
    });
    return;
  }
  const auto take_statistics = [&](auto& block, int64_t pair, int64_t rows) {
    for (int64_t r = 0; r < rows; r++) {
      RowPart whole = told(pair * parts)[r];
      for (int64_t part = 1; part < parts; part++) whole.add(told(pair * parts + part)[r]);
      block.set_statistics(r, whole);
    }
  };
  parallel_items(pairs * parts, p.threads, [&](int64_t task, int) {
    with_block(task, task / parts, [&](auto& block, const BlockRows& rows, const Sequence& s, const auto& panels) {
      block.place(rows, s, task % parts, parts);
      block.score(rows, s, panels);
      for (int64_t r = 0; r < rows.count; r++) told(task)[r] = block.part_of(r);
    });
  });
  if (p.reweigh)
    parallel_items(pairs * parts, p.threads, [&](int64_t task, int) {
      with_block(task, task / parts, [&](auto& block, const BlockRows& rows, const Sequence& s, const auto& panels) {
        block.place(rows, s, task % parts, parts);
        take_statistics(block, task / parts, rows.count);
        block.reweigh(rows, s, panels);
      });
    });
  parallel_items(pairs, p.threads, [&](int64_t pair, int) {
    with_block(pair * parts, pair, [&](auto& block, const BlockRows& rows, const Sequence& s, const auto&) {
      block.place(rows, s, 0, parts);
      take_statistics(block, pair, rows.count);
      for (int64_t part = 1; part < parts; part++)
        with_block(pair * parts + part, pair, [&](auto& other, const auto&...) { block.take(other, rows.count); });
      for (int64_t r = 0; r < rows.count; r++) block.finish_row(rows, s, r);
    });
  });
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
