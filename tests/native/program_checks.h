// Score programs: the machine's operations and joined steps by their definitions, and what it refuses.
#pragma once
#include <string>

#include "../../src/cpu/checks.h"
#include "math_checks.h"
#include "score_programs.h"

namespace checks {

inline void (*program_runner(std::string_view isa))(const ProgramRun&) {
#if defined(FASTATTN_HAS_AVX2)
  if (isa == "avx2") return avx2::run_program;
#endif
#if defined(FASTATTN_HAS_AVX512)
  if (isa == "avx512") return avx512::run_program;
#endif
#if defined(FASTATTN_HAS_AVX512BF16)
  if (isa == "avx512bf16") return avx512bf16::run_program;
#endif
  return baseline::run_program;
}

// A program of random products, over rows and columns as run_program numbers them, and what each element should be.
class MachineRun {
 public:
  static constexpr int64_t kRow = 5, kKey = 3, kHead = 1;
  const Program& program;
  Array words, tables, indices, x, products, slopes, loads;
  int64_t rows, columns;

  MachineRun(const Program& program, const Array& tables, const Array& indices, int64_t rows, int64_t columns)
      : program(program), words(program.words()), tables(tables), indices(indices), rows(rows), columns(columns) {
    x = products = Array::random(DType::f32, {rows, columns}, -3, 3);
    slopes = Array(DType::f32, {rows, columns});
    loads = Array(DType::f32, {2 * std::max<int64_t>(1, int64_t(program.loads.size())), rows, columns});
  }
  void run(const char* isa, bool backward) {
    AttentionParams p;
    p.program = words, p.tables = tables, p.indices = indices;
    x = products;
    const auto floats = [](Array& a) { return (float*)a.tensor.data; };
    program_runner(isa)({p, rows, columns, floats(x), backward ? floats(slopes) : nullptr,
                         backward && !program.loads.empty() ? floats(loads) : nullptr});
  }
  int32_t bits(const Array& a, int64_t i) const {
    int32_t value;
    return memcpy(&value, (const char*)a.tensor.data + 4 * i, 4), value;
  }
  // Registers at the end; largest: at least what any step that makes a float makes.
  std::vector<int32_t> expected(int64_t row, int64_t column, double* largest = nullptr) const {
    return program.run(float(products[row * columns + column]), 0, kHead, int32_t(kRow + row), int32_t(kKey + column),
                       tables, indices, [&](const ScoreStep& s, int32_t result) {
                         const std::string_view name = kScoreOps[s.op].name;
                         const bool floating = name == "i2f" || name.substr(name.size() - 2) == "_f";
                         if (largest && floating) *largest = std::fmax(*largest, std::fabs(float_of_bits(result)));
                       });
  }
};

// Every operation on values that are special to it, of operands with one value a key, a row or a head.
inline void check_operations(const char* isa, Report& report) {
  const float floats[] = {0,    -0.0f, 1,     -1,      0.3f, -2.5f, 2.5f, 7,     -88.5f,    89,
                          3e4f, -3e4f, 1e10f, 0x1p31f, kInf, -kInf, kNaN, kMost, kSubnormal};
  const int32_t ints[] = {0, 1, -1, 2, -2, 7, -7, 31, 32, 33, 100, INT32_MIN, INT32_MAX, 65537, -3, 1000000, 12, 5, 3};
  constexpr int64_t n = 19, rows = 7, columns = 384;  // n * n and more
  static_assert(std::size(floats) == n && std::size(ints) == n);
  const auto value = [](int k, int64_t j) { return k == 0 ? j % n : k == 1 ? j / n % n : (j / 2 + j) % n; };
  Array tables(DType::f32, {3 * columns}), indices(DType::i32, {4 * columns});
  for (int k = 0; k < 3; k++)
    for (int64_t j = 0; j < columns; j++) {
      tables.set(k * columns + j, floats[value(k, j)]);
      indices.set(k * columns + j, ints[value(k, j)]);
      indices.set(3 * columns + j, j % 3 ? -1 : 0);
    }
  for (int32_t code = 0; code < int32_t(ScoreOp::count); code++) {
    const ScoreOpFacts& op = kScoreOps[code];
    const std::string name = op.name;
    const bool floating = name.size() > 2 && name.substr(name.size() - 2) == "_f" && !op.loads;
    for (int kinds = 0; kinds < 1 << (2 * op.operands); kinds++) {  // two bits an operand
      Program p;
      int operands[3] = {-1, -1, -1};
      bool served = true;
      for (int k = 0; k < op.operands; k++) {
        const int kind = kinds >> (2 * k) & 3;  // of a key, of a key and row, of a row, of nothing
        const int64_t base = name == "select" && k == 0 ? 3 * columns : k * columns;
        const std::string of = floating || name == "f2i" ? "f" : "i";
        int index = p.constant(int32_t(base - MachineRun::kKey));
        if (kind == 1 || kind == 2) index = p.op("add_i", index, 2);
        operands[k] = p.op((kind < 2 ? "load_row_" : "load_") + of, kind == 3 ? p.constant(int32_t(base + 17)) : index);
        served &= !op.loads_row || kind > 1;
      }
      if (!served) continue;
      p.score = p.op(name, operands[0], operands[1], operands[2]);
      MachineRun run(p, tables, indices, rows, columns);
      run.run(isa, false);
      report.checked++;
      const bool exact = !floating || name == "add_f" || name == "sub_f" || name == "mul_f" || name == "div_f" ||
                         name == "neg_f" || name == "abs_f" || name == "min_f" || name == "max_f" || name == "sqrt_f" ||
                         name == "floor_f" || name == "sign_f";
      for (int64_t i = 0; i < rows * columns; i++) {
        const std::vector<int32_t> r = run.expected(i / columns, i % columns);
        const int32_t got = run.bits(run.x, i), want = r[size_t(p.score)];
        const float y = float_of_bits(got), z = float_of_bits(want);
        const bool close =
            floating && (y == z || (y != y && z != z) || (!exact && std::fabs(double(y) - z) <= 6 * unit_of(z)));
        if (got == want || close) continue;
        report.failed++;
        std::printf("FAILED %s: %s of kinds %x at %lld: %08x (%.9g), not %08x (%.9g)\n", isa, op.name, kinds,
                    (long long)i, got, y, want, z);
        break;
      }
    }
  }
}

// Programs of random steps that write few registers again and again, as one that reuses registers does.
class RandomProgram : public Program {
 public:
  explicit RandomProgram(int count) {
    constants = {bits_of(0.5f), bits_of(-1.25f), 5};
    vectors_used = 8, scalars_used = 6;
    begin();
    for (int i = 0; i < count; i++) step();
    score = any(floats), slope = any(floats);
    for (int i = 0; i < 2; i++) {
      const int index = any(integers);
      loads.push_back({index < kScalars && drawn(2) ? index + kProgramRowIndex : index, any(floats)});
    }
  }

 private:
  static constexpr int kFive = kProgramFirstConstant + 2;
  std::vector<int> floats, integers;
  static int drawn(int n) {
    Array::random_state = Array::random_state * 6364136223846793005u + 1442695040888963407u;
    return int((Array::random_state >> 33) % uint64_t(n));
  }
  static int any(const std::vector<int>& of) { return of[size_t(drawn(int(of.size())))]; }
  void step() {
    static const char* const of_floats[] = {"add_f", "add_f", "sub_f", "mul_f", "mul_f", "tanh_f", "max_f", "neg_f"};
    static const char* const of_integers[] = {"sub_i", "sub_i", "add_i", "i2f", "i2f", "load_row_f", "load_f", "min_i"};
    const bool floating = drawn(2);
    const std::string name = (floating ? of_floats : of_integers)[drawn(8)];
    const ScoreOpFacts& op = kScoreOps[op_code(name)];
    ScoreStep s{op_code(name), 0, {-1, -1, -1}};
    bool scalar = !op.loads_row;
    for (int k = 0; k < op.operands; k++) {
      s.operands[k] = any(floating ? floats : integers);
      while (op.loads_row && s.operands[k] >= kScalars) s.operands[k] = any(integers);
      scalar &= s.operands[k] < kScalars;
    }
    // the register of a constant, of the batch element, of the head or of the row is written too
    s.dst = scalar && drawn(3) ? drawn(21) : kScalars + drawn(8);
    steps.push_back(s);
    const auto remove = [&](std::vector<int>& from) {
      from.erase(std::remove(from.begin(), from.end(), s.dst), from.end());
    };
    remove(floats), remove(integers);
    const bool result = floating || name == "i2f" || name == "load_row_f" || name == "load_f";
    (result ? floats : integers).push_back(s.dst);
    for (auto* of : {&floats, &integers})
      if (of->empty() || (of == &integers && std::none_of(of->begin(), of->end(), [](int r) { return r < kScalars; })))
        return begin();
  }
  // Also where a step has left no register to read.
  void begin() {
    steps.clear();
    floats = {kProgramFirstConstant, kProgramFirstConstant + 1, kProducts}, integers = {0, 1, 2, kFive, kKeys};
  }
};

inline void check_random_programs(const char* isa, Report& report) {
  const Array tables = Array::random(DType::f32, {90}), indices = Array::random(DType::i32, {40}, 0, 90);
  for (int trial = 0; trial < 1500; trial++) {
    const RandomProgram p(3 + trial % 14);
    MachineRun run(p, tables, indices, 1 + trial % 13, kMathLanes * (1 + trial % 9));
    const Array words = p.words();
    const char* fault = program_fault((const int32_t*)words.tensor.data, words.count(), 90, 40);
    report.checked++;
    if (fault) {
      report.failed++;
      std::printf("FAILED %s: random program %d %s\n", isa, trial, fault);
      continue;
    }
    for (const bool backward : {false, true}) {
      run.run(isa, backward);
      bool failed = false;
      for (int64_t i = 0; i < run.x.count() && !failed; i++) {
        const int64_t row = i / run.columns, column = i % run.columns, size = run.rows * run.columns;
        double largest = 1;  // of what steps made: where it is rounded or not, sums are off by a part of it
        const std::vector<int32_t> r = run.expected(row, column, &largest);
        if (!(largest < 1e6)) continue;
        const auto close = [&](const Array& got, int64_t at, int reg) {
          return std::fabs(got[at] - double(float_of_bits(r[size_t(reg)]))) <= 1e-4 * largest;
        };
        failed = !close(run.x, i, p.score) || (backward && !close(run.slopes, i, p.slope));
        for (int64_t l = 0; l < 2 && backward && !failed; l++) {
          const int index = p.loads[size_t(l)].index % kProgramRowIndex;
          failed |= !close(run.loads, 2 * l * size + i, p.loads[size_t(l)].derivative);
          failed |= run.bits(run.loads, (2 * l + 1) * size + (index < Program::kScalars ? row * run.columns : i)) !=
                    r[size_t(index)];
        }
        if (failed) std::printf("FAILED %s: random program %d, element %lld\n", isa, trial, (long long)i);
      }
      report.failed += failed;
    }
  }
}

// Programs that the machine would not survive, or that have no meaning.
inline void check_refusals(const char* isa, Report& report) {
  Program good;
  good.op("load_row_f", good.constant(int32_t(4)));
  good.score = good.op("add_f", Program::kProducts, Program::kScalars + 2);
  const Array words = good.words();
  const auto refused = [&](const char* what, const Array& given, int64_t tables = 4) {
    report.checked++;
    if (program_fault((const int32_t*)given.tensor.data, given.count(), tables, 0)) return;
    report.failed++;
    std::printf("FAILED %s: a program is not refused: %s\n", isa, what);
  };
  report.checked++;
  if (program_fault((const int32_t*)words.tensor.data, words.count(), 4, 0)) {
    report.failed++;
    std::printf("FAILED %s: a good program is refused\n", isa);
  }
  refused("no table", words, 0);
  const int64_t step = kProgramHeader + 1;
  const struct {
    const char* what;
    int64_t at;
    int32_t value;
  } faults[] = {{"version", 0, 2},
                {"more instructions than words", 1, 3},
                {"fewer instructions than words", 1, 1},
                {"negative instructions", 1, -1},
                {"too many instructions", 1, 1 << 30},
                {"few scalars", 2, 3},
                {"many scalars", 2, 1000},
                {"few vectors", 3, 1},
                {"many vectors", 3, 25},
                {"score", 4, 100},
                {"negative score", 4, -1},
                {"score that is not written", 4, Program::kScalars - 1},
                {"slope", 5, 100},
                {"slope that is not written", 5, Program::kScalars - 1},
                {"loads", 6, 1},
                {"negative loads", 6, -1},
                {"constants", 7, 1 << 30},
                {"negative constants", 7, -3},
                {"operation", step, int32_t(ScoreOp::count)},
                {"negative operation", step, -1},
                {"register", step + 1, Program::kScalars + 4},
                {"negative register", step + 1, -1},
                {"load of a row to a scalar", step + 1, 20},
                {"operand", step + 2, 1 << 20},
                {"negative operand", step + 2, -2},
                {"operand that is not written", step + 2, 21},
                {"vector as a row's index", step + 2, Program::kProducts},
                {"operand too many", step + 3, 0},
                {"operand too few", step + 5 + 3, -1},
                {"scalar of vectors", step + 5 + 1, 20}};
  for (const auto& fault : faults) {
    Array bad = words;
    bad.set(fault.at, fault.value);
    refused(fault.what, bad);
  }
  for (int64_t count : {0, 7, 8, 12}) {
    Array shorter(DType::i32, {count});
    for (int64_t i = 0; i < count; i++) shorter.set(i, words[i]);
    refused("cut off", shorter);
  }
  // words that mean anything
  for (int trial = 0; trial < 2000; trial++) {
    Array any = words;
    for (int i = 0; i < 3; i++) {
      const Array at = Array::random(DType::i32, {1}, 0, double(any.count())),
                  to = Array::random(DType::i32, {1}, -5, 60);
      any.set(int64_t(at[0]), to[0]);
    }
    if (program_fault((const int32_t*)any.tensor.data, any.count(), 4, 0)) continue;
    AttentionParams p;
    Array tables = Array::random(DType::f32, {4}), x = Array::random(DType::f32, {3, 16}), slopes = x;
    Array loads(DType::f32, {2 * limits::program_loads, 3, 16});
    p.program = any, p.tables = tables;
    program_runner(isa)({p, 3, 16, (float*)x.tensor.data, (float*)slopes.tensor.data, (float*)loads.tensor.data});
  }
  report.checked++;
}

inline void check_programs(const char* isa, Report& report) {
  check_operations(isa, report);
  check_random_programs(isa, report);
  check_refusals(isa, report);
}

}  // namespace checks
