#include "../score_machine.h"

#include "../math_full.h"
#include "../tile.h"

namespace fastattn {
namespace FASTATTN_ISA {

namespace {
enum Place { kScalars, kVectors, kScores, kSlopes, kLoads };  // of each load two from kLoads on
}

// The rows and columns that instructions run over.
struct Strip {
  const ScoreMachine& machine;
  int64_t rows, columns, key;
  float* places[ScoreMachine::kPlaces];
  int64_t strides[ScoreMachine::kPlaces];

  float* at(const StripOperand& x, int64_t row) const {
    return places[x.place] + x.offset + (x.rows ? row * strides[x.place] : 0);
  }
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

// f(to, from[0], from[1], from[2], columns) of each row. What is not an operand is the first one.
template <class F>
FASTATTN_INLINE void for_rows(const StripInstruction& t, const Strip& s, const F& f) {
  const int64_t rows = t.to.rows ? s.rows : 1, columns = t.to.columns ? s.columns : W;
  for (int64_t r = 0; r < rows; r++)
    f(s.at(t.to, r), s.at(t.from[0], r), s.at(t.from[1], r), s.at(t.from[2], r), columns);
}

template <int kOperands, class V, class F>
FASTATTN_INLINE void apply(const StripInstruction& t, const Strip& s, const F& f) {
  int64_t step[3];
  for (int k = 0; k < 3; k++) step[k] = t.from[k].columns ? -1 : 0;
  for_rows(t, s, [&](float* to, const float* a, const float* b, const float* c, int64_t columns) {
    for (int64_t j = 0; j < columns; j += W) {
      const V x = load_as<V>(a + (j & step[0]));
      const V y = kOperands > 1 ? load_as<V>(b + (j & step[1])) : x;
      const V z = kOperands > 2 ? load_as<V>(c + (j & step[2])) : x;
      store_as(to + j, f(x, y, z));
    }
  });
}

FASTATTN_INLINE int64_t clamped(int64_t index, int64_t size) { return index < 0 ? 0 : index < size ? index : size - 1; }

template <class T>
void load_elements(const StripInstruction& t, const Strip& s) {
  const T* table = s.table((const T*)nullptr);
  const int64_t size = s.size((const T*)nullptr), step = t.from[0].columns ? -1 : 0;
  for_rows(t, s, [&](float* to, const float* from, const float*, const float*, int64_t columns) {
    for (int64_t j = 0; j < columns; j += W) {
      const vi index = load_as<vi>(from + (j & step));
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
  for_rows(t, s, [&](float* to, const float* from, const float*, const float*, int64_t columns) {
    const int64_t first = load_as<vi>(from)[0] + s.key;
    if (first >= 0 && first + columns <= size) {
      memcpy(to, table + first, size_t(columns) * sizeof(T));
      return;
    }
    for (int64_t j = 0; j < columns; j++) memcpy(to + j, table + clamped(first + j, size), sizeof(T));
  });
}

using f = vf;
using i = vi;
struct Tables {
  using tables = float;
  using indices = int32_t;
};

void (*const kRun[])(const StripInstruction&, const Strip&) = {
#define SCORE_OP(name, operands, type, result)                                         \
  [](const StripInstruction& t, const Strip& s) {                                      \
    apply<operands, type>(t, s,                                                        \
                          [](type a, [[maybe_unused]] type b, [[maybe_unused]] type c) \
                              __attribute__((always_inline)) { return result; });      \
  },
#define SCORE_LOAD(name, table) load_elements<Tables::table>,
#define SCORE_LOAD_ROW(name, table) load_row<Tables::table>,
#include "../score_program_ops.def"
#undef SCORE_OP
#undef SCORE_LOAD
#undef SCORE_LOAD_ROW
};

void copy(const StripInstruction& t, const Strip& s) {
  apply<1, vf>(t, s, [](vf a, vf, vf) { return a; });
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

  // registers that leave the machine: the last instruction to write one does so where it is wanted, if it can
  struct Wanted {
    int reg, place, writer;
  } wanted[kPlaces];
  int count = 0;
  has_slope = backward && program.slope >= 0;
  if (has_slope && program.slope < given && program.slope >= kProgramFirstConstant)
    has_slope = program.constant_bits[program.slope - kProgramFirstConstant] != 0x3f800000;
  keeps_scalars_ = keeps_keys_ = true;
  for (int n = 0; n < program.instructions; n++) {
    const int to = program.step[n].dst;
    if (to < given) keeps_scalars_ = false;
    if (to == scalars + 1) keeps_keys_ = false;
    if (to == program.slope) has_slope = backward;
  }
  if (has_slope) wanted[count++] = {program.slope, kSlopes, -1};
  for (int g = 0; g < program.loads && backward; g++) {
    const ScoreLoad& load = program.load[g];
    wanted[count++] = {load.derivative, kLoads + 2 * g, -1};
    wanted[count++] = {load.index % kProgramRowIndex, kLoads + 2 * g + 1, -1};
  }
  wanted[count++] = {program.score, kScores, -1};  // the last: its copy would take the products' place
  for (int w = 0; w < count; w++) {
    Wanted& out = wanted[w];
    bool taken = program.scalar(out.reg), products = false;  // read or written after the writer
    for (int v = 0; v < w; v++) taken |= wanted[v].reg == out.reg || wanted[v].reg == scalars;
    for (int n = 0; n < program.instructions; n++) {
      const ScoreStep& step = program.step[n];
      for (int k = 0; k < kScoreOps[step.op].operands; k++) products |= step.operands[k] == scalars;
      products |= step.dst == scalars;
      if (step.dst == out.reg) out.writer = n, products = false;
    }
    if (taken || (out.place == kScores && products)) out.writer = -1;
  }

  for (int n = 0; n < program.instructions; n++) {
    const ScoreStep& step = program.step[n];
    const ScoreOpFacts& op = kScoreOps[step.op];
    StripInstruction& t = code_[n];
    t.run = kRun[step.op];
    bool rows = false;
    for (int k = 0; k < 3; k++) {
      t.from[k] = where[step.operands[k < op.operands ? k : 0]];
      rows |= t.from[k].rows;
    }
    StripOperand& to = where[step.dst];
    to.rows = rows || to.place == kScores;
    for (int w = 0; w < count && rows; w++)
      if (wanted[w].writer == n) to.place = wanted[w].place, to.offset = 0;
    t.to = to;
  }
  outputs_ = 0;
  for (int w = 0; w < count; w++) {
    const StripOperand& from = where[wanted[w].reg];
    if (from.place != wanted[w].place) output_[outputs_++] = {from, wanted[w].place};
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
    store_as(s.at(entry_[0], 0), vi{} + (int32_t)rows.batch);
    store_as(s.at(entry_[1], 0), vi{} + (int32_t)rows.head);
    for (int c = 0; c < program.constants; c++)
      store_as(s.at(entry_[3], 0) + c * rows_ * W, vi{} + program.constant_bits[c]);
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
      for (int64_t i = 0; i < s.rows; i++) store_as(s.at(entry_[2], i), vi{} + int32_t(rows.row + r + i));
      if (r == 0 || !keeps_keys_)
        for (int64_t k = 0; k < s.columns; k += W) store_as(s.at(entry_[4], 0) + k, iota() + int32_t(s.key + k));
      if (rows.size != 1)
        for (int64_t i = 0; i < s.rows; i++) {
          float* x = s.places[kScores] + i * rows.stride;
          for (int64_t k = 0; k < s.columns; k += W) store(x + k, load(x + k) * rows.size);
        }
      for (int n = 0; n < program.instructions; n++) code_[n].run(code_[n], s);
      for (int n = 0; n < outputs_; n++) {
        StripInstruction t{copy, {output_[n].place, 0, true, true}, {output_[n].from, {}, {}}};
        // one value a row: where the row begins
        if (output_[n].place > kLoads && (output_[n].place - kLoads) % 2 == 1 && !output_[n].from.columns) {
          s.places[t.to.place] -= j;
          t.to.columns = false;
        }
        copy(t, s);
      }
    }
  }
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
