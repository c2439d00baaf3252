// Stored subnormals: every kernel that stores 16-bit values is given such inputs that what it stores is subnormal, and
// has to store the baseline's values to within one unit of the type's subnormals. A kernel that flushed them would
// store zeros.
//
// VDPBF16PS flushes the factors and sums of products (tile.h), not what is stored: inputs are such that no factor and
// no sum of a product is subnormal, and the results become so by what follows, a row's sum or the scale. Only where
// nothing follows a product (attention's values' gradient, sigmoid's output, a few rows' product) may they be lost on
// an instruction set that has it.
#pragma once
#include <functional>
#include <string>

#include "row_checks.h"

namespace checks {

struct Subnormals {
  const KernelTable &kernels, &baseline;
  Report& report;
  DType dtype;
  double normal, unit;  // the type's smallest normal number, and its smallest number

  Subnormals(const KernelTable& kernels, const KernelTable& baseline, Report& report, DType dtype)
      : kernels(kernels),
        baseline(baseline),
        report(report),
        dtype(dtype),
        normal(dtype == DType::bf16 ? 0x1p-126 : 0x1p-14),
        unit(dtype == DType::bf16 ? 0x1p-133 : 0x1p-24) {}

  Array random(std::initializer_list<int64_t> shape, double size) const {
    return Array::random(dtype, shape, size / 2, size);
  }
  Array zeros(std::initializer_list<int64_t> shape) const { return Array::full(dtype, shape, 0); }
  // (rows, columns) with one value of [size, 2 size) in each column.
  Array sparse(int64_t heads, int64_t rows, int64_t columns, double size) const {
    Array a = zeros({1, heads, rows, columns});
    for (int64_t h = 0; h < heads; h++)
      for (int64_t j = 0; j < columns; j++)
        a.set((h * rows + j * 7 % rows) * columns + j, size * (1 + double(j % 64) / 64));
    return a;
  }

  // All 16-bit outputs; `flushed`: may be lost in this one's products. 32-bit ones are not compared.
  void check(const char* name, const Run& run, const std::function<double(size_t)>& flushed = nullptr) const {
    Outputs got, expected;
    run(baseline, expected), run(kernels, got);
    for (size_t n = 0; n < got.size(); n++) {
      if (got[n].tensor.dtype != dtype) continue;
      const std::string what =
          std::string("subnormals, ") + name + " dtype " + std::to_string(int(dtype)) + ", output " + std::to_string(n);
      int64_t subnormal = 0;
      for (int64_t i = 0; i < expected[n].count(); i++)
        subnormal += std::fabs(expected[n][i]) > 4 * unit && std::fabs(expected[n][i]) < normal;
      if (!subnormal) {  // of a size that shows when it is flushed
        report.failed++;
        std::printf("FAILED %s: %s: the baseline stores no subnormal\n", report.isa, what.c_str());
        continue;
      }
      const double lost = flushed ? flushed(n) : 0;
      report.compare(
          what.c_str(), got[n], [&](int64_t i) { return expected[n][i]; },
          [&](int64_t i) {
            return unit + lost + std::fabs(expected[n][i]) * (dtype == DType::bf16 ? 0x1p-7 : 0x1p-10);
          });
    }
  }
  bool has_dots() const { return dtype == DType::bf16 && std::string(kernels.isa) == "avx512bf16"; }

  void rows() const {
    const DType f32 = DType::f32;
    for (const int64_t C : {5, 64, 203}) {
      const int64_t R = 7;
      Array x = random({R, C}, normal / 2), y = random({R, C}, normal / 4), one = random({R, C}, 1),
            w = Array::full(dtype, {C}, 0.75), zero = zeros({R, C}), rstd = Array::full(f32, {R, 1}, 0.5);
      check("rms_norm", [&](const KernelTable& t, Outputs& o) {
        o = {Array(dtype, {R, C}), Array(dtype, {R, C}), Array(f32, {R, 1})};
        RmsNormParams p;
        p.x = x, p.residual = y, p.weight = w, p.normed = o[0], p.total = o[1], p.rstd = o[2], p.eps = 4;
        t.rms_norm(p);
      });
      check("rms_norm_backward", [&](const KernelTable& t, Outputs& o) {
        o = {Array(dtype, {R, C}), Array::full(f32, {1, C}, 0)};
        RmsNormBackwardParams p;
        p.grad_normed = x, p.total = zero, p.weight = w, p.rstd = rstd, p.grad = o[0], p.weight_partials = o[1];
        t.rms_norm_backward(p);
      });
      for (int kind = 0; kind < 2; kind++) {
        check(kind ? "gated" : "swiglu", [&](const KernelTable& t, Outputs& o) {
          o = {Array(dtype, {R, C})};
          GateParams p;
          p.a = one, p.b = x, p.out = o[0];
          (kind ? t.gated : t.swiglu)(p);
        });
        check(kind ? "gated_backward" : "swiglu_backward", [&](const KernelTable& t, Outputs& o) {
          o = {Array(dtype, {R, C}), Array(dtype, {R, C})};
          GateParams p;
          p.a = one, p.b = one, p.grad_out = x, p.grad_a = o[0], p.grad_b = o[1];
          (kind ? t.gated_backward : t.swiglu_backward)(p);
        });
      }
    }
    for (const int64_t D : {8, 64, 36, 140}) {
      Array x = random({2, 3, 5, D}, normal / 2), cos = Array::full(f32, {1, D / 2}, 0.6),
            sin = Array::full(f32, {1, D / 2}, -0.3), which = Array::full(DType::i32, {2, 1, 1, 5}, 0);
      check("rotary", [&](const KernelTable& t, Outputs& o) {
        o = {Array(dtype, {2, 3, 5, D})};
        RotaryParams p;
        p.x = x, p.out = o[0], p.cos = cos, p.sin = sin, p.rows = which;
        t.rotary(p);
      });
    }
    const int64_t G = 8, L = 131;
    Array scores = Array::random(dtype, {L, G}), gradient = Array::random(dtype, {L, G}, -8 * normal, 8 * normal),
          begins = Array::full(DType::i64, {1}, 0), counts = Array::full(DType::i64, {1}, double(L));
    for (int causal = 0; causal < 2; causal++)
      check("sinkhorn_backward", [&](const KernelTable& t, Outputs& o) {
        o = {Array(dtype, {L, G})};
        SinkhornParams p;
        p.scores = scores, p.begins = begins, p.counts = counts, p.out = o[0], p.causal = causal, p.temperature = 0.5;
        p.grad = gradient, t.sinkhorn_backward(p);
      });
  }

  void products() const {
    const int64_t N = 150;
    for (const int64_t M : {1, 3, 8}) {
      const int64_t K = 70;
      Array x = random({M, K}, 0x1p-4), w = random({N, K}, normal / 16);
      check(
          "matvec",
          [&](const KernelTable& t, Outputs& o) {
            o = {Array(dtype, {M, N})};
            MatvecParams p;
            p.x = x, p.weight = w, p.out = o[0], p.dot = 1;
            t.matvec(p);
          },
          [&](size_t) { return M > 1 && has_dots() ? double(K) * 3 * 0x1p-126 : 0; });
    }
    // a normalised row times weights of the smallest normal numbers: sums are normal, rstd = 1 / 8 makes them subnormal
    const int64_t M = 33, K = 48;
    for (int kind = 0; kind < 2; kind++) {
      const int64_t parts = kind ? 2 : 1;
      Array x = zeros({M, 1, 1, K}), w = random({parts * N, K}, 2 * normal), residual = random({M, N}, normal / 4);
      for (int64_t i = 0; i < M; i++) x.set(i * K, 1);
      if (kind)  // gate | up: the up half is large, so that their product is subnormal and no less
        for (int64_t i = N * K; i < 2 * N * K; i++) w.set(i, 8);
      check(kind ? "linear with SwiGLU" : "linear", [&](const KernelTable& t, Outputs& o) {
        PackParams pack;
        Array bytes(DType::i64, {1});
        pack.source = w, pack.parts = int(parts), pack.bytes = bytes;
        t.pack(pack);
        Array packed(DType::u8, {int64_t(bytes[0])});
        pack.packed = packed;
        t.pack(pack);
        o = {Array(dtype, {M, N})};
        Array rstd(DType::f32, {M});
        LinearParams p;
        p.x = x, p.packed = packed, p.gated_up = kind, p.norm = 1, p.eps = 64 - 1.0 / K, p.rstd = rstd;
        if (kind)
          o.push_back(Array(dtype, {M, 2 * N})), p.product = o[1];
        else
          p.residual = residual;
        p.out = o[0];
        t.linear(p);
      });
    }
  }

  // One layer a stack, one call each: the norm's epsilon makes rows small, and with them keys and values.
  void decode() const {
    const int64_t B = 3, C = 32, H = 2, D = 16, I = 40, capacity = 9, calls = 2;
    const bool wide = dtype == DType::bf16;  // its subnormals are too small for one rstd
    Array z_h = random({B, C}, wide ? 0x1p-66 : 1), z_l = random({B, C}, wide ? 0x1p-66 : 1);
    Array weights(DType::i64, {2, 4}),
        positions = Array::full(DType::i32, {B}, 4), lengths = Array::full(DType::i32, {B}, 5),
        cos = Array::full(DType::f32, {1, D / 2}, 0.6), sin = Array::full(DType::f32, {1, D / 2}, -0.3),
        which = Array::full(DType::i32, {B, 1}, 0);
    std::vector<Array> matrices;
    for (int stack = 0; stack < 2; stack++) {
      matrices.push_back(random({4 * H * D, C}, 0x1p-4)), matrices.push_back(random({C, H * D}, 0x1p-4));
      matrices.push_back(random({2 * I, C}, 0x1p-4)), matrices.push_back(random({C, I}, 0x1p-4));
    }
    for (size_t i = 0; i < matrices.size(); i++) {
      const Tensor matrix = matrices[i];
      memcpy((int64_t*)Tensor(weights).data + i, &matrix.data, sizeof(int64_t));
    }
    check("decode_step", [&](const KernelTable& t, Outputs& o) {
      o = {Array(dtype, {B, C}), zeros({calls * B, H, capacity, D}), zeros({calls * B, H, capacity, D})};
      DecodeStepParams p;
      p.z_h = z_h, p.z_l = z_l, p.out = o[0], p.weights = weights, p.keys = o[1], p.values = o[2];
      p.positions = positions, p.lengths = lengths, p.cos = cos, p.sin = sin, p.rows = which;
      p.layers = 1, p.inner = I, p.longest = 5, p.eps = wide ? 0x1p126 : 0x1p34;
      t.decode_step(p);
    });
  }

  // Queries of zero: all scores are equal, and no weight is small. A column of values has one that is not zero.
  void attention() const {
    const DType f32 = DType::f32;
    const int64_t H = 4, Hkv = 2, L = 128, D = 64, Dv = 48, G = 8;
    Array q = zeros({1, H, L, D}), k = Array::random(dtype, {1, Hkv, L, D}), v = sparse(Hkv, L, Dv, 16 * normal);
    const auto base = [&](AttentionParams& p, Outputs& o, Array& state) {
      o = {Array(dtype, {1, H, L, Dv})};
      state = Array(f32, {1, H, L, 2});
      p.q = q, p.k = k, p.v = v, p.scale = 0.125, p.block_q = 48, p.block_k = 64, p.out = o[0], p.state = state;
    };
    for (int score = 0; score < 3; score++)
      check(
          score == 0   ? "softmax attention"
          : score == 1 ? "sigmoid attention"
                       : "softplus attention",
          [&](const KernelTable& t, Outputs& o) {
            AttentionParams p;
            Array state, lse(f32, {1, H, L});
            base(p, o, state), p.lse = lse, p.score = score, p.default_bias = score == 1, p.decode_rows = 0;
            t.attention_forward(p);
          },
          [&](size_t) { return score == 1 && has_dots() ? double(L) * 3 * 0x1p-126 : 0; });
    {
      Array row = zeros({1, H, 1, D});
      check("decoding", [&](const KernelTable& t, Outputs& o) {
        o = {Array(dtype, {1, H, 1, Dv})};
        Array lse(f32, {1, H, 1}), state(f32, {1, H, 1, 2});
        AttentionParams p;
        p.q = row, p.k = k, p.v = v, p.scale = 0.125, p.out = o[0], p.lse = lse, p.state = state, p.chunk_k = 64;
        t.attention_forward(p);
      });
    }
    // Weights are 1 / 128 and so is dS: the first column of values and of the gradient is 1. Keys and queries make
    // sums of 8 times the smallest normal number, which the scale makes subnormal.
    {
      Array sparse_q = sparse(H, L, D, 0x1p10 * normal), sparse_k = sparse(Hkv, L, D, 0x1p10 * normal),
            first = zeros({1, Hkv, L, Dv}), grad = sparse(H, L, Dv, 16 * normal), out = zeros({1, H, L, Dv}),
            lse = Array::full(f32, {1, H, L}, std::log(double(L))), state = Array::full(f32, {1, H, L, 2}, 0);
      for (int64_t i = 0; i < H * L; i++) state.set(2 * i + 1, std::log(double(L)));
      for (int64_t i = 0; i < Hkv * L; i++) first.set(i * Dv, 1);
      for (int64_t i = 0; i < H * L; i++) grad.set(i * Dv, 1);
      check(
          "attention_backward",
          [&](const KernelTable& t, Outputs& o) {
            o.clear();
            o.push_back(Array(dtype, {1, H, L, D})), o.push_back(Array(dtype, {1, Hkv, L, D}));
            o.push_back(Array(dtype, {1, Hkv, L, Dv}));
            AttentionParams p;
            p.q = sparse_q, p.k = sparse_k, p.v = first, p.out = out, p.lse = lse, p.state = state;
            p.grad_out = grad, p.scale = 0x1p-6;
            p.block_q = 48, p.block_k = 64, p.grad_q = o[0], p.grad_k = o[1], p.grad_v = o[2];
            t.attention_backward(p);
          },
          [&](size_t n) { return n == 2 && has_dots() ? double(L * H / Hkv) * 3 * 0x1p-126 : 0; });
    }

    // The other backward kernels multiply in float32: their gradients are subnormal because the outputs' are.
    Array some_q = Array::random(dtype, {1, H, L, D}), some_v = Array::random(dtype, {1, Hkv, L, Dv}, 0.5, 1),
          grad = random({1, H, L, Dv}, normal / 2);
    const auto gradients = [&](AttentionParams& p, Outputs& o) {
      o.clear();
      o.push_back(Array(dtype, {1, H, L, D})), o.push_back(Array(dtype, {1, Hkv, L, D})),
          o.push_back(Array(dtype, {1, Hkv, L, Dv}));
      p.q = some_q, p.v = some_v, p.grad_out = grad, p.grad_q = o[0], p.grad_k = o[1], p.grad_v = o[2];
    };
    for (const double power : {0.0, 3.0}) {
      // with a power, equal scores have weights only where there are three or less
      const int64_t K = power ? 3 : L;
      Array few = Array::random(dtype, {1, Hkv, K, D}), values = sparse(Hkv, K, Dv, power ? normal : 16 * normal),
            first_out(dtype, {1, H, L, Dv}), first_statistics(f32, {1, H, L, 3});
      check(power ? "LSSAR" : "LSSA", [&](const KernelTable& t, Outputs& o) {
        LssaParams p;
        Array unused, statistics(f32, {1, H, L, 3});
        base(p, o, unused), p.k = few, p.v = values, p.power = power ? power : 1, p.reweigh = power != 0;
        p.statistics = statistics;
        t.lssa_forward(p);
      });
      LssaParams first;
      Outputs unused;
      Array state;
      base(first, unused, state), first.q = some_q, first.v = some_v, first.power = power ? power : 1;
      first.reweigh = power != 0, first.causal = 1, first.out = first_out, first.statistics = first_statistics;
      baseline.lssa_forward(first);
      check(power ? "LSSAR backward" : "LSSA backward", [&](const KernelTable& t, Outputs& o) {
        LssaParams p = first;
        gradients(p, o);
        t.lssa_backward(p);
      });
    }
    {
      Array groups = Array::random(DType::i64, {1, L}, 1, 4), out(dtype, {1, H, L, Dv}), state(f32, {1, H, L, 2});
      check("grouped attention", [&](const KernelTable& t, Outputs& o) {
        GroupedParams p;
        Array own;
        base(p, o, own), p.causal = 1, p.groups = groups, p.key_groups = groups, p.window = 16;
        t.grouped_forward(p);
      });
      GroupedParams first;
      Outputs unused;
      Array own;
      base(first, unused, own), first.causal = 1, first.groups = groups, first.key_groups = groups, first.window = 16;
      first.q = some_q, first.v = some_v, first.out = out, first.state = state;
      baseline.grouped_forward(first);
      check("grouped attention backward", [&](const KernelTable& t, Outputs& o) {
        GroupedParams p = first;
        gradients(p, o);
        t.grouped_backward(p);
      });
    }
    for (int gate = 0; gate < 2; gate++) {
      Array a = Array::random(f32, {1, L, G}, 0, 0.5), sharpness = Array::full(f32, {1}, 2), out(dtype, {1, H, L, Dv}),
            state(f32, {1, H, L, 2});
      check("gated attention", [&](const KernelTable& t, Outputs& o) {
        GatedParams p;
        Array own;
        base(p, o, own), p.causal = 1, p.assignment = a, p.sharpness = sharpness, p.window = 16, p.gate = gate;
        t.gated_attention_forward(p);
      });
      GatedParams first;
      Outputs unused;
      Array own;
      base(first, unused, own), first.causal = 1, first.assignment = a, first.sharpness = sharpness;
      first.window = 16, first.gate = gate, first.q = some_q, first.v = some_v, first.out = out, first.state = state;
      baseline.gated_attention_forward(first);
      check("gated attention backward", [&](const KernelTable& t, Outputs& o) {
        GatedParams p = first;
        gradients(p, o);
        Array by_query = Array::full(f32, {1, H, L, G}, 0), by_key = Array::full(f32, {1, Hkv, L, G}, 0),
              by_row = Array::full(f32, {1, H, L}, 0);
        p.grad_query_assignment = by_query, p.grad_key_assignment = by_key, p.grad_sharpness = by_row;
        t.gated_attention_backward(p);
      });
    }
  }
};

inline void check_subnormals(const KernelTable& kernels, const KernelTable& baseline, Report& report) {
  Array::random_state = 1;  // whatever was drawn before: which results are subnormal depends on the inputs
  for (const DType dtype : {DType::bf16, DType::f16}) {
    const Subnormals subnormals(kernels, baseline, report, dtype);
    subnormals.rows(), subnormals.products(), subnormals.decode(), subnormals.attention();
  }
}

}  // namespace checks
