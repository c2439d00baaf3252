// Attention whose scores are what a program makes of them, by its definition in double.
#pragma once
#include <functional>
#include <string>

#include "../../src/cpu/checks.h"
#include "attention_checks.h"
#include "score_programs.h"

namespace checks {

// What a program makes of a score s, of batch element b, head h, row q and key k: its derivative by s, and by what it
// loads. error: what float32 is off by, as a part of 2^-24, given a right s.
struct ScoreTerm {
  double score, slope = 1, error = 4;
  std::vector<std::pair<int64_t, double>> loads;
};

struct ProgramCase {
  const char* name;
  Program forward, backward;
  bool masks = false;  // the program gives -inf for keys after the row, the other one of two does not
  std::function<ScoreTerm(double s, int64_t b, int64_t h, int64_t q, int64_t k, const Array& tables)> term;
};

// Programs of heads, rows and keys up to these numbers, which `tables` has room for: slopes of heads, a number of each
// distance, of each key, a factor.
struct ProgramTables {
  int64_t heads, rows, keys;
  int64_t distances() const { return heads; }
  int64_t columns() const { return heads + rows + keys; }
  int64_t factor() const { return columns() + keys; }
  int64_t size() const { return factor() + 1; }
};

inline std::vector<ProgramCase> program_cases(const ProgramTables& at) {
  std::vector<ProgramCase> cases;
  const int S = Program::kProducts, K = Program::kKeys, B = 0, H = 1, Q = 2;
  const auto add = [&](const char* name, const auto& write, auto term, bool masks = false) {
    ProgramCase c{name, {}, {}, masks, term};
    write(c.forward, false);
    write(c.backward, true);
    if (c.backward.slope < 0) c.backward.slope = c.backward.constant(1.0f);
    c.forward.slope = -1, c.forward.loads.clear();
    cases.push_back(c);
  };
  add("identity", [](Program&, bool) {}, [](double s, auto...) { return ScoreTerm{s}; });
  add(
      "alibi",
      [=](Program& p, bool) {
        const int slope = p.op("load_f", H), distance = p.op("i2f", p.op("sub_i", K, Q));
        p.score = p.op("add_f", S, p.op("mul_f", distance, slope));
        p.loads = {{H, distance}};
      },
      [](double s, int64_t, int64_t h, int64_t q, int64_t k, const Array& tables) {
        const double bias = tables[h] * double(k - q);
        return ScoreTerm{s + bias, 1, 4 * (1 + std::fabs(bias)), {{h, double(k - q)}}};
      });
  add(
      "soft cap",
      [=](Program& p, bool backward) {
        const int capped = p.op("tanh_f", p.op("mul_f", S, p.constant(float(1 / kCap))));
        p.score = p.op("mul_f", capped, p.constant(float(kCap)));
        if (backward) p.slope = p.op("sub_f", p.constant(1.0f), p.op("mul_f", capped, capped));
      },
      [](double s, auto...) {
        const double t = std::tanh(s / kCap);
        return ScoreTerm{t * kCap, 1 - t * t, 20};
      });
  for (const bool general : {false, true})  // the same table by its rows, and element by element
    add(
        general ? "relative table, gathered" : "relative table",
        [=](Program& p, bool) {
          const int first = p.op("sub_i", p.constant(int32_t(at.distances() + at.rows)), Q);
          const int index = general ? p.op("add_i", K, first) : first + kProgramRowIndex;
          p.score = p.op("add_f", S, general ? p.op("load_f", index) : p.op("load_row_f", first));
          p.loads = {{index, p.constant(1.0f)}};
        },
        [=](double s, int64_t, int64_t, int64_t q, int64_t k, const Array& tables) {
          const int64_t i = at.distances() + at.rows - q + k;
          return ScoreTerm{s + tables[i], 1, 8, {{i, 1.0}}};
        });
  add(
      "columns and temperature",
      [=](Program& p, bool) {
        const int by = p.op("load_f", p.constant(int32_t(at.factor()))), first = p.constant(int32_t(at.columns()));
        p.score = p.op("add_f", p.op("mul_f", S, by), p.op("load_row_f", first));
        p.slope = by;
        p.loads = {{p.op("add_i", first, p.constant(int32_t(0))) + kProgramRowIndex, p.constant(1.0f)},
                   {p.constant(int32_t(at.factor())), S}};
      },
      [=](double s, int64_t, int64_t, int64_t, int64_t k, const Array& tables) {
        const double by = tables[at.factor()];
        return ScoreTerm{s * by + tables[at.columns() + k], by, 12, {{at.columns() + k, 1.0}, {at.factor(), s}}};
      });
  add(
      "masked",
      [=](Program& p, bool) {
        // rows 3 and 4 of odd heads attend nothing; the rest no key after their row, and of two neighbours one
        const int odd = p.op("eq_i", p.op("and_i", H, p.constant(int32_t(1))), p.constant(int32_t(1)));
        const int none =
            p.op("and_i", odd,
                 p.op("eq_i", p.op("shr_i", p.op("sub_i", Q, p.constant(int32_t(3))), p.constant(int32_t(1))),
                      p.constant(int32_t(0))));
        const int other = p.op("eq_i", p.op("mod_i", p.op("sub_i", K, Q), p.constant(int32_t(2))), p.constant(1));
        const int seen = p.op("and_i", p.op("le_i", K, Q), p.op("not_i", p.op("or_i", none, other)));
        const int b = p.op("i2f", B);
        p.score = p.op("select", seen, p.op("sub_f", p.op("neg_f", S), b), p.constant(-INFINITY));
        p.slope = p.op("select", seen, p.constant(-1.0f), p.constant(0.0f));
      },
      [](double s, int64_t b, int64_t h, int64_t q, int64_t k, const Array&) {
        const bool none = h % 2 == 1 && (q == 3 || q == 4), seen = k <= q && !none && (q - k) % 2 == 0;
        return seen ? ScoreTerm{-s - double(b), -1, 8} : ScoreTerm{-INFINITY, 0, 0};
      },
      true);
  return cases;
}

struct ProgramShape {
  DType dtype;
  int64_t batch, heads, kv_heads, rows, keys, head_dim, value_dim;
  bool causal = false, dropout = false, packed = false, classes = false;
};

class ProgramAttention {
 public:
  ProgramAttention(const ProgramCase& program, const ProgramShape& shape) : program(program), z(shape) {
    const ProgramTables at{z.heads, z.rows, z.keys};
    q = Array::random(z.dtype, {z.batch, z.heads, z.rows, z.head_dim});
    k = Array::random(z.dtype, {z.batch, z.kv_heads, z.keys, z.head_dim});
    v = Array::random(z.dtype, {z.batch, z.kv_heads, z.keys, z.value_dim});
    grad = Array::random(z.dtype, {z.batch, z.heads, z.rows, z.value_dim});
    tables = Array::random(DType::f32, {at.size()}, -0.5, 0.5);
    scale = -1.7 / std::sqrt(double(z.head_dim));
    if (z.packed) {
      begins_q = Array::of(DType::i32, {0, z.rows / 3, z.rows / 3, z.rows});
      begins_k = Array::of(DType::i32, {0, z.keys / 2, z.keys / 2 + 3, z.keys});
    }
    rng = Array(DType::i64, {2});
    memcpy(rng.tensor.data, "\xef\xcd\xab\x89\x67\x45\x23\x01\xfb\xff\xff\xff\xff\xff\xff\xff", 16);
    define();
  }

  void check(const KernelTable& kernels, Report& report, const Cut& cut) {
    Array words = program.forward.words(), backward = program.backward.words();
    Program without;
    without.score = without.op("sub_f", without.op("neg_f", Program::kProducts), without.op("i2f", 0));
    without.slope = without.constant(-1.0f);
    Array full = without.words();
    AttentionParams p;
    p.q = q, p.k = k, p.v = v, p.scale = scale, p.causal = z.causal, p.tables = tables;
    p.cu_seqlens_q = begins_q, p.cu_seqlens_k = begins_k;
    if (z.dropout) p.dropped = kDropped, p.rng = rng;
    p.block_q = cut.block_q, p.block_k = cut.block_k, p.decode_rows = cut.decode_rows, p.chunk_k = 64;
    p.pack_kib = cut.pack_kib, p.threads = cut.threads;
    Array classes = tile_classes(cut);
    const auto with = [&](Array& whole) {
      p.program = whole;
      if (!program.masks) return;
      p.masked_program = whole;
      if (!z.classes) return;
      p.program = full, p.tile_class = classes;
    };
    with(words);
    Array out(z.dtype, {z.batch, z.heads, z.rows, z.value_dim}), lse(DType::f32, {z.batch, z.heads, z.rows});
    Array state(DType::f32, {z.batch, z.heads, z.rows, 2}), residual = out;
    p.out = out, p.lse = lse, p.state = state;
    if (z.dtype != DType::f32) p.residual = residual;
    const std::string of = name(cut);
    const auto within = [&](const char* what, const Array& got, const std::vector<double>& value,
                            const std::vector<double>& bound) {
      report.compare((of + what).c_str(), got, [&](int64_t i) { return value[size_t(i)]; },
                     [&](int64_t i) { return bound[size_t(i)]; });
    };
    try {
      fastattn::check("attention_forward", p);
    } catch (const std::exception& error) {
      report.failed++;
      std::printf("FAILED %s: %s\n", of.c_str(), error.what());
      return;
    }
    kernels.attention_forward(p);
    within(" out", out, out_.value, out_.bound);
    within(" lse", lse, lse_.value, lse_.bound);
    with(backward);
    Array dq(z.dtype, {z.batch, z.heads, z.rows, z.head_dim}), dk(z.dtype, {z.batch, z.kv_heads, z.keys, z.head_dim});
    Array dv(z.dtype, {z.batch, z.kv_heads, z.keys, z.value_dim}), copies(DType::f32, {cut.threads, tables.count()});
    p.grad_out = grad, p.grad_q = dq, p.grad_k = dk, p.grad_v = dv, p.grad_tables = copies;
    const auto run = [&] {
      for (int64_t i = 0; i < copies.count(); i++) copies.set(i, 0);
      kernels.attention_backward(p);
    };
    fastattn::check("attention_backward", p);
    run();
    within(" grad_q", dq, dq_.value, dq_.bound), within(" grad_k", dk, dk_.value, dk_.bound);
    within(" grad_v", dv, dv_.value, dv_.bound);
    const Array first = copies;
    run();
    report.compare((of + " grad_tables again").c_str(), copies, [&](int64_t i) { return first[i]; },
                   [](int64_t) { return 0.0; });
    Array sum(DType::f32, {tables.count()});
    for (int64_t i = 0; i < tables.count(); i++) {
      sum.set(i, 0);
      for (int c = 0; c < cut.threads; c++) sum.set(i, sum[i] + copies[c * tables.count() + i]);
    }
    within(" grad_tables", sum, dt_.value, dt_.bound);
  }

 private:
  struct Sums {
    std::vector<double> value, bound;
    explicit Sums(int64_t n = 0) : value(size_t(n)), bound(size_t(n)) {}
    void add(int64_t i, double x, double error) { value[size_t(i)] += x, bound[size_t(i)] += error; }
  };
  ProgramCase program;
  ProgramShape z;
  Array q, k, v, grad, tables, begins_q, begins_k, rng;
  Sums out_, lse_, dq_, dk_, dv_, dt_;
  double scale;

  std::string name(const Cut& cut) const {
    char text[200];
    std::snprintf(text, sizeof text, "program %s dtype %d B %d H %d/%d L %d K %d D %d/%d%s%s%s%s cut %d %d %d",
                  program.name, int(z.dtype), int(z.batch), int(z.heads), int(z.kv_heads), int(z.rows), int(z.keys),
                  int(z.head_dim), int(z.value_dim), z.causal ? " causal" : "", z.dropout ? " dropout" : "",
                  z.packed ? " packed" : "", z.classes ? " classes" : "", int(cut.block_q), int(cut.block_k),
                  cut.threads);
    return text;
  }
  // Of the mask that the program has, by tiles as kernels round them: of whole panels and groups of rows.
  Array tile_classes(const Cut& cut) const {
    const auto of = [](int64_t n, int64_t block) { return (n + block - 1) / block; };
    Array classes(DType::u8, {z.batch, z.heads, of(z.rows, cut.block_q), of(z.keys, cut.block_k)});
    for (int64_t i = 0; i < classes.count(); i++) {
      const int64_t bands = classes.tensor.size[2], columns = classes.tensor.size[3];
      const int64_t n = i % columns * cut.block_k, m = i / columns % bands * cut.block_q;
      classes.set(i, n > m + cut.block_q - 1 ? 0 : 2);
    }
    return classes;
  }

  void define() {
    const auto [dtype, B, H, Hkv, L, K, D, Dv, causal, dropout, packed, with_classes] = z;
    const double u = 0x1p-24, half = dtype == DType::bf16 ? 0x1p-8 : 0, stored = unit(dtype);
    const double flushed = dtype == DType::bf16 ? (2 + 2 * double(Dv)) * 0x1p-126 : 0;
    out_ = Sums(B * H * L * Dv), lse_ = Sums(B * H * L), dq_ = Sums(B * H * L * D), dk_ = Sums(B * Hkv * K * D);
    dv_ = Sums(B * Hkv * K * Dv), dt_ = Sums(tables.count());
    const std::vector<double> qs = q.values(), ks = k.values(), vs = v.values(), gs = grad.values();
    const double left = 65536.0 / (65536 - kDropped);
    std::vector<ScoreTerm> terms(static_cast<size_t>(K));
    std::vector<double> w(static_cast<size_t>(K)), kept(static_cast<size_t>(K), 1.0);
    for (int64_t row = 0; row < B * H * L; row++) {
      const int64_t b = row / (H * L), h = row / L % H, i = row % L, key = (b * Hkv + h * Hkv / H) * K;
      int64_t low = 0, high = K, diagonal = i + K - L;
      for (int d = 0; d < 3 && packed; d++)
        if (i >= begins_q[d] && i < begins_q[d + 1]) {
          low = int64_t(begins_k[d]), high = int64_t(begins_k[d + 1]);
          diagonal = high - int64_t(begins_q[d + 1]) + i;
        }
      double top = -INFINITY, err = 0, sum = 0;
      for (int64_t j = 0; j < K; j++) {
        ScoreTerm& t = terms[size_t(j)];
        t = {-INFINITY, 0, 0, {}};
        if (j < low || j >= high || (causal && j > diagonal)) continue;
        double x = 0, size = 0;
        for (int64_t n = 0; n < D; n++) {
          const double product = qs[size_t(row * D + n)] * ks[size_t((key + j) * D + n)];
          x += product, size += std::fabs(product);
        }
        t = program.term(x * scale, b, h, i, j, tables);
        if (dropout) kept[size_t(j)] = keeps(b * H + h, i, j) ? left : 0;
        if (t.score == -INFINITY) continue;
        // of the product, then of the program, then of the exponential
        const double of_product = 2 * double(D + 4) * u * size * std::fabs(scale);
        err = std::fmax(err, of_product * std::fmax(1, std::fabs(t.slope)) + (t.error + 4 * std::fabs(t.score)) * u);
        top = std::fmax(top, t.score);
      }
      const double rw = 2 * (err + 1e-6);
      for (int64_t j = 0; j < K; j++) {
        const double s = terms[size_t(j)].score;
        w[size_t(j)] = s == -INFINITY ? 0 : std::exp(s - top);
        sum += w[size_t(j)];
      }
      lse_.value[size_t(row)] = sum ? top + std::log(sum) : -INFINITY;
      lse_.bound[size_t(row)] = 2 * rw + double(K) * u + 4 * u * std::fabs(top);
      double delta = 0, delta_size = 0;
      for (int64_t j = 0; j < K && sum; j++) {
        w[size_t(j)] /= sum;
        for (int64_t n = 0; n < Dv && w[size_t(j)]; n++) {
          const double t = w[size_t(j)] * kept[size_t(j)] * vs[size_t((key + j) * Dv + n)];
          out_.add(row * Dv + n, t, std::fabs(t) * (rw + double(K + 8) * 2 * u + half) + flushed);
        }
      }
      // from the output, what it is off by and what its rounding's own rounding is
      double delta_error = 0;
      for (int64_t n = 0; n < Dv; n++) {
        const double g = gs[size_t(row * Dv + n)], o = out_.value[size_t(row * Dv + n)];
        delta += g * o, delta_size += std::fabs(g * o);
        delta_error += std::fabs(g) * (out_.bound[size_t(row * Dv + n)] + std::fabs(o) * stored * stored);
      }
      for (int64_t j = 0; j < K; j++) {
        const ScoreTerm& t = terms[size_t(j)];
        if (w[size_t(j)] == 0) continue;
        double dp = 0, dp_size = 0;
        for (int64_t n = 0; n < Dv; n++) {
          const double g = gs[size_t(row * Dv + n)], x = kept[size_t(j)] * g * vs[size_t((key + j) * Dv + n)];
          dp += x, dp_size += std::fabs(x);
          const double wg = w[size_t(j)] * kept[size_t(j)] * g;
          dv_.add((key + j) * Dv + n, wg, std::fabs(wg) * (rw + double(L * H + 8) * 2 * u + half) + flushed);
        }
        const double ds = w[size_t(j)] * (dp - delta);
        const double off = std::fabs(ds) * (rw + 8 * u) +
                           w[size_t(j)] * (double(Dv + 4) * 2 * u * (dp_size + delta_size) + delta_error);
        for (const auto& [index, derivative] : t.loads)
          dt_.add(
              index, ds * derivative,
              off * std::fabs(derivative) + std::fabs(ds) * (err + double(B * L * H + 8) * u * std::fabs(derivative)));
        const double raw = scale * ds * t.slope;
        const double raw_off = std::fabs(scale) * (off * std::fabs(t.slope) + std::fabs(ds) * (2 * err + 20 * u));
        const auto share = [&](double x) {
          const double summed = half + double(K + L * H + 8) * 2 * u;
          return std::fabs(x) * (raw_off + std::fabs(raw) * summed) + std::fabs(scale) * flushed;
        };
        for (int64_t n = 0; n < D; n++) {
          const double kd = ks[size_t((key + j) * D + n)], qd = qs[size_t(row * D + n)];
          dq_.add(row * D + n, raw * kd, share(kd)), dk_.add((key + j) * D + n, raw * qd, share(qd));
        }
      }
    }
    const double least = dtype == DType::f16 ? 0x1p-25 : dtype == DType::bf16 ? 0x1p-134 : 0x1p-150;
    for (Sums* s : {&out_, &dq_, &dk_, &dv_})
      for (size_t i = 0; i < s->value.size(); i++) s->bound[i] += std::fabs(s->value[i]) * stored * 1.01 + least;
  }
};

inline void check_program_attention(const KernelTable& kernels, Report& report) {
  const DType f32 = DType::f32;
  const ProgramShape shapes[] = {{f32, 2, 4, 2, 70, 150, 64, 64},
                                 {f32, 1, 2, 2, 90, 90, 40, 24, true},
                                 {f32, 1, 2, 1, 61, 77, 64, 17, false, true},
                                 {f32, 1, 2, 1, 60, 90, 32, 32, true, false, true},
                                 {f32, 2, 2, 1, 3, 170, 64, 64},
                                 {DType::bf16, 1, 2, 1, 50, 90, 64, 64},
                                 {DType::f16, 1, 2, 1, 40, 40, 48, 32, true, true},
                                 {f32, 1, 2, 1, 150, 150, 64, 64, false, false, false, true}};
  const Cut cuts[] = {{}, {.block_q = 24, .block_k = 64, .pack_kib = 8, .threads = 3}, {.block_q = 96, .block_k = 256}};
  int number = 0;
  for (const ProgramShape& z : shapes)
    for (const ProgramCase& c : program_cases({z.heads, z.rows, z.keys})) {
      if (z.classes && !c.masks) continue;
      ProgramAttention at(c, z);
      Cut cut = cuts[number++ % 3];
      at.check(kernels, report, cut);
      if (z.rows > 3 && !z.packed && !z.classes) continue;
      cut.decode_rows = z.classes ? 1000 : 50;
      at.check(kernels, report, cut);
    }
}

}  // namespace checks
