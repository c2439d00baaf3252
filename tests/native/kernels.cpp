// Every kernel of every instruction set, without Python and torch: `kernel_check [ISA...]`, by default of all that this
// machine has. Statically linked it runs where there is nothing else, an emulator's initial file system for instance.
// The result is the exit status and the last line.
#include "attention_checks.h"
#include "row_checks.h"
#include "subnormal_checks.h"

using namespace checks;

static void check_attention(const KernelTable& kernels, Report& report) {
  struct Shape {
    int64_t batch, heads, kv_heads, rows, keys, head_dim, value_dim;
  };
  const Shape shapes[] = {
      {1, 2, 1, 70, 150, 64, 64}, {2, 2, 2, 7, 90, 40, 24}, {1, 4, 2, 1, 170, 128, 128}, {1, 1, 1, 33, 33, 129, 17}};
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16})
    for (int score = 0; score < 3; score++)
      for (const Shape& s : shapes)
        for (int mask = 0; mask < 7; mask++) {
          if (mask > 1 && s.head_dim != 64 && mask != 4) continue;
          Attention at({dtype, score, s.batch, s.heads, s.kv_heads, s.rows, s.keys, s.head_dim, s.value_dim, mask});
          at.check(kernels, report, 48, 64, 0);
          if (s.rows == 1) at.check(kernels, report, 48, 64, 8);
        }
}

static void check(const KernelTable& kernels, const KernelTable& baseline, Report& report) {
  report.isa = kernels.name;
  check_attention(kernels, report);
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    check_rows(kernels, baseline, report, dtype);
    check_ops(kernels, baseline, report, dtype);
  }
  check_vocab(kernels, baseline, report);
  check_subnormals(kernels, baseline, report);
}

int main(int argc, char** argv) {
  const char* names[8];
  int count = cpu::runnable(names, 8), failed = 0;
  if (argc > 1) {
    count = argc - 1 < 8 ? argc - 1 : 8;
    for (int i = 0; i < count; i++) names[i] = argv[i + 1];
  }
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
