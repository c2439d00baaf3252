#include "../score_machine.h"

#include "../math_full.h"
#include "../score_steps.h"

namespace fastattn {
namespace FASTATTN_ISA {

namespace {
enum Place { kScalars, kVectors, kScores, kSlopes, kLoads };  // two for each load from kLoads on
}

// The rows and columns over which instructions run.
struct Strip {
  const ScoreMachine& machine;
  int64_t rows, columns, key;
  float* places[ScoreMachine::kPlaces];
  int64_t strides[ScoreMachine::kPlaces];

  float* at(const StripOperand& x) const { return places[x.place] + x.offset; }
  int64_t step(const StripOperand& x) const { return x.rows ? strides[x.place] : 0; }
  const float* table(const float*) const { return machine.tables_; }
  const int32_t* table(const int32_t*) const { return machine.indices_; }
  int64_t size(const float*) const { return machine.table_size_; }
  int64_t size(const int32_t*) const { return machine.index_size_; }
};

namespace {

template <class V>
FASTATTN_INLINE V load_as(const float* p) {
  V x;
  memcpy(&x, p, sizeof x);
  return x;
}
template <class V>
FASTATTN_INLINE void store_as(float* p, V x) {
  memcpy(p, &x, sizeof x);
}

FASTATTN_INLINE int64_t clamped(int64_t index, int64_t size) { return index < 0 ? 0 : index < size ? index : size - 1; }

// Calls f(to, from, columns) for each row; `from` are the operands. The first row comes last, because it may overwrite
// an operand that all rows share.
template <int kOperands, class F>
FASTATTN_INLINE void for_rows(const StripInstruction& t, const Strip& s, const F& f) {
  const int64_t last = t.to.rows ? s.rows - 1 : 0, columns = t.to.columns ? s.columns : W, to_step = s.step(t.to);
  float* to = s.at(t.to) + last * to_step;
  const float* from[kOperands];
  int64_t step[kOperands];
  FASTATTN_EACH(k, kOperands) {
    step[k] = s.step(t.from[k]);
    from[k] = s.at(t.from[k]) + last * step[k];
  }
  for (int64_t r = last; r >= 0; r--) {
    f(to, from, columns);
    to -= to_step;
    FASTATTN_EACH(k, kOperands) from[k] -= step[k];
  }
}

// to = f(operands) vector by vector. Bit k of kColumns: whether operand k differs from column to column.
template <int kOperands, class V, int kColumns, class F>
FASTATTN_INLINE void apply(const StripInstruction& t, const Strip& s, const F& f) {
  for_rows<kOperands>(t, s, [&](float* to, const float* const* from, int64_t columns) {
    V same[4];
    FASTATTN_EACH(k, 4) same[k] = load_as<V>(from[k < kOperands ? k : 0]);
    if (columns < W) __builtin_unreachable();
    _Pragma("GCC unroll 2") for (int64_t j = 0; j < columns; j += W) {
      V x[4];
      FASTATTN_EACH(k, 4) x[k] = k < kOperands && (kColumns >> k & 1) ? load_as<V>(from[k] + j) : same[k];
      store_as(to + j, f(x[0], x[1], x[2], x[3]));
    }
  });
}

using f = vf;
using i = vi;
#define SCORE_OP(name, operands, type, result)                                                     \
  struct name##_op {                                                                               \
    static constexpr int kOperands = operands;                                                     \
    using V = type;                                                                                \
    FASTATTN_INLINE auto of(V a, [[maybe_unused]] V b, [[maybe_unused]] V c, V) { return result; } \
  };
#define SCORE_LOAD(name, table)
#define SCORE_LOAD_ROW(name, table)
#include "../score_program_ops.def"
#undef SCORE_OP
#undef SCORE_LOAD
#undef SCORE_LOAD_ROW

template <class Op, int kColumns>
void run_op(const StripInstruction& t, const Strip& s) {
  apply<Op::kOperands, typename Op::V, kColumns>(t, s,
                                                 [](auto a, auto b, auto c, auto d) { return Op::of(a, b, c, d); });
}

// Bits of an instruction's operands that differ from column to column.
struct Variants {
  void (*of[8])(const StripInstruction&, const Strip&);
};
template <class Op>
constexpr Variants variants() {
  constexpr int m = (1 << Op::kOperands) - 1;
  return {{run_op<Op, 0>, run_op<Op, 1 & m>, run_op<Op, 2 & m>, run_op<Op, 3 & m>, run_op<Op, 4 & m>, run_op<Op, 5 & m>,
           run_op<Op, 6 & m>, run_op<Op, 7 & m>}};
}

// The functions of joined steps, without tanh.
struct difference_op {
  static constexpr int kOperands = 2;
  using V = vi;
  FASTATTN_INLINE vf of(vi a, vi b, vi, vi) { return __builtin_convertvector((vi)((vu)a - (vu)b), vf); }
};
struct multiply_add_op {
  static constexpr int kOperands = 3;
  using V = vf;
  FASTATTN_INLINE vf of(vf a, vf b, vf c, vf) { return a * b + c; }
};
struct subtract_product_op {
  static constexpr int kOperands = 3;
  using V = vf;
  FASTATTN_INLINE vf of(vf a, vf b, vf c, vf) { return c - a * b; }
};
struct add_multiple_op {
  static constexpr int kOperands = 4;
  using V = vi;
  FASTATTN_INLINE vf of(vi a, vi b, vi c, vi d) { return difference_op::of(a, b, c, d) * (vf)c + (vf)d; }
};
struct copy_op {
  static constexpr int kOperands = 1;
  using V = vf;
  FASTATTN_INLINE vf of(vf a, vf, vf, vf) { return a; }
};

// tanh of a vector register, multiplied by a scalar before and after it, for neighbouring vectors together; by the
// short formula where all values are small.
template <bool kBefore, bool kAfter>
void run_tanh(const StripInstruction& t, const Strip& s) {
  for_rows<1 + kBefore + kAfter>(t, s, [](float* to, const float* const* from, int64_t columns) {
    const vf before = load(from[kBefore ? 1 : 0]), after = load(from[kAfter ? 2 : 0]);
    const auto some = [&](auto count, int64_t j) {
      constexpr int n = decltype(count)::value;
      vf y[n], largest = vf{};
      const auto at = [&](int k) {
        const vf x = load(from[0] + j + k * W);
        return kBefore ? x * before : x;
      };
      FASTATTN_EACH(k, n) {
        const vf x = at(k);
        largest = vmax(x * x, largest);
        y[k] = tanh_small(x);  // NaN stays NaN
      }
      if (__builtin_expect(reduce_max(largest) >= kSmallTanh * kSmallTanh, 0)) FASTATTN_EACH(k, n) y[k] = tanh(at(k));
      FASTATTN_EACH(k, n) store(to + j + k * W, kAfter ? y[k] * after : y[k]);
    };
    constexpr int kTogether = kRegisters == 32 ? 4 : 8;
    int64_t j = 0;
    for (; j + kTogether * W <= columns; j += kTogether * W) some(std::integral_constant<int, kTogether>{}, j);
    for (; j < columns; j += W) some(std::integral_constant<int, 1>{}, j);
  });
}
template <>
constexpr Variants variants<tanh_f_op>() {
  Variants v{};
  for (int columns = 0; columns < 8; columns++)
    v.of[columns] = columns & 1 ? run_tanh<false, false> : run_op<tanh_f_op, 0>;
  return v;
}

template <class T>
void load_elements(const StripInstruction& t, const Strip& s) {
  const T* table = s.table((const T*)nullptr);
  const int64_t size = s.size((const T*)nullptr), along = t.from[0].columns ? -1 : 0;
  for_rows<1>(t, s, [&](float* to, const float* const* from, int64_t columns) {
    for (int64_t j = 0; j < columns; j += W) {
      const vi index = load_as<vi>(from[0] + (j & along));
      T x[W];
      for (int i = 0; i < W; i++) x[i] = table[clamped(index[i], size)];
      memcpy(to + j, x, sizeof x);
    }
  });
}

template <class T>
void load_row(const StripInstruction& t, const Strip& s) {
  const T* table = s.table((const T*)nullptr);
  const int64_t size = s.size((const T*)nullptr);
  for_rows<1>(t, s, [&](float* to, const float* const* from, int64_t columns) {
    const int64_t first = load_as<vi>(from[0])[0] + s.key;
    if (first >= 0 && first + columns <= size) {
      for (int64_t j = 0; j < columns; j += W) memcpy(to + j, table + first + j, W * sizeof(T));
      return;
    }
    for (int64_t j = 0; j < columns; j++) memcpy(to + j, table + clamped(first + j, size), sizeof(T));
  });
}

struct Tables {
  using tables = float;
  using indices = int32_t;
};
template <void (*kRun)(const StripInstruction&, const Strip&)>
constexpr Variants one_variant() {
  return {{kRun, kRun, kRun, kRun, kRun, kRun, kRun, kRun}};
}

const Variants kRun[] = {
#define SCORE_OP(name, operands, type, result) variants<name##_op>(),
#define SCORE_LOAD(name, table) one_variant<load_elements<Tables::table>>(),
#define SCORE_LOAD_ROW(name, table) one_variant<load_row<Tables::table>>(),
#include "../score_program_ops.def"
#undef SCORE_OP
#undef SCORE_LOAD
#undef SCORE_LOAD_ROW
};

// The function of a step, by the bits of the operands that differ from column to column.
void (*instruction_of(int op, int columns))(const StripInstruction&, const Strip&) {
  static constexpr Variants difference = variants<difference_op>(), multiply_add = variants<multiply_add_op>(),
                            subtract_product = variants<subtract_product_op>();
  switch (op) {
    case kDifference:
      return difference.of[columns];
    case kMultiplyAdd:
      return multiply_add.of[columns];
    case kSubtractProduct:
      return subtract_product.of[columns];
    case kAddMultiple:
      return columns & 1 ? run_op<add_multiple_op, 9> : run_op<add_multiple_op, 10>;
    case kTanhOf:
      return run_tanh<true, false>;
    case kTanhTimes:
      return run_tanh<true, true>;
    default:
      return kRun[op].of[columns];
  }
}

}  // namespace

void ScoreMachine::prepare(const AttentionParams& p, const Tensor& words, bool backward) {
  program = ScoreProgram((const int32_t*)words.data);
  tables_ = (const float*)p.tables.data;
  indices_ = (const int32_t*)p.indices.data;
  table_size_ = p.tables.size[3];
  index_size_ = p.indices.size[3];
  const int scalars = program.scalars, given = kProgramFirstConstant + program.constants;
  rows_ = max64(1, min64(kStripRows, kStripFloats / (scalars * W + program.vectors * kStripColumns)));
  const int64_t vectors = scalars * rows_ * W;

  StripOperand where[limits::program_scalars + limits::program_vectors];
  for (int r = 0; r < program.registers(); r++) {
    StripOperand& at = where[r];
    at.place = program.scalar(r) ? kScalars : kVectors;
    at.offset = int32_t(program.scalar(r) ? r * rows_ * W : vectors + (r - scalars) * rows_ * kStripColumns);
    at.columns = !program.scalar(r);
  }
  where[2].rows = true;
  where[scalars] = {kScores, 0, true, true};
  entry_[0] = where[0], entry_[1] = where[1], entry_[2] = where[2], entry_[4] = where[scalars + 1];
  entry_[3] = where[min64(kProgramFirstConstant, program.registers() - 1)];

  has_slope = backward && program.slope >= 0;
  if (has_slope && program.slope >= kProgramFirstConstant && program.slope < given)
    has_slope = program.constant_bits[program.slope - kProgramFirstConstant] != 0x3f800000;
  keeps_scalars_ = keeps_keys_ = true;
  for (int n = 0; n < program.instructions; n++) {
    const int to = program.step[n].dst;
    if (to < given) keeps_scalars_ = false;
    if (to == scalars + 1) keeps_keys_ = false;
    if (to == program.slope) has_slope = backward;
  }
  // registers that leave the machine; the score is last, because its copy would overwrite the products
  int wanted[kPlaces], places[kPlaces], count = 0;
  if (has_slope) wanted[count] = program.slope, places[count++] = kSlopes;
  for (int g = 0; g < program.loads && backward; g++) {
    wanted[count] = program.load[g].derivative, places[count++] = kLoads + 2 * g;
    wanted[count] = program.load[g].index % kProgramRowIndex, places[count++] = kLoads + 2 * g + 1;
  }
  wanted[count] = program.score, places[count++] = kScores;
  const JoinedSteps steps(program, wanted, count);
  reads_keys_ = false;
  for (int n = 0; n < steps.count; n++)
    for (int k = 0; k < steps.step[n].operands; k++) reads_keys_ |= steps.step[n].from[k] == scalars + 1;
  for (int w = 0; w < count; w++) reads_keys_ |= wanted[w] == scalars + 1;
  // the last step that writes one writes to the destination if it can
  int writer[kPlaces];
  for (int w = 0; w < count; w++) {
    writer[w] = -1;
    bool taken = program.scalar(wanted[w]), products = false;  // read or written after the writer
    for (int v = 0; v < w; v++) taken |= wanted[v] == wanted[w] || wanted[v] == scalars;
    for (int n = 0; n < steps.count; n++) {
      const JoinedStep& step = steps.step[n];
      if (!step.whole) continue;
      for (int k = 0; k < step.operands; k++) products |= step.from[k] == scalars;
      products |= step.dst == scalars;
      if (step.dst == wanted[w]) writer[w] = n, products = false;
    }
    if (taken || (places[w] == kScores && products)) writer[w] = -1;
  }

  instructions_ = 0;
  for (int n = 0; n < steps.count; n++) {
    const JoinedStep& step = steps.step[n];
    if (!step.whole) continue;
    StripInstruction& t = code_[instructions_++];
    bool rows = false;
    int columns = 0;
    for (int k = 0; k < step.operands; k++) {
      t.from[k] = where[step.from[k]];
      rows |= t.from[k].rows;
      columns |= t.from[k].columns << k;
    }
    t.run = instruction_of(step.op, columns);
    StripOperand& to = where[step.dst];
    to.rows = rows || to.place == kScores;
    for (int w = 0; w < count && rows; w++)
      if (writer[w] == n) to.place = places[w], to.offset = 0;
    t.to = to;
  }
  outputs_ = 0;
  for (int w = 0; w < count; w++) {
    const StripOperand& from = where[wanted[w]];
    if (from.place != places[w]) output_[outputs_++] = {from, places[w]};
  }
}

void ScoreMachine::run(const ScoreRows& rows) const {
  alignas(64) float memory[kStripFloats];
  Strip s{*this, 0, 0, 0, {}, {}};
  s.places[kScalars] = s.places[kVectors] = memory;
  s.strides[kScalars] = W;
  s.strides[kVectors] = kStripColumns;
  const int places = rows.loads ? kLoads + 2 * program.loads : kLoads;
  for (int place = kScores; place < places; place++) s.strides[place] = rows.stride;
  const auto fill_scalars = [&] {
    store_as(s.at(entry_[0]), vi{} + (int32_t)rows.batch);
    store_as(s.at(entry_[1]), vi{} + (int32_t)rows.head);
    for (int c = 0; c < program.constants; c++)
      store_as(s.at(entry_[3]) + c * rows_ * W, vi{} + program.constant_bits[c]);
  };
  if (keeps_scalars_) fill_scalars();
  for (int64_t j = 0; j < rows.columns; j += kStripColumns) {
    s.columns = min64(kStripColumns, rows.columns - j);
    s.key = rows.key + j;
    for (int64_t r = 0; r < rows.rows; r += rows_) {
      s.rows = min64(rows_, rows.rows - r);
      s.places[kScores] = rows.x + r * rows.stride + j;
      s.places[kSlopes] = rows.slopes ? rows.slopes + r * rows.stride + j : nullptr;
      for (int place = kLoads; place < places; place++)
        s.places[place] = rows.loads + (place - kLoads) * rows.apart + r * rows.stride + j;
      if (!keeps_scalars_) fill_scalars();
      for (int64_t i = 0; i < s.rows; i++) store_as(s.at(entry_[2]) + i * W, vi{} + int32_t(rows.row + r + i));
      if (reads_keys_ && (r == 0 || !keeps_keys_))
        for (int64_t k = 0; k < s.columns; k += W) store_as(s.at(entry_[4]) + k, iota() + int32_t(s.key + k));
      for (int n = 0; n < instructions_; n++) code_[n].run(code_[n], s);
      for (int n = 0; n < outputs_; n++) {
        StripInstruction t{nullptr, {output_[n].place, 0, true, true}, {output_[n].from, {}, {}}};
        // one value for each row, stored at the row's first element
        if (output_[n].place > kLoads && (output_[n].place - kLoads) % 2 == 1 && !output_[n].from.columns) {
          s.places[t.to.place] -= j;
          t.to.columns = false;
        }
        (t.from[0].columns ? run_op<copy_op, 1> : run_op<copy_op, 0>)(t, s);
      }
    }
  }
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
