// The machine that runs a score program (score_program.h) over rows of a tile's products, in place.
//
// It goes strip by strip, some rows of kStripColumns columns, each instruction one loop over the strip. An operand has
// a step from row to row, and goes on along a row vector by vector unless it is a scalar, which is kept as one vector
// of equal lanes. What is the same in every row of a strip is known beforehand and computed in its first row only.
#pragma once

#include "score_program.h"
#include "vec.h"

namespace fastattn {
namespace FASTATTN_ISA {

constexpr int64_t kStripColumns = 128, kStripRows = 24;
constexpr int64_t kStripFloats = 6144;  // of all registers of a strip

// Rows of scaled products that become scores, and where a backward has what it needs of each: as x, `stride` apart.
struct ScoreRows {
  int64_t batch, head, row, key;  // of the first element, among all rows and keys
  int64_t rows, columns;          // columns: whole vectors
  float* x;
  int64_t stride;
  float* slopes = nullptr;
  // of each load with a gradient two buffers, `apart` apart: derivatives and indices. Of an index with one value a row
  // a row's first element.
  float* loads = nullptr;
  int64_t apart = 0;
};

struct Strip;

// What an instruction reads or writes: of places[place] from `offset` on, in every row of a strip another one, in every
// column another one.
struct StripOperand {
  int32_t place = 0, offset = 0;
  bool rows = false, columns = false;
};

struct StripInstruction {
  void (*run)(const StripInstruction&, const Strip&);
  StripOperand to, from[4];
};

// A program that was prepared, or none: then nothing but `program` is set.
class ScoreMachine {
 public:
  ScoreMachine() {}
  void prepare(const AttentionParams& p, const Tensor& words, bool backward);
  bool on() const { return program.version != 0; }
  void run(const ScoreRows& rows) const;

  ScoreProgram program{};
  bool has_slope;  // that is not 1 everywhere

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
