// Every kernel of every instruction set, without Python and torch: `kernel_check [ISA...]`, by default of all that this
// machine has. Statically linked it runs where there is nothing else, an emulator's initial file system for instance.
// The result is the exit status and the last line. `kernel_check --phases [ISA...]` checks nothing: it prints what each
// phase of attention takes.
#include "attention_checks.h"
#include "linear_checks.h"
#include "math_checks.h"
#if defined(FASTATTN_PHASE_TIMES)
#include "phase_times.h"
#endif
#include "program_attention.h"
#include "program_checks.h"
#include "row_checks.h"
#include "scan_checks.h"
#include "subnormal_checks.h"

using namespace checks;

static void check_attention(const KernelTable& kernels, Report& report) {
  struct Shape {
    int64_t batch, heads, kv_heads, rows, keys, head_dim, value_dim;
  };
  const Shape shapes[] = {
      {1, 2, 1, 70, 150, 64, 64}, {2, 2, 2, 7, 90, 40, 24}, {1, 4, 2, 1, 170, 128, 128}, {1, 1, 1, 33, 33, 129, 17}};
  const Layout layouts[] = {Layout::contiguous, Layout::padded, Layout::heads_inside};
  const Cut cuts[] = {{}, {.block_q = 20, .pack_kib = 8, .threads = 3}, {.block_k = 100, .pack_kib = 1}};
  int number = 0;
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16})
    for (int score = 0; score < 3; score++)
      for (const Shape& s : shapes)
        for (int variant = 0; variant < 18; variant++) {
          const int mask = variant % 9;
          if (mask > 1 && s.head_dim != 64 && mask != 4) continue;
          const Layout layout = layouts[number % 3];
          Attention at({dtype, score, s.batch, s.heads, s.kv_heads, s.rows, s.keys, s.head_dim, s.value_dim, mask,
                        layout, variant >= 9});
          Cut cut = cuts[number++ % 4 % 3];
          at.check(kernels, report, cut);
          cut.decode_rows = mask > 6 ? 40 : 8;  // of the packed documents some are decoded, some are not
          if (s.rows == 1 || mask > 6) at.check(kernels, report, cut);
        }
}

// Whether a struct's list of fields leaves no room for another: the binding knows the listed ones only.
template <class Params>
static bool lists_every_field(Params params) {
  const char* const base = (const char*)&params;
  const char* end = base;
  bool whole = true;
  const auto next = [&](const auto& field) {
    const char* begin = (const char*)&field;
    whole &= begin >= end && size_t(begin - end) < alignof(decltype(field));
    end = begin + sizeof field;
  };
  params.fields([&](const char*, const auto&... field) { (next(field), ...); });
  return whole && size_t(base + sizeof params - end) < alignof(Params);
}

static void check_params(Report& report) {
#define KERNEL(name, Params)                                                              \
  report.checked++;                                                                       \
  if (!lists_every_field(Params{})) {                                                     \
    report.failed++;                                                                      \
    std::printf("FAILED: " #Params " has fields that are not listed, or not in order\n"); \
  }
#include "../../src/cpu/kernels.def"
#undef KERNEL
}

static void check(const KernelTable& kernels, const KernelTable& baseline, Report& report) {
  report.isa = kernels.isa;
  check_params(report);
  check_math(kernels.isa, report);
  check_programs(kernels.isa, report);
  check_program_attention(kernels, report);
  check_attention(kernels, report);
  const Variant variants[] = {{Layout::contiguous, 1}, {Layout::padded, 3}, {Layout::heads_inside, 2}};
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16})
    for (const Variant& v : variants) {
      if (v.threads < int(dtype) + 1) continue;  // f32 every way, f16 one
      check_rows(kernels, baseline, report, dtype, v);
      const bool packed = v.threads == 3, twice = v.threads == 1;
      const int64_t length = packed ? 131 : twice ? 50 : 101;
      check_heads(kernels, baseline, report, {dtype, v, packed, twice ? 2 : 1, 4, 2, length, length, 64, 48});
      check_heads(kernels, baseline, report, {dtype, v, false, 1, 3, 1, 2, 170, 33, 17});
      check_sinkhorn(kernels, baseline, report, dtype, v.threads);
      check_vocab(kernels, baseline, report, dtype, v);
      check_linear_attention(kernels, baseline, report, dtype, v);
      check_scans(kernels, baseline, report, dtype, v);
    }
  for (const Variant& v : variants) check_classes(kernels, baseline, report, v);
  // a few rows of one key head, whose keys are shared out to more threads than there are heads
  check_heads(kernels, baseline, report, {DType::f32, {Layout::padded, 4}, false, 1, 2, 1, 1, 2100, 40, 24});
  check_peak(kernels, report);
  check_subnormals(kernels, baseline, report);
}

static int print_phases([[maybe_unused]] const char** names, [[maybe_unused]] int count) {
#if defined(FASTATTN_PHASE_TIMES)
  for (int i = 0; i < count; i++) {
    if (!cpu::select(names[i])) return std::printf("no %s here\n", names[i]), 2;
    print_phases(cpu::kernels());
  }
  return 0;
#else
  return std::printf("a build with sanitizers has no phases to time\n"), 2;
#endif
}

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);  // a sanitizer's report ends the program
  const char* names[8];
  const bool phases = argc > 1 && std::strcmp(argv[1], "--phases") == 0;
  if (phases) argc--, argv++;
  int count = cpu::runnable(names, 8), failed = 0;
  if (argc > 1) {
    count = argc - 1 < 8 ? argc - 1 : 8;
    for (int i = 0; i < count; i++) names[i] = argv[i + 1];
  }
  if (phases) return print_phases(names, count);
  cpu::select("baseline");
  const KernelTable& baseline = cpu::kernels();
  for (int i = 0; i < count; i++) {
    if (!cpu::select(names[i])) return std::printf("no %s here\n", names[i]), 2;
    Report report;
    check(cpu::kernels(), baseline, report);
    std::printf("%s: %d results, %d failed, the nearest at %.2f of its bound\n", names[i], report.checked,
                report.failed, report.nearest);
    std::fflush(stdout);
    failed += report.failed;
  }
  std::printf("%s\n", failed ? "FAILED" : "passed");
  return failed != 0;
}
