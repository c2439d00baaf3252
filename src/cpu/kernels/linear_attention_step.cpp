// One token of linear attention. A block of columns of the state is read once for the token's output and once more for
// its update; between the two it stays in the first-level cache.
#include "../convert.h"
#include "../limits.h"
#include "../linear_divisor.h"
#include "../math.h"
#include "../parallel.h"

namespace fastattn {
namespace FASTATTN_ISA {

constexpr int kStepVectors = 4;
constexpr int64_t kStepColumns = kStepVectors * W;

// Queries, keys and factors of one value head, in float32.
struct StepHead {
  float q[limits::state_dim + W], k[limits::state_dim + W], factor[limits::state_dim + W];
  float product, beta;  // q.k
  int64_t key_dim;

  StepHead(const LinearStepParams& p, int64_t b, int64_t head) : key_dim(p.q.size[3]) {
    const int64_t key_head = head / (p.v.size[2] / p.q.size[2]);
    load(q, p.q, b, key_head, p.qk_norm);
    load(k, p.k, b, key_head, p.qk_norm);
    vf sum{};
    for (int64_t d = 0; d < key_dim; d += W) sum += FASTATTN_ISA::load(q + d) * FASTATTN_ISA::load(k + d);
    product = reduce_add(sum);
    beta = p.beta.data ? *gate(p.beta, b, head) : 1.0f;
    if (p.channels.data) {
      load(factor, p.channels, b, head, false);
      for (int64_t d = 0; d < key_dim; d += W) store(factor + d, exp(FASTATTN_ISA::load(factor + d)));
    } else {
      const vf a = p.decay.data ? exp(splat(*gate(p.decay, b, head))) : splat(1.0f);
      for (int64_t d = 0; d < key_dim; d += W) store(factor + d, a);
    }
  }

 private:
  static const float* gate(const Tensor& t, int64_t b, int64_t head) {
    return (const float*)t.data + b * t.stride[2] + head * t.stride[3];
  }
  void load(float* to, const Tensor& from, int64_t b, int64_t head, bool norm) const {
    with_dtype(from.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      const T* x = (const T*)from.data + b * from.stride[1] + head * from.stride[2];
      for (int64_t d = 0; d < key_dim; d += W) store(to + d, load_n(x + d, (int)min64(W, key_dim - d)));
    });
    if (!norm) return;
    vf sum{};
    for (int64_t d = 0; d < key_dim; d += W) sum += FASTATTN_ISA::load(to + d) * FASTATTN_ISA::load(to + d);
    const float factor = 1.0f / __builtin_sqrtf(reduce_add(sum) + 1e-6f);
    for (int64_t d = 0; d < key_dim; d += W) store(to + d, FASTATTN_ISA::load(to + d) * factor);
  }
};

// `count` columns (kWhole: kStepColumns) of a state whose rows are `stride` apart, for values v. out = scale * S^T q.
template <bool kWhole>
FASTATTN_INLINE void step_columns(const StepHead& head, float* state, int64_t stride, int64_t count, const float* v,
                                  float scale, bool delta, float* out) {
  const int vectors = kWhole ? kStepVectors : int((count + W - 1) / W);
  const auto at = [&](int64_t d, int j) {
    const float* x = state + d * stride + j * W;
    return kWhole ? load(x) : load_n(x, (int)min64(W, count - j * W));
  };
  vf known[kStepVectors] = {}, read[kStepVectors] = {}, written[kStepVectors];
  for (int64_t d = 0; d < head.key_dim; d++) FASTATTN_EACH(j, kStepVectors) {
      if (j >= vectors) break;
      const vf x = at(d, j) * head.factor[d];
      if (delta) known[j] += x * head.k[d];
      read[j] += x * head.q[d];
    }
  FASTATTN_EACH(j, kStepVectors) {
    if (j >= vectors) break;
    written[j] = (load(v + j * W) - known[j]) * head.beta;
    store(out + j * W, (read[j] + written[j] * head.product) * scale);
  }
  for (int64_t d = 0; d < head.key_dim; d++) FASTATTN_EACH(j, kStepVectors) {
      if (j >= vectors) break;
      const vf x = at(d, j) * head.factor[d] + written[j] * head.k[d];
      float* to = state + d * stride + j * W;
      if (kWhole)
        store(to, x);
      else
        store_n(to, x, (int)min64(W, count - j * W));
    }
}

void linear_attention_step(const LinearStepParams& p) {
  const int64_t heads = p.v.size[2], dv = p.v.size[3], columns = p.state.size[3];
  const int64_t blocks = p.normalize ? 1 : (columns + kStepColumns - 1) / kStepColumns;
  const int64_t count = p.state.size[0] * heads * blocks;
  const int threads = threads_for(p.threads, p.state.size[0] * heads * columns * p.q.size[3]);
  parallel_ranges(count, threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t n = begin; n < end; n++) {
      const int64_t b = n / blocks / heads, h = n / blocks % heads;
      const StepHead head(p, b, h);
      float* state = (float*)p.state.data + b * p.state.stride[0] + h * p.state.stride[1];
      float divisor = 1;  // what of a state's last column the token reads
      if (p.normalize) {
        float sum = 0;
        for (int64_t d = 0; d < head.key_dim; d++)
          sum += state[d * p.state.stride[2] + dv] * head.factor[d] * head.q[d];
        divisor = (sum + head.product * head.beta) * (float)p.scale;
      }
      const int64_t first = p.normalize ? 0 : n % blocks * kStepColumns;
      const int64_t last = p.normalize ? columns : min64(columns, first + kStepColumns);
      for (int64_t c = first; c < last; c += kStepColumns) {
        const int64_t width = min64(kStepColumns, columns - c);
        float v[kStepColumns] = {}, out[kStepColumns];
        with_dtype(p.v.dtype, [&](auto* type) {
          using T = std::remove_pointer_t<decltype(type)>;
          const T* x = (const T*)p.v.data + b * p.v.stride[1] + h * p.v.stride[2];
          for (int64_t j = 0; j < width; j += W)
            if (c + j < dv) store(v + j, load_n(x + c + j, (int)min64(W, dv - c - j)));
          if (c + width > dv) v[dv - c] = 1;
          if (width == kStepColumns)
            step_columns<true>(head, state + c, p.state.stride[2], width, v, (float)p.scale, p.delta_rule, out);
          else
            step_columns<false>(head, state + c, p.state.stride[2], width, v, (float)p.scale, p.delta_rule, out);
          T* to = (T*)p.out.data + b * p.out.stride[1] + h * p.out.stride[2];
          for (int64_t j = 0; j < width; j += W)
            if (c + j < dv)
              store_n(to + c + j, p.normalize ? divided(load(out + j), divisor) : load(out + j),
                      (int)min64(W, dv - c - j));
        });
      }
    }
  });
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
