// The other kernels: each instruction set's results against the baseline's, whose tests are against the definitions.
//
// Inputs are positive where sums are taken, so that no result is much smaller than what it is the sum of, and the error
// of n roundings of u is below n u of the largest result. Products of bf16 are exact in float32; what becomes bf16 on
// its way (weights, gradients of scores, rows that were scaled) brings 2^-8 of itself.
#pragma once
#include <functional>
#include <string>

#include "arrays.h"

namespace checks {

using Outputs = std::vector<Array>;
using Run = std::function<void(const KernelTable&, Outputs&)>;

// Two runs may differ by `roundings` in float32 and one in the outputs' own dtype.
inline void same(const KernelTable& kernels, const KernelTable& baseline, Report& report, const std::string& name,
                 double roundings, double half, const Run& run) {
  Outputs got, expected;
  run(baseline, expected), run(kernels, got);
  for (size_t n = 0; n < got.size(); n++) {
    double largest = 0;
    for (int64_t i = 0; i < expected[n].count(); i++)
      if (std::isfinite(expected[n][i])) largest = std::fmax(largest, std::fabs(expected[n][i]));
    const double bound = largest * (roundings * 0x1p-24 + half + 2 * unit(expected[n].tensor.dtype));
    report.compare((name + ", output " + std::to_string(n)).c_str(), got[n], [&](int64_t i) { return expected[n][i]; },
                   [&](int64_t) { return bound; });
  }
}

inline void check_rows(const KernelTable& kernels, const KernelTable& baseline, Report& report, DType dtype) {
  const std::string of = " dtype " + std::to_string(int(dtype));
  const auto check = [&](const char* name, double roundings, double half, const Run& run) {
    same(kernels, baseline, report, name + of, roundings, half, run);
  };
  const DType f32 = DType::f32;
  const double half = dtype == DType::bf16 ? 0x1p-8 : dtype == DType::f16 ? 0x1p-10 : 0;
  for (const int64_t C : {5, 64, 203}) {
    const int64_t R = 7;
    Array x = Array::random(dtype, {R, C}), y = Array::random(dtype, {R, C}), g = Array::random(dtype, {R, C}),
          w = Array::random(dtype, {C}), rstd = Array::random(f32, {R, 1}, 0.5, 2);
    check("rms_norm", 2 * C + 16, 2 * half, [&](const KernelTable& t, Outputs& o) {
      o = {Array(dtype, {R, C}), Array(dtype, {R, C}), Array(f32, {R, 1})};
      RmsNormParams p;
      p.x = x, p.residual = y, p.weight = w, p.normed = o[0], p.total = o[1], p.rstd = o[2];
      t.rms_norm(p);
    });
    check("rms_norm_backward", 8 * C + 32, 2 * half, [&](const KernelTable& t, Outputs& o) {
      o = {Array(dtype, {R, C}), Array::full(f32, {1, C}, 0)};
      RmsNormBackwardParams p;
      p.grad_normed = g, p.total = x, p.weight = w, p.rstd = rstd, p.grad = o[0], p.weight_partials = o[1];
      t.rms_norm_backward(p);
    });
    for (int kind = 0; kind < 2; kind++) {
      check(kind ? "gated" : "swiglu", 32, half / 8, [&](const KernelTable& t, Outputs& o) {
        o = {Array(dtype, {R, C})};
        GateParams p;
        p.a = x, p.b = y, p.out = o[0];
        (kind ? t.gated : t.swiglu)(p);
      });
      check(kind ? "gated_backward" : "swiglu_backward", 64, half / 4, [&](const KernelTable& t, Outputs& o) {
        o = {Array(dtype, {R, C}), Array(dtype, {R, C})};
        GateParams p;
        p.a = x, p.b = y, p.grad_out = g, p.grad_a = o[0], p.grad_b = o[1];
        (kind ? t.gated_backward : t.swiglu_backward)(p);
      });
    }
  }
  for (const int64_t D : {8, 64, 36}) {
    Array x = Array::random(dtype, {2, 3, 5, D}), cos = Array::random(f32, {9, D / 2}),
          sin = Array::random(f32, {9, D / 2}), rows = Array::random(DType::i32, {2, 1, 1, 5}, 0, 9);
    check("rotary", 8, 0, [&](const KernelTable& t, Outputs& o) {
      o = {Array(dtype, {2, 3, 5, D})};
      RotaryParams p;
      p.x = x, p.out = o[0], p.cos = cos, p.sin = sin, p.rows = rows;
      t.rotary(p);
    });
  }
  for (const int64_t M : {1, 3, 8})
    for (const int64_t K : {70, 256}) {
      const int64_t N = 37;
      Array x = Array::random(dtype, {M, K}, 0, 1), w = Array::random(dtype, {N, K}, 0, 1);
      check("matvec", 2 * K, 0, [&](const KernelTable& t, Outputs& o) {
        o = {Array(dtype, {M, N})};
        MatvecParams p;
        p.x = x, p.weight = w, p.out = o[0];
        t.matvec(p);
      });
    }
  for (const int64_t M : {5, 100})
    for (const int64_t K : {48, 130})
      for (int kind = 0; kind < 4; kind++) {  // plain, norm and residual, gated pairs of outputs, transposed
        const int64_t N = 150, parts = kind == 2 ? 2 : 1;
        Array x = kind == 3 ? Array::random(dtype, {K, M}, 0, 1) : Array::random(dtype, {M, 1, 1, K}, 0, 1);
        Array w = Array::random(dtype, {parts * N, K}, 0, 0.1), residual = Array::random(dtype, {M, N}, 0, 1);
        check("linear", 2 * K + 64, kind == 1 ? 2 * half : 0, [&](const KernelTable& t, Outputs& o) {
          PackParams pack;
          Array bytes(DType::i64, {1});
          pack.source = w, pack.parts = int(parts), pack.bytes = bytes;
          t.pack(pack);
          Array packed(DType::u8, {int64_t(bytes[0])});
          pack.packed = packed;
          t.pack(pack);
          o = {Array(dtype, {M, N})};
          LinearParams p;
          p.x = x, p.packed = packed, p.out = o[0], p.transposed = kind == 3, p.gated_up = kind == 2;
          if (kind == 1) {
            o.push_back(Array(f32, {M}));
            p.norm = 1, p.eps = 1e-6, p.rstd = o[1], p.residual = residual, p.out = o[0];
          }
          t.linear(p);
        });
      }
}

inline void check_ops(const KernelTable& kernels, const KernelTable& baseline, Report& report, DType dtype) {
  const std::string of = " dtype " + std::to_string(int(dtype));
  const auto check = [&](const char* name, double roundings, double half, const Run& run) {
    same(kernels, baseline, report, name + of, roundings, half, run);
  };
  const DType f32 = DType::f32;
  const int64_t H = 4, Hkv = 2, L = 131, D = 64, Dv = 48, G = 8;
  const double half = dtype == DType::bf16 ? 0x1p-8 : 0;
  Array q = Array::random(dtype, {1, H, L, D}), k = Array::random(dtype, {1, Hkv, L, D}),
        v = Array::random(dtype, {1, Hkv, L, Dv}, 0.5, 1), g = Array::random(dtype, {1, H, L, Dv}, 0.5, 1);
  const auto base = [&](AttentionParams& p) {
    p.q = q, p.k = k, p.v = v, p.scale = 0.125, p.causal = 1, p.block_q = 48, p.block_k = 64;
  };
  // forward, then backward from the baseline's own results, so that both start from the same ones
  const auto gradients = [&](AttentionParams& p, Outputs& o) {
    o.clear();
    o.push_back(Array(dtype, {1, H, L, D})), o.push_back(Array(dtype, {1, Hkv, L, D})),
        o.push_back(Array(dtype, {1, Hkv, L, Dv}));
    p.grad_out = g, p.grad_q = o[0], p.grad_k = o[1], p.grad_v = o[2];
  };
  // Weights may be raised to a power, and dS is a difference of numbers of dO V^T's size: Dv of at most 1.
  for (const double power : {0.0, 3.0, 15.0}) {
    Array out(dtype, {1, H, L, Dv}), statistics(f32, {1, H, L, 3});
    ReweightedParams first;
    base(first), first.power = power ? power : 1, first.reweigh = power != 0;
    first.out = out, first.statistics = statistics;
    baseline.reweighted_forward(first);
    check("softplus attention", 64 * D * (1 + power), half, [&](const KernelTable& t, Outputs& o) {
      o = {Array(dtype, {1, H, L, Dv})};
      Array s(f32, {1, H, L, 3});
      ReweightedParams p = first;
      p.out = o[0], p.statistics = s;
      t.reweighted_forward(p);
    });
    check("softplus attention backward", 64 * D * Dv * (1 + power), 8 * half, [&](const KernelTable& t, Outputs& o) {
      ReweightedParams p = first;
      gradients(p, o);
      t.reweighted_backward(p);
    });
  }
  {
    Array groups = Array::random(DType::i64, {1, L}, 1, 4), out(dtype, {1, H, L, Dv}), lse(f32, {1, H, L});
    GroupedParams first;
    base(first), first.groups = groups, first.key_groups = groups, first.window = 16, first.out = out, first.lse = lse;
    baseline.grouped_forward(first);
    check("grouped attention", 64 * D, half, [&](const KernelTable& t, Outputs& o) {
      o = {Array(dtype, {1, H, L, Dv}), Array(f32, {1, H, L})};
      GroupedParams p = first;
      p.out = o[0], p.lse = o[1];
      t.grouped_forward(p);
    });
    check("grouped attention backward", 64 * D * Dv, half, [&](const KernelTable& t, Outputs& o) {
      GroupedParams p = first;
      gradients(p, o);
      t.grouped_backward(p);
    });
  }
  for (int gate = 0; gate < 2; gate++) {
    Array a = Array::random(f32, {1, L, G}, 0, 0.5), sharpness = Array::full(f32, {1}, 2), out(dtype, {1, H, L, Dv}),
          lse(f32, {1, H, L});
    GatedParams first;
    base(first), first.assignment = a, first.sharpness = sharpness, first.window = 16, first.gate = gate;
    first.out = out, first.lse = lse;
    baseline.gated_attention_forward(first);
    check("gated attention", 64 * D, half, [&](const KernelTable& t, Outputs& o) {
      o = {Array(dtype, {1, H, L, Dv}), Array(f32, {1, H, L})};
      GatedParams p = first;
      p.out = o[0], p.lse = o[1];
      t.gated_attention_forward(p);
    });
    check("gated attention backward", 64 * D * Dv, half, [&](const KernelTable& t, Outputs& o) {
      GatedParams p = first;
      gradients(p, o);
      Array by_query = Array::full(f32, {1, H, L, G}, 0), by_key = Array::full(f32, {1, Hkv, L, G}, 0),
            by_row = Array::full(f32, {1, H, L}, 0);
      p.grad_query_assignment = by_query, p.grad_key_assignment = by_key, p.grad_sharpness = by_row;
      t.gated_attention_backward(p);
    });
  }
  for (int causal = 0; causal < 2; causal++) {
    Array scores = Array::random(dtype, {L, G}), gradient = Array::random(dtype, {L, G}),
          begins = Array::full(DType::i64, {1}, 0), counts = Array::full(DType::i64, {1}, double(L));
    for (int backward = 0; backward < 2; backward++)
      check(backward ? "sinkhorn backward" : "sinkhorn", 64 * 10 * L, 0, [&](const KernelTable& t, Outputs& o) {
        o = {Array(dtype, {L, G})};
        Array potentials(f32, {1, G});
        SinkhornParams p;
        p.scores = scores, p.begins = begins, p.counts = counts, p.out = o[0], p.causal = causal, p.temperature = 0.5;
        if (backward)
          p.grad = gradient, t.sinkhorn_backward(p);
        else
          p.potentials = potentials, t.sinkhorn_forward(p);
      });
  }
}

inline void check_vocab(const KernelTable& kernels, const KernelTable& baseline, Report& report) {
  const DType f32 = DType::f32;
  const int64_t R = 6, C = 211, K = 37, D = 70;
  Array logits = Array::random(f32, {R, C}, -4, 4), bias = Array::random(f32, {C}),
        target = Array::random(DType::i64, {R}, 0, C), gradient = Array::full(f32, {R}, 0.25),
        x = Array::random(f32, {R, D}, 0, 1), book = Array::random(f32, {K, D}, 0, 1),
        codes = Array::random(DType::i64, {C}, 0, K), scores = Array::random(f32, {R, K}, 0, 1);
  for (int stablemax = 0; stablemax < 2; stablemax++)
    same(kernels, baseline, report, "vocabulary rows", 64 + C, 0, [&](const KernelTable& t, Outputs& o) {
      o = {logits, Array::full(f32, {R}, -INFINITY), Array::full(f32, {R}, 0), Array::full(f32, {R}, 0),
           Array(f32, {R, C})};
      VocabRowsParams p;
      p.x = o[0], p.out = o[4], p.bias = bias, p.target = target, p.row_max = o[1], p.row_sum = o[2], p.picked = o[3];
      p.grad = gradient, p.statistics = p.gradient = 1, p.stablemax = stablemax, p.ignore_index = -100;
      t.vocab_rows(p);
    });
  same(kernels, baseline, report, "vocabulary dots", 2 * D, 0, [&](const KernelTable& t, Outputs& o) {
    o = {Array(f32, {R, K}), Array(f32, {K})};
    VocabDotsParams p;
    p.x = x, p.codebook = book, p.out = o[0], p.squares = o[1];
    t.vocab_dots(p);
  });
  same(kernels, baseline, report, "vocabulary expand and collect", 2 * C, 0, [&](const KernelTable& t, Outputs& o) {
    o = {Array(f32, {R, C}), Array::full(f32, {R, K}, 0)};
    VocabExpandParams p;
    p.scores = scores, p.codes = codes, p.bias = bias, p.logits = o[0];
    t.vocab_expand(p);
    p.scores = o[1];
    t.vocab_collect(p);
  });
}

}  // namespace checks
