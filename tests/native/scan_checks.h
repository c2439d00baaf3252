// Short convolutions and scans: each instruction set's results against the baseline's, as in row_checks.h.
#pragma once
#include "row_checks.h"

namespace checks {

// Of tensors (B, L, D): channels side by side, gaps between rows, or tokens side by side.
inline Tensor time_last(Tensor t, Layout layout) {
  if (layout != Layout::heads_inside) return t;
  std::swap(t.size[2], t.size[3]), std::swap(t.stride[2], t.stride[3]);
  return t;
}

inline void check_convolution(const KernelTable& kernels, const KernelTable& baseline, Report& report, DType dtype,
                              Variant variant) {
  const auto [layout, threads] = variant;
  const DType f32 = DType::f32;
  const std::string of = " dtype " + std::to_string(int(dtype)) + " layout " + std::to_string(int(layout));
  const auto check = [&](const char* name, double roundings, double half, const Run& run) {
    same(kernels, baseline, report, name + of, roundings, half, run);
  };
  const double half = dtype == DType::bf16 ? 0x1p-8 : dtype == DType::f16 ? 0x1p-10 : 0;
  for (const int64_t K : {1, 2, 3, 4, 7})
    for (int packed = 0; packed < 2; packed++) {
      // more than a slice of 32, an empty document, one shorter than the taps, tokens of none
      const int64_t B = packed ? 1 : 2, L = 75, D = 37, S = packed ? 4 : B, slice = 32;
      const bool last = layout == Layout::heads_inside;
      const auto tokens = [&, layout = layout] {
        return last ? Array::random(dtype, {B, D, L}, -1, 1) : Array::random(dtype, {B, L, D}, -1, 1, layout);
      };
      Array x = tokens(), g = tokens(), w = Array::random(K == 3 ? f32 : dtype, {D, K}),
            bias = Array::random(dtype, {D}), cuts = Array::of(DType::i64, {0, 2, 2, 50, 73}),
            state = Array::random(dtype, {S, K - 1, D}), grad_state = Array::random(dtype, {S, K - 1, D});
      const auto given = [&, layout = layout, threads = threads] {
        CausalConv1dParams p;
        p.x = time_last(x, layout), p.weight = w, p.slice = slice, p.silu = K != 2, p.threads = threads;
        if (K != 4) p.bias = bias, p.initial_state = state;
        if (packed) p.cu_seqlens = cuts;
        return p;
      };
      check("causal_conv1d", 2 * K + 64, half / 8, [&](const KernelTable& t, Outputs& o) {
        o = {Array::full(dtype, {B, L, D}, 0), Array(dtype, {S, K - 1, D})};
        CausalConv1dParams p = given();
        p.out = o[0], p.state = o[1];
        t.causal_conv1d_forward(p);
      });
      check("causal_conv1d_backward", 8 * L + 64, half / 8, [&, layout = layout](const KernelTable& t, Outputs& o) {
        o = {Array::full(dtype, {B, L, D}, 0), Array(f32, {B, (L + slice - 1) / slice, K + 1, D}),
             Array(dtype, {S, K - 1, D})};
        CausalConv1dParams p = given();
        p.grad_out = time_last(g, layout), p.grad_x = o[0], p.grad_sums = o[1];
        if (K != 4)
          p.grad_state = grad_state, p.grad_initial_state = o[2];
        else
          o.pop_back();
        t.causal_conv1d_backward(p);
      });
    }
}

// a is full, of constants or shared by the channels; pairs: complex numbers.
inline void check_linear_scan(const KernelTable& kernels, const KernelTable& baseline, Report& report, DType dtype,
                              Variant variant) {
  const auto [layout, threads] = variant;
  const DType f32 = DType::f32;
  const std::string of = " dtype " + std::to_string(int(dtype)) + " layout " + std::to_string(int(layout));
  const double half = dtype == DType::bf16 ? 0x1p-8 : dtype == DType::f16 ? 0x1p-10 : 0;
  for (int kind = 0; kind < 3; kind++)
    for (int form = 0; form < 4; form++) {  // plain, packed, logarithms in segments, pairs
      const bool packed = form == 1, pairs = form == 3, last = layout == Layout::heads_inside && !pairs;
      if (pairs && dtype != f32) continue;
      const int64_t B = packed ? 1 : 2, L = 70, D = 37, S = packed ? 4 : B, unit = pairs ? 2 : 1, slice = 16;
      const int64_t segments = form == 2 ? 3 : 1;
      const Layout rows = pairs ? Layout::contiguous : layout;  // a gap between rows of pairs would be a pair's
      const auto tokens = [&](double low, double high) {
        return last ? Array::random(dtype, {B, D, L}, low, high)
                    : Array::random(dtype, {B, L, unit * D}, low, high, rows);
      };
      const auto view = [&, layout = layout](Tensor t) {
        if (last) t = time_last(t, layout);
        if (pairs) t.size[3] = D, t.stride[3] = 2;
        return t;
      };
      // factors of at most 1, so that nothing grows
      Array a = pairs ? tokens(-0.7, 0.7) : tokens(-0.9, form == 2 ? 0 : 1), b = tokens(-1, 1), g = tokens(-1, 1),
            h = Array::random(dtype, {B, L, unit * D}, -1, 1), initial = Array::random(f32, {S, unit * D}),
            cuts = Array::of(DType::i64, {0, 2, 2, 50, 68});
      const auto given = [&, threads = threads] {
        LinearScanParams p;
        p.a = view(a), p.initial = view(initial), p.threads = threads, p.pairs = pairs, p.reverse = kind != 1;
        p.log_a = form == 2, p.segments = segments, p.slice = slice;
        if (kind == 1) p.a.stride[3] = 0;
        if (kind == 2) p.a.stride[1] = p.a.stride[2] = 0;
        if (packed) p.cu_seqlens = cuts;
        return p;
      };
      const auto check = [&](const char* name, double roundings, double more, const Run& run) {
        same(kernels, baseline, report, name + of + " kind " + std::to_string(kind) + " form " + std::to_string(form),
             roundings, more, run);
      };
      check("linear_scan", 16 * L, 0, [&](const KernelTable& t, Outputs& o) {
        o = {Array::full(dtype, {B, L, unit * D}, 0)};
        LinearScanParams p = given();
        p.b = view(b), p.out = o[0];
        if (pairs) p.out.size[3] = D, p.out.stride[3] = 2;
        t.linear_scan_forward(p);
      });
      check("linear_scan_backward", 64 * L * (kind ? D : 1), half, [&](const KernelTable& t, Outputs& o) {
        o = {Array::full(dtype, {B, L, unit * D}, 0), Array(f32, {S, unit * D})};
        if (kind == 0) o.push_back(Array::full(dtype, {B, L, unit * D}, 0));
        if (kind == 1) o.push_back(Array::full(f32, {(D + slice - 1) / slice, B, unit * L}, 0));
        if (kind == 2) o.push_back(Array(f32, {S, segments, unit * D}));
        const auto dense = [&](Tensor t) {
          if (pairs) t.size[3] /= 2, t.stride[3] = 2;
          return t;
        };
        LinearScanParams p = given();
        p.grad_out = view(g), p.out = dense(h), p.grad_b = dense(o[0]), p.grad_initial = dense(o[1]);
        p.grad_a = dense(o[2]), p.grad_a_kind = kind;
        t.linear_scan_backward(p);
      });
    }
}

inline void check_selective_scan(const KernelTable& kernels, const KernelTable& baseline, Report& report, DType dtype,
                                 Variant variant) {
  const auto [layout, threads] = variant;
  const DType f32 = DType::f32;
  const std::string of = " dtype " + std::to_string(int(dtype)) + " layout " + std::to_string(int(layout));
  const auto check = [&](const char* name, double roundings, double half, const Run& run) {
    same(kernels, baseline, report, name + of, roundings, half, run);
  };
  const double half = dtype == DType::bf16 ? 0x1p-8 : dtype == DType::f16 ? 0x1p-10 : 0;
  for (int kind = 0; kind < 3; kind++) {  // everything, packed, nothing but what is needed
    const int64_t B = kind == 1 ? 1 : 2, L = 37, E = 37, N = kind == 2 ? 16 : 5, S = kind == 1 ? 4 : B;
    const int64_t interval = 8, slice = kind == 2 ? 64 : 16, kept = (L + interval - 1) / interval;
    const bool last = layout == Layout::heads_inside;
    const auto tokens = [&, layout = layout](int64_t width) {
      return last ? Array::random(dtype, {B, width, L}, -1, 1) : Array::random(dtype, {B, L, width}, -1, 1, layout);
    };
    Array u = tokens(E), dt = tokens(E), z = tokens(E), b = tokens(N), c = tokens(N), g = tokens(E),
          A = Array::random(f32, {E, N}, -1, 0), D = Array::random(f32, {E}), bias = Array::random(f32, {E}),
          initial = Array::random(f32, {S, E, N}), grad_state = Array::random(f32, {S, E, N}),
          cuts = Array::of(DType::i64, {0, 2, 2, 24, 35}), checkpoints = Array::full(f32, {B, kept, N, E}, 0);
    const auto given = [&, layout = layout, threads = threads] {
      SelectiveScanParams p;
      p.u = time_last(u, layout), p.dt = time_last(dt, layout), p.A = A, p.B = time_last(b, layout);
      p.C = time_last(c, layout), p.interval = interval, p.slice = slice, p.threads = threads;
      p.dt_softplus = kind != 1;
      if (kind != 2) p.D = D, p.z = time_last(z, layout), p.dt_bias = bias, p.initial_state = initial;
      if (kind == 1) p.cu_seqlens = cuts;
      return p;
    };
    check("selective_scan", 64 * L, half / 8, [&](const KernelTable& t, Outputs& o) {
      o = {Array::full(dtype, {B, L, E}, 0), Array(f32, {S, E, N}), Array::full(f32, {B, kept, N, E}, 0)};
      SelectiveScanParams p = given();
      p.out = o[0], p.state = o[1], p.checkpoints = o[2];
      t.selective_scan_forward(p);
      checkpoints = o[2];
    });
    check("selective_scan_backward", 256 * L * N, half / 8, [&, layout = layout](const KernelTable& t, Outputs& o) {
      const int64_t slices = (E + slice - 1) / slice;
      const auto rows = [&] { return Array::full(dtype, {B, L, E}, 0); };
      o = {rows(), rows(), Array(f32, {B, N, E}), Array::full(f32, {slices, B, L, N}, 0),
           Array::full(f32, {slices, B, L, N}, 0)};
      SelectiveScanParams p = given();
      p.grad_out = time_last(g, layout), p.checkpoints = checkpoints;
      p.grad_u = o[0], p.grad_dt = o[1], p.grad_A = o[2], p.grad_B = o[3], p.grad_C = o[4];
      if (kind != 2) {
        for (Array& more : std::array<Array, 4>{rows(), Array(f32, {B, E}), Array(f32, {B, E}), Array(f32, {S, E, N})})
          o.push_back(std::move(more));
        p.grad_u = o[0], p.grad_dt = o[1], p.grad_A = o[2], p.grad_B = o[3], p.grad_C = o[4], p.grad_z = o[5];
        p.grad_D = o[6], p.grad_dt_bias = o[7], p.grad_initial_state = o[8], p.grad_state = grad_state;
      }
      t.selective_scan_backward(p);
    });
  }
}

inline void check_scans(const KernelTable& kernels, const KernelTable& baseline, Report& report, DType dtype,
                        Variant variant) {
  check_convolution(kernels, baseline, report, dtype, variant);
  check_linear_scan(kernels, baseline, report, dtype, variant);
  check_selective_scan(kernels, baseline, report, dtype, variant);
}

}  // namespace checks
