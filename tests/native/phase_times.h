// `kernel_check --phases`: what each phase of attention takes beside the multiply-adds that it is made of, so that an
// instruction sequence that costs a third of the time is seen at a glance.
#pragma once
#include <algorithm>
#include <chrono>
#include <functional>
#include <string>

#include "arrays.h"
#include "phases.h"

FASTATTN_PHASES(baseline)
#if defined(FASTATTN_HAS_AVX2)
FASTATTN_PHASES(avx2)
#endif
#if defined(FASTATTN_HAS_AVX512)
FASTATTN_PHASES(avx512)
#endif
#if defined(FASTATTN_HAS_AVX512BF16)
FASTATTN_PHASES(avx512bf16)
#endif

namespace checks {

struct PhasesOf {
  const char* isa;
  int (*run)(const AttentionParams&, TimeOf, void*, Phase*);
  int lanes;
};

inline PhasesOf phases_of(const std::string& isa) {
  const PhasesOf all[] = {
#if defined(FASTATTN_HAS_AVX2)
      {"avx2", avx2::attention_phases, avx2::vector_floats},
#endif
#if defined(FASTATTN_HAS_AVX512)
      {"avx512", avx512::attention_phases, avx512::vector_floats},
#endif
#if defined(FASTATTN_HAS_AVX512BF16)
      {"avx512bf16", avx512bf16::attention_phases, avx512bf16::vector_floats},
#endif
      {"baseline", baseline::attention_phases, baseline::vector_floats},
  };
  return *std::find_if(std::begin(all), std::end(all), [&](const PhasesOf& x) { return x.isa == isa; });
}

// Counts time in multiply-adds of vectors at their peak, of bf16 pairs where there are such.
class MultiplyAdds {
 public:
  bool pairs;

  MultiplyAdds(const KernelTable& kernels, bool bf16, int lanes) : kernels_(kernels) {
    p_.sink = sink_, p_.operations = operations_, p_.iterations = 2000, p_.bf16 = bf16;
    kernels.peak(p_);
    pairs = bf16 && operations_[0] > 0;
    if (bf16 && !pairs) p_.bf16 = 0, kernels.peak(p_);
    count_ = operations_[0] / (2.0 * lanes * (pairs ? 2 : 1)) * double(p_.iterations);
  }
  // The median of many runs, each beside one of the peak: the clock changes with what has run.
  double of(const std::function<void()>& f) {
    const auto begin = Clock::now();
    std::vector<double> taken;
    f();
    while (taken.size() < 9 || seconds(begin) < 0.05) {
      kernels_.peak(p_);  // its code is back in the cache
      const double one = seconds_of([&] { kernels_.peak(p_); }) / count_;
      taken.push_back(seconds_of(f) / one);
    }
    std::nth_element(taken.begin(), taken.begin() + taken.size() / 2, taken.end());
    return taken[taken.size() / 2];
  }

 private:
  using Clock = std::chrono::steady_clock;
  static double seconds(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }
  static double seconds_of(const std::function<void()>& f) {
    const auto begin = Clock::now();
    f();
    return seconds(begin);
  }
  const KernelTable& kernels_;
  Array sink_{DType::f32, {1}}, operations_{DType::i64, {1}};
  PeakParams p_;
  double count_;
};

// A line a phase, for a vector of scores: the multiply-adds' time that it takes, how many it is made of, their share.
inline void print_phases(const KernelTable& kernels, DType dtype, int score, int64_t D, bool backward) {
  constexpr int64_t L = 2048;
  const PhasesOf phases = phases_of(kernels.isa);
  const auto random = [&] { return Array::random(dtype, {1, 1, L, D}); };
  Array q = random(), k = random(), v = random(), grad = random();
  Array out(dtype, {1, 1, L, D}), dq(dtype, {1, 1, L, D}), dk(dtype, {1, 1, L, D}), dv(dtype, {1, 1, L, D});
  Array lse(DType::f32, {1, 1, L}), state(DType::f32, {1, 1, L, 2});
  AttentionParams p;
  p.q = q, p.k = k, p.v = v, p.out = out, p.scale = 1 / std::sqrt(double(D)), p.score = score;
  if (score == 0) p.lse = lse, p.state = state;
  p.default_bias = score == 1;
  kernels.attention_forward(p);
  MultiplyAdds count(kernels, dtype == DType::bf16, phases.lanes);
  // the tiles of fastattn/ops/attention/tuning.py where the second cache has 1 MiB
  p.block_q = 192, p.block_k = backward ? 192 : count.pairs || phases.lanes < 16 ? 256 : 128;
  if (backward) p.grad_out = grad, p.grad_q = dq, p.grad_k = dk, p.grad_v = dv;

  std::printf("%s %s %s, %s, head dim %d, tile %d x %d\n", kernels.isa, backward ? "backward" : "forward",
              dtype == DType::bf16 ? "bf16" : "fp32", score == 0 ? "softmax" : "sigmoid", int(D), int(p.block_q),
              int(p.block_k));
  const double steps = double(D) / (count.pairs ? 2 : 1);
  const auto line = [&](const char* name, double taken, double ideal) {
    std::printf("  %-18s %7.1f", name, taken);
    if (ideal > 0) std::printf(" of %4.0f  %5.1f %%", ideal, 100 * ideal / taken);
    std::printf("\n");
  };
  Phase found[kMostPhases];
  const TimeOf time_of = [](void* timer, void (*run)(void*), void* context) {
    return ((MultiplyAdds*)timer)->of([&] { run(context); });
  };
  const int n = phases.run(p, time_of, &count, found);
  double sum = 0, ideal = 0;
  for (int i = 0; i < n; i++) {
    line(found[i].name, found[i].time, found[i].multiplies ? steps : 0);
    sum += found[i].time;
    ideal += found[i].multiplies ? steps : 0;
  }
  line("together", sum, ideal);
  const auto call = [&] { backward ? kernels.attention_backward(p) : kernels.attention_forward(p); };
  line("the whole call", count.of(call) / (double(L) * double(L) / phases.lanes), ideal);
}

inline void print_phases(const KernelTable& kernels) {
  for (const DType dtype : {DType::bf16, DType::f32})
    for (const int64_t head_dim : {64, 128})
      for (int score = 0; score < 2; score++)
        for (const bool backward : {false, true}) print_phases(kernels, dtype, score, head_dim, backward);
}

}  // namespace checks
