// The machine that runs a score program (score_program.h) over rows of a tile's products, in place.
//
// It runs over strips, some rows of kStripColumns columns; each instruction is one loop over a strip. An operand has a
// step from row to row. Along a row it advances vector by vector, unless it is a scalar, which is kept as one vector of
// equal lanes. Values that are the same in every row of a strip are computed in its first row only.
#pragma once

#include "score_program.h"
#include "vec.h"

namespace fastattn {
namespace FASTATTN_ISA {

constexpr int64_t kStripColumns = 128, kStripRows = 24;
constexpr int64_t kStripFloats = 6144;  // floats of all registers of a strip

// Rows of scaled products that become scores, and buffers for a backward's values, with rows `stride` apart as in x.
struct ScoreRows {
  int64_t batch, head, row, key;  // of the first element, among all rows and keys
  int64_t rows, columns;          // columns: whole vectors
  float* x;
  int64_t stride;
  float* slopes = nullptr;
  // two buffers, `apart` apart, for each load with a gradient: derivatives and indices. An index with one value for
  // each row is the row's first element.
  float* loads = nullptr;
  int64_t apart = 0;
};

struct Strip;

// An operand of an instruction: in places[place] from `offset` on, with flags whether it differs from row to row of a
// strip and from column to column.
struct StripOperand {
  int32_t place = 0, offset = 0;
  bool rows = false, columns = false;
};

struct StripInstruction {
  void (*run)(const StripInstruction&, const Strip&);
  StripOperand to, from[4];
};

// A prepared program, or none: then only `program` is set.
class ScoreMachine {
 public:
  ScoreMachine() {}
  void prepare(const AttentionParams& p, const Tensor& words, bool backward);
  bool on() const { return program.version != 0; }
  void run(const ScoreRows& rows) const;

  ScoreProgram program{};
  bool has_slope;  // whether the slope is not 1 everywhere

 private:
  static constexpr int kPlaces = 4 + 2 * limits::program_loads;
  friend struct Strip;
  struct Output {
    StripOperand from;
    int place;
  };

  int64_t rows_;                     // of a strip
  bool keeps_scalars_, keeps_keys_;  // whether those on entry are never written
  bool reads_keys_;
  int instructions_, outputs_;
  StripInstruction code_[limits::program_instructions];
  Output output_[kPlaces];
  StripOperand entry_[5];  // batch, head, row; constants; keys
  const float* tables_;
  const int32_t* indices_;
  int64_t table_size_, index_size_;
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
