// Attention by its definition in double, with the bounds that its arithmetic in float32 and bf16 implies.
#pragma once
#include <algorithm>
#include <functional>
#include <limits>
#include <string>

#include "arrays.h"

namespace checks {

struct AttentionCase {
  DType dtype;
  int score;
  int64_t batch, heads, kv_heads, rows, keys, head_dim, value_dim;
  // 0 none, 1 causal, 2 window, 3 prefix, 4 key lengths, 5 dense, 6 tensor bias; of packed documents: 7 causal, 8
  // prefix and key lengths
  int mask;
  Layout layout;
  bool options = false;  // a soft cap, dropout, of softmax a sink, and of 16-bit outputs the residual
};

// The options' numbers. kDropped: of 65536 weights.
constexpr double kCap = 1.5;
constexpr int64_t kDropped = 20000;

// Whether dropout keeps the weight of a key, of seed 0x123456789abcdef and offset -5: what attention_dropout.h says,
// one key at a time.
inline bool keeps(int64_t plane, int64_t row, int64_t key) {
  const uint64_t seed = 0x123456789abcdef, offset = uint64_t(-5);
  uint32_t c[4] = {uint32_t(key / 8), uint32_t(row), uint32_t(plane), uint32_t(offset)};
  uint32_t k[2] = {uint32_t(seed), uint32_t(seed >> 32) ^ uint32_t(offset >> 32)};
  for (int i = 0; i < 10; i++, k[0] += 0x9e3779b9u, k[1] += 0xbb67ae85u) {
    const uint64_t a = 0xd2511f53ull * c[0], b = 0xcd9e8d57ull * c[2];
    const uint32_t next[4] = {uint32_t(b >> 32) ^ c[1] ^ k[0], uint32_t(b), uint32_t(a >> 32) ^ c[3] ^ k[1],
                              uint32_t(a)};
    memcpy(c, next, sizeof c);
  }
  const uint32_t word = c[key % 4];
  return (key % 8 < 4 ? word & 0xffff : word >> 16) >= kDropped;
}

// How a call is cut in pieces, on which results do not depend.
struct Cut {
  int64_t block_q = 48, block_k = 64, decode_rows = 0, pack_kib = 16384;
  int threads = 1;
};

// One case's inputs, the definition's results and the errors they may have.
class Attention {
 public:
  explicit Attention(const AttentionCase& c) : c(c) {
    const auto [dtype, score, B, H, Hkv, L, K, D, Dv, mask, layout, options] = c;
    q = Array::random(dtype, {B, H, L, D}, -1, 1, layout), k = Array::random(dtype, {B, Hkv, K, D}, -1, 1, layout);
    v = Array::random(dtype, {B, Hkv, K, Dv}, -1, 1, layout);
    grad = Array::random(dtype, {B, H, L, Dv}, -1, 1, layout);
    grad_lse = Array::random(DType::f32, {B, H, L});
    if (mask == 5) dense = Array::random(DType::u8, {B, H, L, K}, 0, 2, layout);
    if (mask == 6 && shared_bias()) bias = Array::random(dtype, {1, 1, L, K}, -1, 1, layout);
    if (mask == 6 && !shared_bias()) bias = Array::random(dtype, {B, H, L, K}, -1, 1, layout);
    if (mask < 7) {
      for (int64_t b = 0; b < B; b++) documents.push_back({b, 0, L, 0, K, K, 0});
    } else {  // the second has no rows, the third no keys; then rows and keys of none
      const int64_t rows[] = {0, L / 4, L / 4, L / 2, L - 2}, keys[] = {0, K / 3, K / 3 + 5, K / 3 + 5, K - 3};
      begins_q = Array(DType::i32, {5}), begins_k = Array(DType::i32, {5});
      for (int i = 0; i < 5; i++) begins_q.set(i, (double)rows[i]), begins_k.set(i, (double)keys[i]);
      for (int i = 0; i < 4; i++)
        documents.push_back({0, rows[i], rows[i + 1], keys[i], keys[i + 1], keys[i + 1] - keys[i], 0});
    }
    const int64_t count = (int64_t)documents.size();
    if (mask == 3 || mask == 8) prefix = Array(DType::i32, {count});
    if (mask == 4 || mask == 8) lengths = Array(DType::i32, {count});
    for (int64_t i = 0; i < count; i++) {
      Document& d = documents[i];
      if (mask == 4 || mask == 8) d.keys -= d.keys / 4, lengths.set(i, (double)d.keys);
      if (mask == 3 || mask == 8) d.prefix = d.keys / 3, prefix.set(i, (double)d.prefix);
    }
    scale = 1 / std::sqrt(double(D));
    if (options && score == 0) sink = Array::random(DType::f32, {H});
    rng = Array(DType::i64, {2});
    memcpy(rng.tensor.data, "\xef\xcd\xab\x89\x67\x45\x23\x01\xfb\xff\xff\xff\xff\xff\xff\xff", 16);
    define();
  }

  void check(const KernelTable& kernels, Report& report, const Cut& cut) {
    const auto [dtype, score, B, H, Hkv, L, K, D, Dv, mask, layout, options] = c;
    AttentionParams p;
    p.q = q, p.k = k, p.v = v, p.scale = scale, p.score = score;
    p.default_bias = score == 1, p.causal = causal();
    if (mask == 2) p.window_left = K / 5, p.window_right = 3;
    p.prefix_lengths = prefix, p.key_lengths = lengths, p.dense = dense;
    p.cu_seqlens_q = begins_q, p.cu_seqlens_k = begins_k;
    const auto broadcast = [&](const Array& t) {
      Tensor to = t.tensor;
      for (int i = 0; i < 2 && shared_bias(); i++) to.size[i] = i ? H : B, to.stride[i] = 0;
      return to;
    };
    if (mask == 6) p.bias = broadcast(bias), p.default_bias = 0;
    if (options) p.softcap = kCap, p.dropped = kDropped, p.rng = rng, p.sink = sink;
    p.block_q = cut.block_q, p.block_k = cut.block_k, p.decode_rows = cut.decode_rows, p.chunk_k = 64;
    p.pack_kib = cut.pack_kib, p.threads = cut.threads;
    // the tiles of block_q and block_k above, whatever they are rounded up to
    Array classes(DType::u8, {B, H, (L + cut.block_q - 1) / cut.block_q, (K + cut.block_k - 1) / cut.block_k});
    if (mask == 5 && cut.threads > 1) {
      TileClassParams t;
      t.mask = dense, t.classes = classes, t.block_q = cut.block_q, t.block_k = cut.block_k, t.threads = cut.threads;
      kernels.classify_tiles(t);
      p.tile_class = classes;
    }
    Array out(dtype, {B, H, L, Dv}, layout), lse(DType::f32, {B, H, L}), state(DType::f32, {B, H, L, 2});
    p.out = out;
    if (score != 1) p.lse = lse, p.state = state;
    const bool rounds = options && score != 1 && dtype != DType::f32;
    Array residual(dtype, {B, H, L, Dv}, layout);
    if (rounds) p.residual = residual;
    kernels.attention_forward(p);
    for (int64_t i = 0; i < out.count() && rounds; i++) residual.set(i, residual[i] + out[i]);  // out again
    const std::string of = name();
    const auto within = [&](const char* what, const Array& got, const Result& r) {
      report.compare((of + what).c_str(), got, [&](int64_t i) { return r.value[i]; },
                     [&](int64_t i) { return r.bound[i]; });
    };
    within(" out", out, out_);
    if (rounds) within(" out and residual", residual, out_);
    if (score != 1) within(" lse", lse, lse_);
    Array dq(dtype, {B, H, L, D}, layout), dk(dtype, {B, Hkv, K, D}, layout), dv(dtype, {B, Hkv, K, Dv}, layout);
    p.out = stored_out, p.grad_out = grad;
    if (score != 1) p.lse = stored_lse, p.state = stored_state, p.grad_lse = grad_lse;
    p.grad_q = dq, p.grad_k = dk, p.grad_v = dv;
    if (rounds) p.residual = stored_residual;
    Array dsink(DType::f32, {B, H, L});
    if (options && score == 0) p.grad_sink = dsink;
    // sums in place, or rounded; on their own for two parts of those that share a bias
    const bool summed = mask == 6 && (dtype == DType::f32 || cut.threads > 1), apart = summed && shared_bias();
    Array dbias(summed ? DType::f32 : dtype, {apart ? 2 : bias.tensor.size[0], bias.tensor.size[1], L, K});
    for (int64_t i = 0; i < dbias.count(); i++) dbias.set(i, 0);
    if (mask == 6) p.grad_bias = broadcast(dbias);
    if (apart) p.bias_parts = 2, p.bias_part = L * K;
    kernels.attention_backward(p);
    for (int64_t i = 0; i < L * K && apart; i++) dbias.set(i, dbias[i] + dbias[L * K + i]);
    for (int64_t i = L * K; i < dbias.count() && apart; i++) dbias.set(i, 0);
    if (mask == 6) dbias_.round(unit(summed ? DType::f32 : dtype), dtype == DType::f16 ? 0x1p-25 : 0x1p-134);
    if (mask == 6) within(" grad_bias", dbias, dbias_);
    if (options && score == 0) within(" grad_sink", dsink, dsink_);
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
  struct Document {
    int64_t batch, row, row_end, key, key_end, keys, prefix;
  };
  AttentionCase c;
  std::vector<Document> documents;  // of each batch element, or packed
  Array q, k, v, grad, grad_lse, prefix, lengths, dense, bias, begins_q, begins_k, stored_out, stored_lse, stored_state,
      stored_residual, sink, rng;
  Result out_, lse_, dq_, dk_, dv_, dsink_, dbias_;
  double scale;

  std::string name() const {
    char text[160];
    std::snprintf(text, sizeof text, "attention%s dtype %d score %d B %d H %d/%d L %d K %d D %d/%d mask %d layout %d",
                  c.options ? " with options" : "", int(c.dtype), c.score, int(c.batch), int(c.heads), int(c.kv_heads),
                  int(c.rows), int(c.keys), int(c.head_dim), int(c.value_dim), c.mask, int(c.layout));
    return text;
  }

  // Whether the bias (mask 6) is one of all batch entries and heads.
  bool shared_bias() const { return c.layout == Layout::padded; }
  int64_t bias_row(int64_t row) const { return (shared_bias() ? row % c.rows : row) * c.keys; }
  bool causal() const { return c.mask == 1 || c.mask == 3 || c.mask > 6; }
  // Whether row i of a document attends its key j.
  bool attends(const Document& d, int64_t h, int64_t i, int64_t j) const {
    const int64_t diagonal = i + (d.key_end - d.key) - (d.row_end - d.row);
    if (j >= d.keys || (causal() && j > diagonal && j >= d.prefix)) return false;
    if (c.mask == 2) return j >= diagonal - c.keys / 5 && j <= diagonal + 3;
    if (c.mask == 5) return dense[((d.batch * c.heads + h) * c.rows + i) * c.keys + j] != 0;
    return true;
  }

  void define() {
    const auto [dtype, score, B, H, Hkv, L, K, D, Dv, mask, layout, options] = c;
    const double u = 0x1p-24, half = dtype == DType::bf16 ? 0x1p-8 : 0;  // of weights and dS, where they become bf16
    // what each product of bf16 may lose in subnormals (tile.h), its factors being at most 2 Dv (inputs are at most 1,
    // so dP and delta at most Dv); in scores and dP themselves it is nothing beside their other errors
    const double flushed = dtype == DType::bf16 ? (2 + 2 * double(Dv)) * 0x1p-126 : 0;
    out_.reset(B * H * L * Dv), lse_.reset(B * H * L);
    dq_.reset(B * H * L * D), dk_.reset(B * Hkv * K * D), dv_.reset(B * Hkv * K * Dv);
    dsink_.reset(B * H * L), dbias_.reset(mask == 6 ? std::max<int64_t>(bias.count(), 2 * L * K) : 0);
    stored_residual = Array(dtype, {B, H, L, Dv}, layout);
    for (int64_t i = 0; i < stored_residual.count(); i++) stored_residual.set(i, 0);
    stored_out = Array(dtype, {B, H, L, Dv}, layout), stored_lse = Array::full(DType::f32, {B, H, L}, -INFINITY);
    stored_state = Array::full(DType::f32, {B, H, L, 2}, -INFINITY);
    lse_.value.assign(lse_.value.size(), -INFINITY);  // of rows that attend nothing
    for (int64_t i = 0; i < stored_out.count(); i++) stored_out.set(i, 0);
    const double left = 65536.0 / (65536 - kDropped);  // what multiplies kept weights
    std::vector<double> w(K), e(K), s(K), slope(K, 1.0), kept(K, 1.0);
    const std::vector<double> qs = q.values(), ks = k.values(), vs = v.values(), gs = grad.values();
    for (const Document& d : documents)
      for (int64_t h = 0; h < H; h++)
        for (int64_t i = 0; i < d.row_end - d.row; i++) {
          const int64_t row = (d.batch * H + h) * L + d.row + i, key = (d.batch * Hkv + h * Hkv / H) * K + d.key;
          const int64_t K = d.key_end - d.key;
          const double own = score == 1 && mask != 6 ? -std::log(double(std::max<int64_t>(d.keys, 1))) : 0;
          double top = -INFINITY, sum = 0, err = 0;
          for (int64_t j = 0; j < K; j++) {
            s[j] = -INFINITY;
            if (!attends(d, h, i, j)) continue;
            double x = 0, size = 0;
            for (int64_t n = 0; n < D; n++) {
              const double t = qs[row * D + n] * ks[(key + j) * D + n];
              x += t, size += std::fabs(t);
            }
            const double y = x * scale / kCap, cosh = std::cosh(y);
            if (options)
              slope[j] = 1 / (cosh * cosh), kept[j] = keeps(d.batch * H + h, d.row + i, d.key + j) ? left : 0;
            s[j] = (options ? kCap * std::tanh(y) : x * scale) + own + (mask == 6 ? bias[bias_row(row) + j] : 0);
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
          const bool has_sink = options && score == 0;
          const double of_sink = has_sink ? std::exp(sink[h] - (sum ? top : 0)) : 0, all = sum + of_sink;
          const double z = score == 1 ? 1 : all == 0 ? 1 : all;
          lse_.value[row] = std::log(all) + (score == 0 && sum ? top : 0), lse_.bound[row] = 2 * rw + K * u;
          for (int64_t j = 0; j < K; j++) {
            w[j] /= z;
            // softmax's and softplus' own derivatives are relative to the row sum; sigmoid's is not
            e[j] = score == 1 ? w[j] * (1 - w[j]) : score == 0 ? w[j] : finite(j) ? sigmoid(s[j]) / z : 0;
            for (int64_t n = 0; n < Dv && w[j]; n++) {
              const double t = w[j] * kept[j] * vs[(key + j) * Dv + n];
              out_.add(row * Dv + n, t, std::fabs(t) * (rw + (K + 8) * 2 * u + half) + flushed);
            }
          }
          double delta = score == 1 || !all ? 0 : -grad_lse[row], delta_size = std::fabs(delta);
          for (int64_t n = 0; n < Dv; n++) {
            stored_out.set(row * Dv + n, out_.value[row * Dv + n]);
            if (score == 1) continue;
            double o = stored_out[row * Dv + n];
            if (options && dtype != DType::f32) {
              stored_residual.set(row * Dv + n, out_.value[row * Dv + n] - o);
              o += stored_residual[row * Dv + n];
            }
            const double t = gs[row * Dv + n] * o;
            delta += t, delta_size += std::fabs(t);
          }
          stored_lse.set(row, lse_.value[row]);
          // the kernel's own lse is a float32
          const double weight = of_sink / z,
                       off = (Dv + 4) * 2 * u * delta_size + 8 * u * (1 + std::fabs(lse_.value[row]));
          if (has_sink) dsink_.add(row, -weight * delta, weight * (off + 16 * u * std::fabs(delta)));
          // any number may stand for the maximum, which scores of this size do not need; softplus takes none off
          const double infinite = std::numeric_limits<double>::infinity();
          stored_state.set(2 * row, score == 2 && sum ? -infinite : 0);
          stored_state.set(2 * row + 1, sum ? lse_.value[row] : infinite);
          for (int64_t j = 0; j < K; j++) {
            if (!finite(j)) continue;
            double dp = 0, dp_size = 0;
            for (int64_t n = 0; n < Dv; n++) {
              const double g = gs[row * Dv + n], t = g * vs[(key + j) * Dv + n];
              dp += kept[j] * t, dp_size += std::fabs(kept[j] * t);
              const double wg = w[j] * kept[j] * g;
              dv_.add((key + j) * Dv + n, wg, std::fabs(wg) * (rw + (L * H + 8) * 2 * u + half) + flushed);
            }
            const double ds = scale * e[j] * slope[j] * (dp - delta);
            // rw has err twice, which over the cap is what the slope's argument is off by
            const double ds_error =
                scale * e[j] * slope[j] *
                (std::fabs(dp - delta) * (options ? 2 * rw + 20 * u : rw) + (Dv + 4) * 2 * u * (dp_size + delta_size));
            if (mask == 6) {  // before the scale and the soft cap; of those that share it, up to B * H are summed
              const double of_bias = e[j] * (dp - delta), off = ds_error / (scale * slope[j]);
              dbias_.add(bias_row(row) + j, of_bias, off + std::fabs(of_bias) * (B * H + 8) * u);
            }
            const auto share = [&](double with) {
              return std::fabs(with) * (ds_error + std::fabs(ds) * (half + (K + L * H + 8) * 2 * u)) + scale * flushed;
            };
            for (int64_t n = 0; n < D; n++) {
              const double kd = ks[(key + j) * D + n], qd = qs[row * D + n];
              dq_.add(row * D + n, ds * kd, share(kd));
              dk_.add((key + j) * D + n, ds * qd, share(qd));
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
