// Attention by its definition in double, with the bounds that its arithmetic in float32 and bf16 implies.
#pragma once
#include <functional>
#include <string>

#include "arrays.h"

namespace checks {

struct AttentionCase {
  DType dtype;
  int score;
  int64_t batch, heads, kv_heads, rows, keys, head_dim, value_dim;
  int mask;  // 0 none, 1 causal, 2 window, 3 prefix, 4 key lengths, 5 dense, 6 tensor bias
};

// One case's inputs, the definition's results and the errors they may have.
class Attention {
 public:
  explicit Attention(const AttentionCase& c) : c(c) {
    const auto [dtype, score, B, H, Hkv, L, K, D, Dv, mask] = c;
    q = Array::random(dtype, {B, H, L, D}), k = Array::random(dtype, {B, Hkv, K, D});
    v = Array::random(dtype, {B, Hkv, K, Dv}), grad = Array::random(dtype, {B, H, L, Dv});
    grad_lse = Array::random(DType::f32, {B, H, L});
    if (mask == 3) prefix = Array::full(DType::i32, {B}, double(K / 3));
    if (mask == 4) lengths = Array::full(DType::i32, {B}, double(K - K / 4));
    if (mask == 5) dense = Array::random(DType::u8, {B, H, L, K}, 0, 2);
    if (mask == 6) bias = Array::random(dtype, {B, H, L, K});
    scale = 1 / std::sqrt(double(D));
    define();
  }

  void check(const KernelTable& kernels, Report& report, int64_t block_q, int64_t block_k, int64_t decode_rows) {
    const auto [dtype, score, B, H, Hkv, L, K, D, Dv, mask] = c;
    AttentionParams p;
    p.q = q, p.k = k, p.v = v, p.scale = scale, p.score = score;
    p.default_bias = score == 1, p.causal = mask == 1 || mask == 3;
    if (mask == 2) p.window_left = K / 5, p.window_right = 3;
    if (mask == 3) p.prefix_lengths = prefix;
    if (mask == 4) p.key_lengths = lengths;
    if (mask == 5) p.dense = dense;
    if (mask == 6) p.bias = bias, p.default_bias = 0;
    p.block_q = block_q, p.block_k = block_k, p.decode_rows = decode_rows, p.chunk_k = 64;
    Array out(dtype, {B, H, L, Dv}), lse(DType::f32, {B, H, L});
    p.out = out;
    if (score != 1) p.lse = lse;
    kernels.attention_forward(p);
    const std::string of = name();
    const auto within = [&](const char* what, const Array& got, const Result& r) {
      report.compare((of + what).c_str(), got, [&](int64_t i) { return r.value[i]; },
                     [&](int64_t i) { return r.bound[i]; });
    };
    within(" out", out, out_);
    if (score != 1) within(" lse", lse, lse_);
    if (mask == 6) return;  // not differentiated
    Array dq(dtype, {B, H, L, D}), dk(dtype, {B, Hkv, K, D}), dv(dtype, {B, Hkv, K, Dv});
    p.out = stored_out, p.grad_out = grad;
    if (score != 1) p.lse = stored_lse, p.grad_lse = grad_lse;
    p.grad_q = dq, p.grad_k = dk, p.grad_v = dv;
    kernels.attention_backward(p);
    within(" grad_q", dq, dq_), within(" grad_k", dk, dk_), within(" grad_v", dv, dv_);
  }

 private:
  struct Result {
    std::vector<double> value, bound;
    void reset(int64_t n) { value.assign(n, 0), bound.assign(n, 0); }
    void add(int64_t i, double x, double error) { value[i] += x, bound[i] += error; }
    // Results are stored with this relative error, and at least this absolute one.
    void round(double unit, double least) {
      for (size_t i = 0; i < value.size(); i++) bound[i] += std::fabs(value[i]) * unit * 1.01 + least;
    }
  };
  AttentionCase c;
  Array q, k, v, grad, grad_lse, prefix, lengths, dense, bias, stored_out, stored_lse;
  Result out_, lse_, dq_, dk_, dv_;
  double scale;

  std::string name() const {
    char text[160];
    std::snprintf(text, sizeof text, "attention dtype %d score %d B %d H %d/%d L %d K %d D %d/%d mask %d", int(c.dtype),
                  c.score, int(c.batch), int(c.heads), int(c.kv_heads), int(c.rows), int(c.keys), int(c.head_dim),
                  int(c.value_dim), c.mask);
    return text;
  }

  bool attends(int64_t b, int64_t h, int64_t i, int64_t j) const {
    const int64_t diagonal = i + c.keys - c.rows;
    switch (c.mask) {
      case 1:
        return j <= diagonal;
      case 2:
        return j >= diagonal - c.keys / 5 && j <= diagonal + 3;
      case 3:
        return j <= diagonal || j < c.keys / 3;
      case 4:
        return j < c.keys - c.keys / 4;
      case 5:
        return dense[((b * c.heads + h) * c.rows + i) * c.keys + j] != 0;
      default:
        return true;
    }
  }

  void define() {
    const auto [dtype, score, B, H, Hkv, L, K, D, Dv, mask] = c;
    const double u = 0x1p-24, half = dtype == DType::bf16 ? 0x1p-8 : 0;  // of weights and dS, where they become bf16
    // what each product of bf16 may lose in subnormals (tile.h), its factors being at most 2 Dv (inputs are at most 1,
    // so dP and delta at most Dv); in scores and dP themselves it is nothing beside their other errors
    const double flushed = dtype == DType::bf16 ? (2 + 2 * double(Dv)) * 0x1p-126 : 0;
    out_.reset(B * H * L * Dv), lse_.reset(B * H * L);
    dq_.reset(B * H * L * D), dk_.reset(B * Hkv * K * D), dv_.reset(B * Hkv * K * Dv);
    stored_out = Array(dtype, {B, H, L, Dv}), stored_lse = Array(DType::f32, {B, H, L});
    std::vector<double> w(K), e(K), s(K);
    const std::vector<double> qs = q.values(), ks = k.values(), vs = v.values(), gs = grad.values();
    for (int64_t b = 0; b < B; b++)
      for (int64_t h = 0; h < H; h++)
        for (int64_t i = 0; i < L; i++) {
          const int64_t row = (b * H + h) * L + i, kv = b * Hkv + h * Hkv / H;
          const double own = score == 1 && mask != 6 ? -std::log(double(mask == 4 ? K - K / 4 : K)) : 0;
          double top = -INFINITY, sum = 0, err = 0;
          for (int64_t j = 0; j < K; j++) {
            s[j] = -INFINITY;
            if (!attends(b, h, i, j)) continue;
            double x = 0, size = 0;
            for (int64_t d = 0; d < D; d++) {
              const double t = qs[row * D + d] * ks[(kv * K + j) * D + d];
              x += t, size += std::fabs(t);
            }
            s[j] = x * scale + own + (mask == 6 ? bias[row * K + j] : 0);
            // of the score in float32: D products summed, two roundings each in a bf16 dot; then of the exponential
            err = std::fmax(err, 2 * (D + 4) * u * size * scale + 4 * u * (std::fabs(s[j]) + std::fabs(own)));
            top = std::fmax(top, s[j]);
          }
          const double rw = 2 * (err + 1e-6);  // relative, of a weight
          const auto finite = [&](int64_t j) { return s[j] != -INFINITY; };
          const auto sigmoid = [](double x) { return 1 / (1 + std::exp(-x)); };
          for (int64_t j = 0; j < K; j++) {
            w[j] = !finite(j)   ? 0
                   : score == 0 ? std::exp(s[j] - top)
                   : score == 1 ? sigmoid(s[j])
                                : std::fmax(s[j], 0) + std::log1p(std::exp(-std::fabs(s[j])));
            sum += w[j];
          }
          const double z = score == 1 ? 1 : sum == 0 ? 1 : sum;
          lse_.add(row, std::log(sum) + (score == 0 && sum ? top : 0), 2 * rw + K * u);
          for (int64_t j = 0; j < K; j++) {
            w[j] /= z;
            // softmax's and softplus' own derivatives are relative to the row sum; sigmoid's is not
            e[j] = score == 1 ? w[j] * (1 - w[j]) : score == 0 ? w[j] : finite(j) ? sigmoid(s[j]) / z : 0;
            for (int64_t d = 0; d < Dv && w[j]; d++) {
              const double t = w[j] * vs[(kv * K + j) * Dv + d];
              out_.add(row * Dv + d, t, std::fabs(t) * (rw + (K + 8) * 2 * u + half) + flushed);
            }
          }
          double delta = score == 1 || !sum ? 0 : -grad_lse[row], delta_size = std::fabs(delta);
          for (int64_t d = 0; d < Dv; d++) {
            stored_out.set(row * Dv + d, out_.value[row * Dv + d]);
            if (score == 1) continue;
            const double t = gs[row * Dv + d] * stored_out[row * Dv + d];
            delta += t, delta_size += std::fabs(t);
          }
          stored_lse.set(row, lse_.value[row]);
          for (int64_t j = 0; j < K; j++) {
            if (!finite(j)) continue;
            double dp = 0, dp_size = 0;
            for (int64_t d = 0; d < Dv; d++) {
              const double g = gs[row * Dv + d], t = g * vs[(kv * K + j) * Dv + d];
              dp += t, dp_size += std::fabs(t);
              dv_.add((kv * K + j) * Dv + d, w[j] * g,
                      std::fabs(w[j] * g) * (rw + (L * H + 8) * 2 * u + half) + flushed);
            }
            const double ds = scale * e[j] * (dp - delta);
            const double ds_error =
                scale * e[j] * (std::fabs(dp - delta) * rw + (Dv + 4) * 2 * u * (dp_size + delta_size));
            const auto share = [&](double with) {
              return std::fabs(with) * (ds_error + std::fabs(ds) * (half + (K + L * H + 8) * 2 * u)) + scale * flushed;
            };
            for (int64_t d = 0; d < D; d++) {
              const double kd = ks[(kv * K + j) * D + d], qd = qs[row * D + d];
              dq_.add(row * D + d, ds * kd, share(kd));
              dk_.add((kv * K + j) * D + d, ds * qd, share(qd));
            }
          }
        }
    // half of the smallest subnormal is the least error of what is stored
    const double least = dtype == DType::f16 ? 0x1p-25 : dtype == DType::bf16 ? 0x1p-134 : 0x1p-150;
    for (Result* r : {&out_, &dq_, &dk_, &dv_}) r->round(unit(dtype), least);
    lse_.round(4 * u, 0);
  }
};

}  // namespace checks
