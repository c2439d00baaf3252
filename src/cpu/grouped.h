// Grouped sparse attention. Every pair of tokens is in exactly one list: the local list holds all tokens and counts the
// pairs at most `window` apart; a group's list holds its members in order and counts the pairs further apart that share
// no lower group, with the key before the query; of a prefix it has a second list, which counts those with the key
// after it. Within a list the keys of a row are an interval, so a list is attention over gathered rows.
#pragma once

#include "attention_forward_block.h"
#include "attention_rows.h"
#include "row_lse.h"

namespace fastattn {
namespace FASTATTN_ISA {

// The tokens of one list with their signatures, in order of position.
struct Members {
  int32_t *position, *low, *high;  // (count): position in the sequence, halves of the signature
  int64_t count;
};

struct GroupList {
  Members queries, keys;
  uint32_t low, high;  // bits of the signatures that decide whether this list counts a pair
  bool test;           // some pair of this list must be tested
  bool shared;         // the list counts pairs that share one of these bits; else pairs that share none
};

constexpr int kMostLists = 64;

// Lists 1 to count have earlier keys. With `later`, lists count + 1 to 2 count have the same groups' later keys.
struct SequenceLists {
  GroupList list[kMostLists];
  int count;
  bool later;

  int total() const { return later ? 2 * count : count; }
};

FASTATTN_INLINE const int64_t* signatures(const Tensor& t, int64_t batch, int64_t first) {
  return (const int64_t*)t.data + batch * t.stride[2] + first;
}

// The `count` tokens among `length` whose signature has some bit of `bits`.
FASTATTN_INLINE Members members(const int64_t* signature, int64_t length, uint64_t bits, int64_t count, Arena& arena) {
  const int64_t room = round_up(count, kPanel);  // of whole panels
  const Members m{arena.take<int32_t>(count), arena.take<int32_t>(room), arena.take<int32_t>(room), count};
  if (!m.position) return m;
  int64_t next = 0;
  for (int64_t i = 0; i < length; i++)
    if ((uint64_t)signature[i] & bits) m.position[next++] = (int32_t)i;
  for (int64_t i = 0; i < room; i++) {
    const uint64_t s = i < count ? (uint64_t)signature[m.position[i]] : 0;
    m.low[i] = (int32_t)(uint32_t)s;
    m.high[i] = (int32_t)(uint32_t)(s >> 32);
  }
  return m;
}

FASTATTN_INLINE uint64_t union_of(const Members& m, uint64_t bits) {
  uint64_t all = 0;
  for (int64_t i = 0; i < m.count; i++) all |= (uint64_t)(uint32_t)m.low[i] | (uint64_t)(uint32_t)m.high[i] << 32;
  return all & bits;
}

struct GroupedProblem : Problem {
  const GroupedParams& g;
  SequenceLists* lists = nullptr;  // (sequences)
  int most = 0;                    // largest number of lists of a sequence, without the local one

  GroupedProblem(const GroupedParams& params) : Problem(params), g(params) {
    with_scratch(1, [&](Arena& arena) {
      lists = arena.take<SequenceLists>(sequences);
      SequenceLists measured;
      for (int64_t s = 0; s < sequences; s++) {
        SequenceLists& to = lists ? lists[s] : measured;
        build(sequence(s), to, arena);
        most = to.total() > most ? to.total() : most;
      }
    });
  }

  // The first rows, which attend keys of a prefix after their window.
  int64_t later_rows(const Sequence& s) const {
    if (s.window_right >= 0 && s.window_right <= g.window) return 0;
    return max64(0, min64(s.q_length, min64(s.prefix, s.keys) - s.offset - g.window - 1));
  }

  void build(const Sequence& s, SequenceLists& to, Arena& arena) const {
    to.count = 0;
    to.later = later_rows(s) > 0;
    if (s.k_length <= g.window + 1 && !to.later) return;  // the window contains all keys
    const int64_t *q = signatures(g.groups, s.batch, s.q_begin), *k = signatures(g.key_groups, s.batch, s.k_begin);
    int64_t in_q[64] = {}, in_k[64] = {}, any_q = 0, any_k = 0, pairs = 0;
    const auto tally = [](const int64_t* signature, int64_t length, int64_t* in) {
      int64_t any = 0;
      for (int64_t i = 0; i < length; i++) {
        any += signature[i] != 0;
        for (uint64_t rest = (uint64_t)signature[i]; rest; rest &= rest - 1) in[__builtin_ctzll(rest)]++;
      }
      return any;
    };
    any_q = tally(q, s.q_length, in_q);
    any_k = tally(k, s.keys, in_k);
    for (int b = 0; b < 64; b++) pairs += in_q[b] * in_k[b];
    if (pairs == 0) return;
    if (pairs > any_q * any_k) {  // groups overlap so much that one list of all tokens is less work
      GroupList& list = to.list[to.count++];
      list = {
          members(q, s.q_length, ~0ull, any_q, arena), members(k, s.keys, ~0ull, any_k, arena), ~0u, ~0u, true, true};
      return;
    }
    for (int b = 0; b < 64; b++) {
      if (!in_q[b] || !in_k[b]) continue;
      const uint64_t bit = 1ull << b, lower = bit - 1;
      GroupList& list = to.list[to.count++];
      list.queries = members(q, s.q_length, bit, in_q[b], arena);
      list.keys = members(k, s.keys, bit, in_k[b], arena);
      if (!list.keys.position) continue;  // only measured
      list.low = (uint32_t)lower;
      list.high = (uint32_t)(lower >> 32);
      list.test = (union_of(list.queries, lower) & union_of(list.keys, lower)) != 0;
      list.shared = false;
    }
  }
};

// One list of one sequence: list 0 is the local one, whose tokens are the sequence's own.
struct ListView {
  const GroupedProblem& problem;
  Sequence s;
  const GroupList* list;  // null for the local list
  bool later;             // of keys after the window, else of those before it
  int64_t rows, first_key, keys;

  ListView(const GroupedProblem& problem, int64_t sequence, int number)
      : problem(problem), s(problem.sequence(sequence)) {
    const SequenceLists& lists = problem.lists[sequence];
    list = number && number <= lists.total() ? lists.list + (number - 1) % lists.count : nullptr;
    later = list && number > lists.count;
    if (list) {
      rows = later ? below(list->queries, problem.later_rows(s), 0) : list->queries.count;
      first_key = 0;
      keys = later ? below(list->keys, s.prefix, 0) : list->keys.count;
    } else {
      rows = number ? 0 : s.q_length;
      first_key = rows ? local_low(0) : 0;
      keys = rows ? max64(0, local_end(rows - 1) - first_key) : 0;
    }
  }
  int64_t local_low(int64_t i) const { return max64(s.first_key(i), max64(0, i + s.offset - problem.g.window)); }
  int64_t local_end(int64_t i) const { return min64(s.end_key(i), i + s.offset + problem.g.window + 1); }
  int64_t row(int64_t r) const { return list ? list->queries.position[r] : r; }
  int64_t key(int64_t j) const { return list ? list->keys.position[j] : first_key + j; }

  // The number of members at positions below `position`; it is at least `from`.
  static int32_t below(const Members& members, int64_t position, int64_t from) {
    int64_t low = from, step = 1;  // the next row's are mostly one or two more
    while (low + step <= members.count && members.position[low + step - 1] < position) low += step, step *= 2;
    int64_t high = min64(low + step - 1, members.count);
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (members.position[middle] < position)
        low = middle + 1;
      else
        high = middle;
    }
    return (int32_t)low;
  }

  void fill(RowRanges& r, int64_t first, int64_t count) const {
    r.begin = INT32_MAX;
    r.end = 0;
    int32_t begin = 0, end = 0;
    for (int64_t g = 0; g * kRows < count; g++) {
      int32_t lo = INT32_MAX, hi = 0;
      for (int64_t i = g * kRows; i < min64(count, (g + 1) * kRows); i++) {
        const int64_t token = row(first + i), diagonal = token + s.offset;
        if (list) {  // neither bound decreases with the token
          const int64_t last = s.end_key(token);
          begin = below(list->keys, later ? diagonal + problem.g.window + 1 : s.first_key(token), begin);
          end = below(list->keys, later ? last : min64(last, diagonal - problem.g.window), end);
        } else {
          begin = (int32_t)(local_low(token) - first_key);
          end = (int32_t)(local_end(token) - first_key);
        }
        r.low[i] = begin < end ? begin : INT32_MAX;
        r.high[i] = begin < end ? end : 0;
        lo = r.low[i] < lo ? r.low[i] : lo;
        hi = r.high[i] > hi ? r.high[i] : hi;
      }
      r.group_low[g] = lo;
      r.group_high[g] = hi;
      r.begin = lo < r.begin ? lo : r.begin;
      r.end = hi > r.end ? hi : r.end;
    }
  }

  // Which of W keys from j on the list of row r counts by their signatures.
  FASTATTN_INLINE vi counted(const GroupList& list, int64_t r, int64_t j) {
    vi low, high;
    memcpy(&low, list.keys.low + j, sizeof low);
    memcpy(&high, list.keys.high + j, sizeof high);
    const vi both = (low & (int32_t)((uint32_t)list.queries.low[r] & list.low)) |
                    (high & (int32_t)((uint32_t)list.queries.high[r] & list.high));
    return list.shared ? both != 0 : both == 0;
  }
};

// `count` rows of a list from `first` on: in place if they are consecutive, else copied.
template <class Position>
FASTATTN_INLINE Matrix gather(char* to, Matrix from, int64_t first, int64_t count, int64_t columns, bool scattered,
                              const Position& position) {
  const int64_t width = from.dtype == DType::f32 ? 4 : 2;
  if (!scattered) return {(const char*)from.data + position(first) * from.stride * width, from.stride, from.dtype};
  for (int64_t i = 0; i < count; i++)
    memcpy(to + i * columns * width, (const char*)from.data + position(first + i) * from.stride * width,
           size_t(columns * width));
  return {to, columns, from.dtype};
}

// The state of one query head's rows after the lists so far: weighted values, running maximum, running sum.
struct ListState {
  float *values, *top, *sum;  // (rows, columns) and room to fill the last group of rows; (rows) each

  ListState(int64_t rows, int64_t columns, Arena& arena)
      : values(arena.take<float>((rows + kRows) * columns)),
        top(arena.take<float>(rows)),
        sum(arena.take<float>(rows)) {}
};

template <class Unit>
struct GroupedBlock : ForwardBlock<Unit, SoftmaxScore<Arithmetic>> {
  using Base = ForwardBlock<Unit, SoftmaxScore<Arithmetic>>;
  using Word = typename Unit::Word;
  char* rows_of_q;  // (block_q, D) gathered

  GroupedBlock(const Problem& problem, int64_t block_q, int64_t block_k, Arena& arena)
      : Base(problem, block_q, block_k, arena), rows_of_q(arena.take<char>(block_q * problem.head_dim * 4)) {}

  // Rows of the local list start the state; rows of a group's list continue from it.
  void run(const ListView& view, int64_t head, int64_t first, int64_t rows, const PackedHead<Unit>& packed,
           const ListState& state) {
    const AttentionParams& p = this->problem.p;
    const int64_t groups = (rows + kRows - 1) / kRows, columns = this->out_columns;
    view.fill(this->ranges, first, rows);
    if (view.list && this->ranges.begin >= this->ranges.end) return;
    const auto position = [&](int64_t r) { return view.row(r); };
    const Matrix q = gather(rows_of_q, matrix(p.q, view.s.batch, head, view.s.q_begin), first, rows,
                            this->problem.head_dim, view.list != nullptr, position);
    pack_rows<Unit>(this->q, this->q_steps, q, rows, this->problem.head_dim, this->problem.sign);
    memset(this->sums, 0, size_t(groups * kRows * W) * 4);
    if (view.list) {
      for (int64_t i = 0; i < rows; i++) {
        const int64_t row = view.row(first + i);
        memcpy(this->out + i * columns, state.values + row * columns, size_t(columns) * 4);
        this->top[i] = state.top[row];
        this->sums[i * W] = state.sum[row];
      }
      memset(this->out + rows * columns, 0, size_t((groups * kRows - rows) * columns) * 4);
    } else {  // rows follow each other
      this->out = state.values + first * columns;
      memset(this->out, 0, size_t(groups * kRows * columns) * 4);
      for (int64_t i = 0; i < groups * kRows; i++) this->top[i] = -__builtin_inff();
    }
    Sequence s = view.s;
    s.keys = view.keys;
    for (int64_t n = this->ranges.begin / this->block_k * this->block_k; n < this->ranges.end; n += this->block_k) {
      this->score_tile(n, 0, groups, packed.keys, view.keys);
      if (view.list && view.list->test) exclude(*view.list, first, rows, n, min64(this->block_k, view.keys - n));
      this->weigh_tile(s, head, first, 0, rows, n, ScoreRow{}, false);
      this->add_values(n, groups, packed.values, packed.capacity, view.keys);
    }
    for (int64_t i = 0; i < rows; i++) {
      const int64_t row = view.row(first + i);
      if (view.list) memcpy(state.values + row * columns, this->out + i * columns, size_t(columns) * 4);
      state.top[row] = this->top[i];
      state.sum[row] = reduce_add(load(this->sums + i * W));
    }
  }

  void exclude(const GroupList& list, int64_t first, int64_t rows, int64_t n, int64_t there) {
    for (int64_t i = 0; i < rows; i++) {
      const Columns columns(this->ranges, i / kRows, n, there);
      float* x = this->scores + i * this->block_k;
      for (int64_t j = columns.begin; j < columns.end; j += W)
        store(x + j, select(ListView::counted(list, first + i, n + j), load(x + j), splat(-__builtin_inff())));
    }
  }
};

// The packed operands of one list of one key head, and the states of its query heads.
template <class Unit>
struct GroupedHead : PackedHead<Unit> {
  Blocks states;
  int64_t rows, columns;

  GroupedHead(const Problem& problem, const Longest& longest, Arena& arena)
      : PackedHead<Unit>(problem, longest.k, arena), rows(longest.q), columns(round_up(problem.value_dim, W)) {
    states = arena.blocks(problem.group, bytes_of([&](Arena& measure) { ListState(rows, columns, measure); }), 64);
  }
  ListState state(int64_t in_group) const {
    Arena arena = states[in_group];
    return ListState(rows, columns, arena);
  }
};

template <class Unit>
static void grouped_tiled(const GroupedParams& p) {
  const GroupedProblem problem(p);
  const Longest longest(problem);
  const int64_t block_q = round_up(p.block_q, kRows), block_k = round_up(p.block_k, kPanel);
  const int64_t head_bytes = bytes_of([&](Arena& arena) { GroupedHead<Unit>(problem, longest, arena); });
  const int64_t block_bytes = bytes_of([&](Arena& arena) { GroupedBlock<Unit>(problem, block_q, block_k, arena); });
  const int64_t blocks = (longest.q + block_q - 1) / block_q, pairs = problem.sequences * problem.kv_heads;
  const int64_t wave = max64(1, min64(pairs, 4 * p.pack_kib * 1024 / max64(head_bytes, 1)));
  constexpr int64_t kPackRows = 4 * kPanel;
  const int64_t copy_bytes = kPackRows * max64(problem.head_dim, problem.value_dim) * 4;
  Blocks memory, copies, heads;  // of each thread; keys or values gathered by it; of each key head of a wave
  with_scratch(0, [&](Arena& arena) {
    memory = arena.blocks(p.threads, block_bytes);
    copies = arena.blocks(p.threads, bytes_of([&](Arena& measure) { measure.take<char>(copy_bytes); }));
    heads = arena.blocks(wave, head_bytes, 64);
  });
  const auto head_of = [&](int64_t slot) {
    Arena arena = heads[slot];
    return GroupedHead<Unit>(problem, longest, arena);
  };
  const int64_t pack_tasks = (longest.k + kPackRows - 1) / kPackRows, q_steps = steps_of<Unit>(problem.head_dim);

  for (int64_t begin = 0; begin < pairs; begin += wave) {
    const int64_t count = min64(wave, pairs - begin);
    for (int number = 0; number <= problem.most; number++) {
      parallel_items(count * pack_tasks, p.threads, [&](int64_t task, int thread) {
        const int64_t pair = begin + task / pack_tasks, first = task % pack_tasks * kPackRows;
        const int64_t head = pair % problem.kv_heads;
        const ListView view(problem, pair / problem.kv_heads, number);
        const int64_t rows = min64(kPackRows, view.keys - first);
        if (rows <= 0) return;
        char* copy = copies[thread].template take<char>(copy_bytes);
        const GroupedHead<Unit> to = head_of(task / pack_tasks);
        const auto position = [&](int64_t j) { return view.key(j); };
        const Matrix k = gather(copy, matrix(p.k, view.s.batch, head, view.s.k_begin), first, rows, problem.head_dim,
                                view.list != nullptr, position);
        pack_transposed<Unit>(to.keys + first * q_steps, k, rows, problem.head_dim);
        const Matrix v = gather(copy, matrix(p.v, view.s.batch, head, view.s.k_begin), first, rows, problem.value_dim,
                                view.list != nullptr, position);
        pack_panels<Unit>(to.values, to.capacity, first / Unit::kStep, v, rows, problem.value_dim);
      });
      parallel_items(count * problem.group * blocks, p.threads, [&](int64_t task, int thread) {
        const int64_t pair = task / (problem.group * blocks), in_group = task / blocks % problem.group;
        const ListView view(problem, (begin + pair) / problem.kv_heads, number);
        const int64_t first = (blocks - 1 - task % blocks) * block_q;
        if (first >= view.rows) return;
        const int64_t head = (begin + pair) % problem.kv_heads * problem.group + in_group;
        const GroupedHead<Unit> packed = head_of(pair);
        Arena arena = memory[thread];
        GroupedBlock<Unit> block(problem, block_q, block_k, arena);
        block.run(view, head, first, min64(block_q, view.rows - first), packed, packed.state(in_group));
      });
    }
    parallel_items(count * problem.group, p.threads, [&](int64_t task, int) {
      const int64_t pair = task / problem.group, in_group = task % problem.group;
      const Sequence s = problem.sequence((begin + pair) / problem.kv_heads);
      const int64_t head = (begin + pair) % problem.kv_heads * problem.group + in_group;
      const GroupedHead<Unit> packed = head_of(pair);
      const ListState state = packed.state(in_group);
      const Matrix out = matrix(p.out, s.batch, head, s.q_begin);
      for (int64_t i = 0; i < s.q_length; i++) {
        const float top = state.top[i], sum = state.sum[i];
        store_row(out, i, state.values + i * packed.columns, problem.value_dim, sum == 0 ? 0.0f : 1 / sum);
        *row_state(p.state, s, head, i) = row_state(top, problem.c, sum);
        store_lse(p, s, head, i, top, problem.c, sum);
      }
    });
  }
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
