// The other kernels: each instruction set's results against the baseline's, whose tests are against the definitions.
//
// Inputs are positive where sums are taken, so that no result is much smaller than what it is the sum of, and the error
// of n roundings of u is below n u of the largest result. Products of bf16 are exact in float32; what becomes bf16 on
// its way (weights, gradients of scores, rows that were scaled) brings 2^-8 of itself.
#pragma once
#include <functional>
#include <string>

#include "../../src/cpu/checks.h"
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

// A layout of the tensors that may have one, and a number of threads.
struct Variant {
  Layout layout;
  int threads;
};

// Any kernel whose tensors are all of one size, on rows of C columns: nothing here names it.
template <class Params, class Check>
void check_elementwise_kernel(const Check& check, const char* name, void (*KernelTable::*kernel)(const Params&),
                              DType dtype, Variant variant, int64_t C) {
  if constexpr (Elementwise<Params>) {
    const bool backward = Checks(name).backward();
    const double half = dtype == DType::bf16 ? 0x1p-8 : dtype == DType::f16 ? 0x1p-10 : 0;
    std::vector<Array> inputs;
    Params given;
    given.threads = variant.threads, given.serial = 0;
    const auto is_result = [&](const std::string& field) {
      return backward ? field.substr(0, 5) == "grad_" && field != "grad_out" : field == "out";
    };
    visit_elementwise(backward, given, [&](const std::string& field, Tensor& t) {
      if (is_result(field)) return;
      inputs.push_back(Array::random(dtype, {2, 3, 7, C}, -1, 1, variant.layout));
      t = inputs.back();
    });
    check(name, backward ? 64 : 32, half / (backward ? 4 : 8), [&](const KernelTable& table, Outputs& o) {
      Params p = given;
      o.clear();
      visit_elementwise(backward, p, [&](const std::string& field, Tensor& t) {
        if (!is_result(field)) return;
        o.push_back(Array(dtype, {2, 3, 7, C}, variant.layout));
        t = o.back();
      });
      (table.*kernel)(p);
    });
  }
}

inline void check_rows(const KernelTable& kernels, const KernelTable& baseline, Report& report, DType dtype,
                       Variant variant) {
  const auto [layout, threads] = variant;
  const std::string of = " dtype " + std::to_string(int(dtype)) + " layout " + std::to_string(int(layout));
  const auto check = [&](const char* name, double roundings, double half, const Run& run) {
    same(kernels, baseline, report, name + of, roundings, half, run);
  };
  const DType f32 = DType::f32;
  const double half = dtype == DType::bf16 ? 0x1p-8 : dtype == DType::f16 ? 0x1p-10 : 0;
  const auto random = [&, layout = layout](std::initializer_list<int64_t> shape, double low, double high) {
    return Array::random(dtype, shape, low, high, layout);
  };
  const auto blank = [&, layout = layout](std::initializer_list<int64_t> shape) { return Array(dtype, shape, layout); };
  for (const int64_t C : {1, 5, 64, 203}) {
    const int64_t R = 7;
    Array x = random({2, 3, R, C}, -1, 1), y = random({2, 3, R, C}, -1, 1), g = random({2, 3, R, C}, -1, 1),
          own = Array::random(dtype, {C}), wide = Array::random(f32, {C}),
          rstd = Array::random(f32, {2, 3, R, 1}, 0.5, 2);
    for (int residual = 0; residual < 3; residual++) {
      Array& w = residual == 2 ? wide : own;  // the weight's type is the rows' or float32
      check("rms_norm", 2 * C + 16, 2 * half, [&](const KernelTable& t, Outputs& o) {
        o = {blank({2, 3, R, C}), Array(f32, {2, 3, R, 1})};
        RmsNormParams p;
        p.x = x, p.normed = o[0], p.rstd = o[1], p.threads = threads, p.serial = 0;
        if (residual) o.push_back(blank({2, 3, R, C})), p.residual = y, p.weight = w, p.total = o[2];
        p.normed = o[0], p.rstd = o[1];
        t.rms_norm(p);
      });
      check("rms_norm_backward", 8 * C + 32, 2 * half, [&](const KernelTable& t, Outputs& o) {
        o = {blank({2, 3, R, C})};
        RmsNormBackwardParams p;
        p.grad_normed = g, p.total = x, p.rstd = rstd, p.threads = threads;
        if (residual) p.grad_total = y, p.weight = w, o.push_back(Array::full(f32, {threads, C}, 0));
        if (residual) p.weight_partials = o[1];
        p.grad = o[0];
        t.rms_norm_backward(p);
      });
    }
#define KERNEL(name, Params) check_elementwise_kernel<Params>(check, #name, &KernelTable::name, dtype, variant, C);
#include "../../src/cpu/kernels.def"
#undef KERNEL
  }
  for (const int64_t D : {2, 8, 64, 36})
    for (int kind = 0; kind < 4; kind++) {
      const int64_t width = kind < 2 ? D / 2 : D;  // one angle for both of two dims, or one for each
      const int inverse = kind % 2;
      Array x = random({2, 3, 5, D}, -1, 1), cos = Array::random(f32, {9, width}), sin = Array::random(f32, {9, width}),
            rows = Array::random(DType::i32, {2, 1, 1, 5}, 0, 9);
      check("rotary", 8, 0, [&](const KernelTable& t, Outputs& o) {
        o = {blank({2, 3, 5, D})};
        RotaryParams p;
        p.x = x, p.out = o[0], p.cos = cos, p.sin = sin, p.rows = rows, p.inverse = inverse, p.threads = threads;
        p.serial = 0;
        t.rotary(p);
      });
    }
  for (const int64_t M : {1, 2, 3, 8})
    for (const int64_t K : {1, 70, 256}) {
      const int64_t N = K == 256 ? 131 : 37;  // the first by several threads
      Array x = random({M, K}, 0, 1), w = random({N, K}, 0, 1), wide = Array::random(f32, {M, K}, 0, 1, layout),
            sum = Array::random(f32, {M, N}, 0, 1, layout);
      check("matvec", 2 * K, 0, [&](const KernelTable& t, Outputs& o) {
        o = {blank({M, N}), sum};
        MatvecParams p;
        p.x = x, p.weight = w, p.out = o[0], p.threads = threads;
        p.rows_at_once = threads > 1 ? 4 : 2, p.dot = 1;
        t.matvec(p);
        p.x = wide, p.out = o[1], p.add = 1, p.rows_at_once = 1;
        t.matvec(p);
      });
    }
  for (const int64_t M : {5, 100})
    for (const int64_t K : {48, 130})
      for (int kind = 0; kind < 6; kind++) {
        // plain, norm and residual, gated pairs of outputs with their product, transposed, gate, packed from columns
        const int64_t N = 150, parts = kind == 2 ? 2 : 1;
        Array x = kind == 3 ? random({K, M}, 0, 1) : random({1, M, 2, K / 2}, 0, 1);
        Array w = kind == 5 ? random({K, N}, 0, 0.1) : random({parts * N, K}, 0, 0.1);
        Array residual = random({M, N}, 0, 1), gate = random({1, M, 2, K / 2}, 0, 1);
        check("linear", 2 * K + 64, kind == 1 || kind == 4 ? 2 * half : 0, [&](const KernelTable& t, Outputs& o) {
          PackParams pack;
          Array bytes(DType::i64, {1});
          pack.source = w, pack.parts = int(parts), pack.bytes = bytes, pack.transposed = kind == 5;
          pack.threads = threads;
          t.pack(pack);
          Array packed(DType::u8, {int64_t(bytes[0])});
          pack.packed = packed;
          t.pack(pack);
          o = {blank({M, N})};
          LinearParams p;
          p.x = x, p.packed = packed, p.transposed = kind == 3, p.gated_up = kind == 2, p.threads = threads;
          if (threads > 1) p.block_rows = 20, p.block_columns = 70, p.block_steps = 30;
          if (kind == 1) {
            o.push_back(Array(f32, {M}));
            p.norm = 1, p.eps = 1e-6, p.rstd = o[1], p.residual = residual;
          }
          if (kind == 2) o.push_back(blank({M, 2 * N})), p.product = o[1];
          if (kind == 4) p.gate = gate;
          p.out = o[0];
          t.linear(p);
          if (kind != 0 && kind != 3) return;
          o.push_back(Array::full(f32, {M, N}, 1));  // to which the product is added
          p.out = p.residual = o[1];
          t.linear(p);
        });
      }
  {  // one token of each of three rows, at positions of their own
    const int64_t B = 3, H = 2, D = 24, C = 44, I = 30, capacity = 9, calls = 3;
    std::vector<Array> matrices;
    Array addresses(DType::i64, {2, 4});
    for (int64_t i = 0; i < 8; i++) {
      const int64_t rows[] = {4 * H * D, C, 2 * I, C}, columns[] = {C, H * D, C, I};
      matrices.push_back(Array::random(dtype, {rows[i % 4], columns[i % 4]}, 0, 0.1));
    }
    for (int64_t i = 0; i < 8; i++) {  // an address takes more digits than a double has
      const int64_t address = (int64_t)matrices[i].tensor.data;
      memcpy((int64_t*)addresses.tensor.data + i, &address, 8);
    }
    Array z_h = random({B, C}, 0, 1), z_l = random({B, C}, 0, 1), keys = random({calls * B, H, capacity, D}, 0, 1),
          values = random({calls * B, H, capacity, D}, 0, 1), cos = Array::random(f32, {11, D / 2}, 0, 1),
          sin = Array::random(f32, {11, D / 2}, 0, 0.1), positions = Array::of(DType::i32, {3, 0, 8}),
          lengths = Array::of(DType::i32, {4, 1, 9}), rows = Array::of(DType::i32, {3, 0, 10});
    rows.tensor.size[0] = B, rows.tensor.stride[0] = 1, rows.tensor.size[3] = 1;
    check("decode_step", 4000, 16 * half, [&](const KernelTable& t, Outputs& o) {
      o = {blank({B, C}), keys, values};
      DecodeStepParams p;
      p.z_h = z_h, p.z_l = z_l, p.out = o[0], p.weights = addresses, p.keys = o[1], p.values = o[2];
      p.positions = positions, p.lengths = lengths, p.cos = cos, p.sin = sin, p.rows = rows;
      p.layers = 1, p.inner = I, p.longest = 9, p.h_cycles = 1, p.l_cycles = 2, p.threads = threads;
      t.decode_step(p);
    });
  }
}

// What the attention kernels of this file take; packed: in documents, one of them without rows, one without keys.
struct HeadsCase {
  DType dtype;
  Variant variant;
  bool packed;
  int64_t batch, heads, kv_heads, rows, keys, head_dim, value_dim;
};

inline void check_heads(const KernelTable& kernels, const KernelTable& baseline, Report& report, const HeadsCase& c) {
  const auto [dtype, variant, packed, B, H, Hkv, L, K, D, Dv] = c;
  const auto [layout, threads] = variant;
  const std::string of = " dtype " + std::to_string(int(dtype)) + " layout " + std::to_string(int(layout)) +
                         (packed ? " packed" : "") + " rows " + std::to_string(L);
  const auto check = [&](const char* name, double roundings, double half, const Run& run) {
    same(kernels, baseline, report, name + of, roundings, half, run);
  };
  const DType f32 = DType::f32;
  const int64_t G = 7;
  const double half = dtype == DType::bf16 ? 0x1p-8 : 0;
  const auto random = [&, dtype = dtype, layout = layout](std::initializer_list<int64_t> shape, double low) {
    return Array::random(dtype, shape, low, 1, layout);
  };
  Array q = random({B, H, L, D}, -1), k = random({B, Hkv, K, D}, -1), v = random({B, Hkv, K, Dv}, 0.5),
        g = random({B, H, L, Dv}, 0.5);
  Array grad_lse = Array::random(f32, {B, H, L}, 0, 0.5);
  Array begins_q, begins_k, prefixes;  // prefixes within keys and, where there are as many, within queries
  if (packed) {
    begins_q = Array::of(DType::i32, {0, L / 4, L / 4, L / 2, L - 2});
    begins_k = Array::of(DType::i32, {0, K / 3, K / 3 + 5, K / 3 + 5, K - 3});
    prefixes = Array::of(DType::i32, {K / 4, 0, 0, K / 3});
  } else {
    prefixes = Array::full(DType::i32, {B}, (double)(2 * K / 3));
  }
  const auto base = [&, threads = threads](AttentionParams& p) {
    p.q = q, p.k = k, p.v = v, p.scale = 0.125, p.causal = 1, p.block_q = 20, p.block_k = 64, p.threads = threads;
    p.cu_seqlens_q = begins_q, p.cu_seqlens_k = begins_k;
    if (threads > 1) p.pack_kib = 8;
  };
  const auto out_of = [&, dtype = dtype, B = B, H = H, L = L, Dv = Dv, layout = layout] {
    return Array(dtype, {B, H, L, Dv}, layout);
  };
  // forward, then backward from the baseline's own results, so that both start from the same ones
  const auto gradients = [&, dtype = dtype, B = B, H = H, Hkv = Hkv, L = L, K = K, D = D, Dv = Dv, layout = layout](
                             AttentionParams& p, Outputs& o) {
    o.clear();
    o.push_back(Array(dtype, {B, H, L, D}, layout)), o.push_back(Array(dtype, {B, Hkv, K, D}, layout)),
        o.push_back(Array(dtype, {B, Hkv, K, Dv}, layout));
    p.grad_out = g, p.grad_q = o[0], p.grad_k = o[1], p.grad_v = o[2];
  };
  // Weights may be raised to a power, and dS is a difference of numbers of dO V^T's size: Dv of at most 1.
  for (const double power : {0.0, 3.0, 2.5}) {
    Array out = out_of(), statistics(f32, {B, H, L, 3});
    LssaParams first;
    base(first), first.power = power ? power : 1, first.reweigh = power != 0;
    first.out = out, first.statistics = statistics;
    baseline.lssa_forward(first);
    check("softplus attention", 64 * D * (1 + power), half, [&](const KernelTable& t, Outputs& o) {
      o = {out_of()};
      Array s(f32, {B, H, L, 3});
      LssaParams p = first;
      p.out = o[0], p.statistics = s;
      t.lssa_forward(p);
    });
    check("softplus attention backward", 64 * D * Dv * (1 + power), 8 * half, [&](const KernelTable& t, Outputs& o) {
      LssaParams p = first;
      gradients(p, o);
      if (!p.reweigh) p.grad_lse = grad_lse;
      t.lssa_backward(p);
    });
  }
  for (int kind = 0; kind < 4; kind++) {
    const bool many = kind & 1, prefix = kind & 2;  // lists of each group, or, where they would overlap much, of all
    Array groups(DType::i64, {B, L}), key_groups(DType::i64, {B, K}), out = out_of(), state(f32, {B, H, L, 2});
    const auto fill = [&](Array& a, int64_t step) {
      const int64_t sparse[] = {0, 1, int64_t(1) << 33, int64_t(1) << 62, 3}, dense[] = {0, 15, 30, 29, 27};
      for (int64_t i = 0; i < a.count(); i++) a.set(i, (double)(many ? dense : sparse)[i * step % 5]);
    };
    fill(groups, 3), fill(key_groups, 2);
    GroupedParams first;
    base(first), first.groups = groups, first.key_groups = key_groups, first.window = 16;
    if (prefix) first.prefix_lengths = prefixes;
    first.out = out, first.state = state;
    baseline.grouped_forward(first);
    check("grouped attention", 64 * D, half, [&](const KernelTable& t, Outputs& o) {
      o = {out_of(), Array(f32, {B, H, L, 2}), Array(f32, {B, H, L})};
      GroupedParams p = first;
      p.out = o[0], p.state = o[1], p.lse = o[2];
      t.grouped_forward(p);
    });
    check("grouped attention backward", 64 * D * Dv, half, [&](const KernelTable& t, Outputs& o) {
      GroupedParams p = first;
      gradients(p, o);
      if (many) p.grad_lse = grad_lse;
      t.grouped_backward(p);
    });
  }
  for (int kind = 0; kind < 4 && L == K; kind++) {
    const int gate = kind & 1;
    Array a = Array::random(f32, {B, L, G}, 0, 0.5, layout), sharpness = Array::full(f32, {1}, 2), out = out_of(),
          state(f32, {B, H, L, 2});
    GatedParams first;
    base(first), first.assignment = a, first.sharpness = sharpness, first.window = 16, first.gate = gate;
    first.cu_seqlens_k = begins_q, first.out = out, first.state = state;
    if (kind & 2) first.prefix_lengths = prefixes;
    baseline.gated_attention_forward(first);
    check("gated attention", 64 * D, half, [&](const KernelTable& t, Outputs& o) {
      o = {out_of(), Array(f32, {B, H, L, 2}), Array(f32, {B, H, L})};
      GatedParams p = first;
      p.out = o[0], p.state = o[1], p.lse = o[2];
      t.gated_attention_forward(p);
    });
    check("gated attention backward", 64 * D * Dv, half, [&](const KernelTable& t, Outputs& o) {
      GatedParams p = first;
      gradients(p, o);
      if (gate) p.grad_lse = grad_lse;
      Array by_query = Array::full(f32, {B, H, L, G}, 0), by_key = Array::full(f32, {B, Hkv, L, G}, 0),
            by_row = Array::full(f32, {B, H, L}, 0);
      p.grad_query_assignment = by_query, p.grad_key_assignment = by_key, p.grad_sharpness = by_row;
      t.gated_attention_backward(p);
    });
  }
}

inline void check_sinkhorn(const KernelTable& kernels, const KernelTable& baseline, Report& report, DType dtype,
                           int threads) {
  for (const int64_t G : {1, 7, 63})
    for (int kind = 0; kind < 3; kind++) {  // of the whole, causal, causal after a prefix
      const int causal = kind > 0;
      const int64_t L = 700;  // sequences of more than one chunk, of one, of nothing, and rows of none
      Array scores = Array::random(dtype, {L, G}), gradient = Array::random(dtype, {L, G}),
            begins = Array::of(DType::i64, {2, 302, 302, 400}), counts = Array::of(DType::i64, {300, 0, 98, 1}),
            prefixes = Array::of(DType::i64, {270, 0, 98, 0});
      for (int backward = 0; backward < 2; backward++)
        same(kernels, baseline, report,
             (backward ? "sinkhorn backward dtype " : "sinkhorn dtype ") + std::to_string(int(dtype)), 64 * 10 * L, 0,
             [&](const KernelTable& t, Outputs& o) {
               o = {Array::full(dtype, {L, G}, 0)};
               Array potentials(DType::f32, {4, G});
               SinkhornParams p;
               p.scores = scores, p.begins = begins, p.counts = counts, p.out = o[0], p.causal = causal;
               p.temperature = 0.5, p.threads = threads;
               if (kind == 2) p.prefixes = prefixes;
               if (backward)
                 p.grad = gradient, t.sinkhorn_backward(p);
               else
                 p.potentials = potentials, t.sinkhorn_forward(p);
             });
    }
}

inline void check_vocab(const KernelTable& kernels, const KernelTable& baseline, Report& report, DType dtype,
                        Variant variant) {
  const auto [layout, threads] = variant;
  const DType f32 = DType::f32;
  const std::string of = " dtype " + std::to_string(int(dtype)) + " layout " + std::to_string(int(layout));
  const int64_t R = 6, C = 211, K = 37, D = 70, V = 16 * 211;  // enough for several threads
  Array target = Array::random(DType::i64, {R}, 0, C), gradient = Array::full(f32, {R}, 0.25),
        mass = Array::random(f32, {R}, 0.1, 1), bias = Array::random(f32, {V}),
        temperature = Array::random(f32, {R}, 0.5, 2);
  target.set(2, -100), target.set(3, 5000);
  const auto check = [&](const char* name, double roundings, const Run& run) {
    same(kernels, baseline, report, name + of, roundings, 0, run);
  };
  Array logits = Array::random(dtype, {R, V}, -4, 4, layout);
  // statistics and the gradient at once; the gradient from statistics there are
  for (int kind = 0; kind < 6; kind++) {
    check("vocabulary rows", 64 + V, [&, threads = threads, layout = layout](const KernelTable& t, Outputs& o) {
      const auto zero = [&] { return Array::full(f32, {R}, 0); };
      const bool known = kind == 1;  // of each row, its largest logit and the sum of its weights
      o = {logits, Array::full(f32, {R}, known ? 4 : -INFINITY), Array::full(f32, {R}, known ? 300 : 0), zero(), zero(),
           zero()};
      o.push_back(Array(dtype, {R, V}, layout));
      VocabRowsParams p;
      p.x = o[0], p.out = o[6], p.target = target, p.row_max = o[1], p.row_sum = o[2], p.picked = o[3];
      p.grad = gradient, p.ignore_index = -100, p.threads = threads, p.gradient = 1, p.z_loss = 0.01;
      p.statistics = kind != 1, p.stablemax = kind == 2;
      if (kind > 2 && dtype == DType::f32) p.bias = bias, p.softcap = kind == 4 ? 3 : 0;
      if (kind == 5) p.mass = mass;
      if (kind == 4) p.temperature = temperature, p.grad_temperature = o[5];
      t.vocab_rows(p);
    });
  }
  for (int kind = 0; kind < 3; kind++) {  // gradients of float32 logits in bf16, of a row at once or not
    Array wide = Array::random(f32, {R, V}, -4, 4, layout);
    check("vocabulary rows to bf16", 64 + V, [&, threads = threads, layout = layout](const KernelTable& t, Outputs& o) {
      const auto zero = [&] { return Array::full(f32, {R}, 0); };
      o = {Array(DType::bf16, {R, V}, layout), Array::full(f32, {R}, -INFINITY), zero(), zero(), zero()};
      Array logits = wide;
      VocabRowsParams p;
      p.x = logits, p.out = o[0], p.target = target, p.row_max = o[1], p.row_sum = o[2], p.picked = o[3];
      p.grad = gradient, p.ignore_index = -100, p.threads = threads, p.gradient = p.statistics = 1, p.z_loss = 0.01;
      p.stablemax = kind == 1;
      if (kind == 2) p.temperature = temperature, p.z_loss = 0, p.grad_temperature = o[4];
      t.vocab_rows(p);
    });
  }
  Array x = Array::random(dtype, {R, D}, 0, 1, layout), book = Array::random(dtype, {K, D}, 0, 1, layout);
  check("vocabulary dots", 2 * D, [&, threads = threads](const KernelTable& t, Outputs& o) {
    o = {Array(f32, {R, K}), Array(f32, {K})};
    VocabDotsParams p;
    p.x = x, p.codebook = book, p.out = o[0], p.squares = o[1], p.threads = threads;
    t.vocab_dots(p);
  });
  // scores that leave several candidates, which are then compared
  Array near = Array::random(f32, {R, K}, 10, 10.5), offset = Array::random(DType::f64, {K}, 0, 0.01),
        ids = Array::random(DType::i64, {K}, 0, 1000);
  check("vocabulary best", 0, [&, threads = threads](const KernelTable& t, Outputs& o) {
    o = {Array(DType::i64, {R})};
    VocabBestParams p;
    p.scores = near, p.x = x, p.codebook = book, p.offset = offset, p.ids = ids, p.out = o[0], p.slack = 0.2;
    p.threads = threads;
    t.vocab_best(p);
  });
  for (const DType integer : {DType::i32, DType::i64})
    for (int with_bias = 0; with_bias < 2; with_bias++) {
      Array codes = Array::random(integer, {V}, 0, K - 1), scores = Array::random(f32, {R, K}, 0, 1),
            mass = Array::random(f32, {K}, 0, 1), uniform = Array::random(DType::f64, {R, 2}, 0, 1);
      check("vocabulary expand and collect", 2 * V,
            [&, threads = threads, layout = layout](const KernelTable& t, Outputs& o) {
              o = {Array(dtype, {R, V}, layout), Array::full(f32, {R, K}, 0)};
              VocabExpandParams p;
              p.scores = scores, p.codes = codes, p.logits = o[0], p.threads = threads;
              if (with_bias) p.bias = bias;
              t.vocab_expand(p);
              p.logits = logits, p.scores = o[1];
              t.vocab_collect(p);
            });
      check("vocabulary codes", 64 + V, [&, threads = threads](const KernelTable& t, Outputs& o) {
        Array sums(DType::f64, {K}), beta(f32, {K}), largest(f32, {K}), best(DType::i64, {K}), out(f32, {V}),
            apart(f32, {K}), top(f32, {K}), order(DType::i32, {V}), offsets(DType::i64, {K + 1});
        VocabTokensParams p;
        p.codes = codes, p.largest = largest, p.beta = beta, p.sums = sums, p.mass = mass, p.out = out, p.best = best;
        p.order = order, p.offsets = offsets;
        if (with_bias) p.bias = bias;
        t.vocab_code_bias(p);
        t.vocab_bias_gradient(p);
        t.vocab_group(p);
        p.beta = apart, p.inverse_temperature = 0.7;
        t.vocab_code_bias(p);
        p.beta = top;
        t.vocab_best_tokens(p);
        Array sampled(DType::i64, {R}), drawn = scores;
        VocabSampleParams s;
        s.scores = drawn, s.uniform = uniform, s.largest = largest, s.beta = apart, s.order = order;
        s.offsets = offsets, s.out = sampled, s.inverse_temperature = 0.7, s.threads = threads;
        if (with_bias) s.bias = bias;
        t.vocab_sample(s);
        o = {beta, largest, apart, best, out, top, order, offsets, sampled};
      });
    }
}

inline void check_classes(const KernelTable& kernels, const KernelTable& baseline, Report& report, Variant variant) {
  for (const DType dtype : {DType::u8, DType::f32, DType::bf16, DType::f16}) {
    Array mask = Array::random(dtype, {2, 1, 131, 300}, 0, 2, variant.layout);
    for (int64_t i = 0; i < mask.count(); i++) {
      const int64_t row = i / 300 % 131, column = i % 300;
      if (column < 64 && row < 48) mask.set(i, dtype == DType::u8 ? 0 : -INFINITY);
      if (column >= 256 && dtype == DType::u8) mask.set(i, 1);
    }
    same(kernels, baseline, report, "tile classes", 0, 0, [&](const KernelTable& t, Outputs& o) {
      o = {Array(DType::u8, {2, 1, 3, 5})};
      TileClassParams p;
      p.mask = mask, p.classes = o[0], p.block_q = 48, p.block_k = 64, p.threads = variant.threads;
      t.classify_tiles(p);
    });
  }
}

inline void check_peak(const KernelTable& kernels, Report& report) {
  for (int bf16 = 0; bf16 < 2; bf16++) {
    Array sink(DType::f32, {2}), operations(DType::i64, {1});
    PeakParams p;
    p.sink = sink, p.operations = operations, p.iterations = 3, p.bf16 = bf16, p.threads = 2;
    kernels.peak(p);
    report.compare("peak", operations, [&](int64_t) { return std::fmax(0, operations[0]); }, [](int64_t) { return 0; });
  }
}

}  // namespace checks
