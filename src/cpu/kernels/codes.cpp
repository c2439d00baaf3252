// Kernels of a head with a codebook: sums over the tokens of each code, the largest logit, and sampling.
#include "../arena.h"
#include "../cross_entropy.h"

namespace fastattn {
namespace FASTATTN_ISA {

FASTATTN_INLINE float bias_at(const Tensor& bias, int64_t i) { return bias.data ? *float_at(bias, i) : 0.0f; }

// largest_k, the largest bias of the code's tokens, and beta_k = logsumexp of (bias - largest_k) * inverse_temperature.
// Both are -inf for a code without tokens.
void vocab_code_bias(const VocabTokensParams& p) {
  const int64_t tokens = p.codes.size[3], codes = p.beta.size[3];
  float* beta = (float*)p.beta.data;
  float* most = (float*)p.largest.data;
  double* sums = (double*)p.sums.data;
  const float over = (float)p.inverse_temperature;
  for (int64_t k = 0; k < codes; k++) most[k] = -kInfinity, sums[k] = 0;
  if (!p.bias.data) {
    for (int64_t i = 0; i < tokens; i++) sums[index_at(p.codes, i)] += 1;
    for (int64_t k = 0; k < codes; k++) {
      beta[k] = (float)__builtin_log(sums[k]);
      if (sums[k] > 0) most[k] = 0.0f;
    }
    return;
  }
  for (int64_t i = 0; i < tokens; i++) {
    const float b = *float_at(p.bias, i);
    float& largest = most[index_at(p.codes, i)];
    largest = b > largest ? b : largest;
  }
  for (int64_t i = 0; i < tokens; i += W) {
    const int n = (int)min64(W, tokens - i);
    vf shifted = splat(-kInfinity);
    for (int w = 0; w < n; w++) {
      const float largest = most[index_at(p.codes, i + w)];
      const float b = *float_at(p.bias, i + w);
      shifted[w] = largest == -kInfinity && b == b ? -kInfinity : (b - largest) * over;
    }
    const vf e = exp(shifted);
    for (int w = 0; w < n; w++) sums[index_at(p.codes, i + w)] += e[w];
  }
  for (int64_t k = 0; k < codes; k++) beta[k] = (float)__builtin_log(sums[k]);
}

template <class I>
static void best_tokens_of(const VocabTokensParams& p, const I* code_of) {
  const int64_t tokens = p.codes.size[3], codes = p.beta.size[3];
  const float* bias = (const float*)p.bias.data;
  float* largest = (float*)p.beta.data;
  int64_t* best = (int64_t*)p.best.data;
  for (int64_t k = 0; k < codes; k++) largest[k] = -kInfinity, best[k] = tokens;
  for (int64_t i = tokens - 1; i >= 0; i--) {  // backwards, so that the first of equals is written last
    const int64_t k = code_of[i];
    const float b = bias ? bias[i] : 0.0f;
    if (!(b < largest[k])) best[k] = i, largest[k] = b;  // a NaN counts as largest, so that best is always a token
  }
}
// For each code the first token with the largest bias, and that bias.
void vocab_best_tokens(const VocabTokensParams& p) {
  if (p.codes.dtype == DType::i64)
    best_tokens_of(p, (const int64_t*)p.codes.data);
  else
    best_tokens_of(p, (const int32_t*)p.codes.data);
}

void vocab_bias_gradient(const VocabTokensParams& p) {
  const int64_t tokens = p.codes.size[3];
  const float* most = (const float*)p.largest.data;
  const float* beta = (const float*)p.beta.data;
  const float* mass = (const float*)p.mass.data;
  float* out = (float*)p.out.data;
  for (int64_t i = 0; i < tokens; i += W) {
    const int n = (int)min64(W, tokens - i);
    vf shifted = {}, share = {};
    for (int w = 0; w < n; w++) {
      const int64_t k = index_at(p.codes, i + w);
      const float b = bias_at(p.bias, i + w);
      shifted[w] = b == -kInfinity ? b : b - most[k] - beta[k];
      share[w] = mass[k];
    }
    put(out + i, exp(shifted) * share, n);
  }
}

// A counting sort of tokens by code. Tokens of one code keep their order.
void vocab_group(const VocabTokensParams& p) {
  const int64_t tokens = p.codes.size[3], codes = p.offsets.size[3] - 1;
  int32_t* order = (int32_t*)p.order.data;
  int64_t* offsets = (int64_t*)p.offsets.data;
  for (int64_t k = 0; k <= codes; k++) offsets[k] = 0;
  for (int64_t i = 0; i < tokens; i++) offsets[index_at(p.codes, i) + 1]++;
  for (int64_t k = 0; k < codes; k++) offsets[k + 1] += offsets[k];
  for (int64_t i = 0; i < tokens; i++) order[offsets[index_at(p.codes, i)]++] = (int32_t)i;
  for (int64_t k = codes; k > 0; k--) offsets[k] = offsets[k - 1];  // each had moved to its end
  offsets[0] = 0;
}

// The first index whose cumulative weight exceeds uniform * total; if rounding leaves none, the last with a weight.
template <class F>
FASTATTN_INLINE int64_t pick(int64_t count, double uniform, const F& weight) {
  double total = 0, sum = 0;
  for (int64_t i = 0; i < count; i++) total += weight(i);
  int64_t last = 0;
  for (int64_t i = 0; i < count; i++) {
    const double w = weight(i);
    sum += w;
    if (w > 0) last = i;
    if (sum > uniform * total) return i;
  }
  return last;
}

void vocab_sample(const VocabSampleParams& p) {
  const int64_t codes = p.scores.size[3];
  const vf over = splat((float)p.inverse_temperature);
  const float* largest = (const float*)p.largest.data;
  const float* beta = (const float*)p.beta.data;
  const int32_t* order = (const int32_t*)p.order.data;
  const int64_t* offsets = (const int64_t*)p.offsets.data;
  const int threads = row_threads(p.threads, p.scores.size[2], codes);
  parallel_ranges(p.scores.size[2], threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; r++) {
      float* x = (float*)p.scores.data + r * p.scores.stride[2];
      const double* uniform = (const double*)p.uniform.data + r * p.uniform.stride[2];
      for_columns(codes, [&](int64_t k, int n) { put(x + k, get(x + k, n) + get(largest + k, n), n); });
      // differences to the best token, so that a small temperature does not make two infinities
      const vf best = splat(row_maximum(x, codes));
      for_columns(codes,
                  [&](int64_t k, int n) { put(x + k, exp((get(x + k, n) - best) * over + get(beta + k, n)), n); });
      const int64_t code = pick(codes, uniform[0], [&](int64_t k) { return (double)x[k]; });
      const int64_t first = offsets[code], count = offsets[code + 1] - first;
      const int64_t within = pick(count, uniform[1], [&](int64_t i) {
        if (!p.bias.data) return 1.0;
        const float b = *float_at(p.bias, order[first + i]);
        return b == -kInfinity ? 0.0 : __builtin_exp(((double)b - (double)largest[code]) * p.inverse_temperature);
      });
      // a row of NaN can select a code without tokens
      ((int64_t*)p.out.data)[r] = count ? order[first + within] : 0;
    }
  });
}

template <class T>
static double exact_score(const T* x, const T* c, int64_t d, double offset) {
  double s[4] = {};
  int64_t i = 0;
  for (; i + W <= d; i += W) {
    const vf a = load(x + i), b = load(c + i);
    for (int w = 0; w < W; w++) s[w & 3] += (double)a[w] * (double)b[w];
  }
  for (; i < d; i++) s[0] += (double)scalar_at(x + i) * (double)scalar_at(c + i);
  return (s[0] + s[1]) + (s[2] + s[3]) + offset;
}

template <class T>
static void vocab_best_of(const VocabBestParams& p) {
  const int64_t codes = p.scores.size[3], d = p.x.size[3];
  const double* offset = (const double*)p.offset.data;
  const int64_t* ids = (const int64_t*)p.ids.data;
  const int threads = row_threads(p.threads, p.scores.size[2], codes);
  parallel_ranges(p.scores.size[2], threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; r++) {
      const float* scores = (const float*)p.scores.data + r * p.scores.stride[2];
      const T* x = (const T*)p.x.data + r * p.x.stride[2];
      double norm = 0, best = -kInfinity;
      for (int64_t i = 0; i < d; i++) norm += (double)scalar_at(x + i) * (double)scalar_at(x + i);
      for (int64_t k = 0; k < codes; k++) {
        const double s = (double)scores[k] + offset[k];
        best = s > best ? s : best;
      }
      const double reach = p.slack * __builtin_sqrt(norm) + p.offset_slack;
      // with a NaN, or products that overflow f32, no order is sure: compare every code
      const double least = reach < kInfinity && best < kInfinity ? best - reach : -kInfinity;
      int64_t first = -1, chosen = -1;
      double first_score = 0;
      bool exact = false;
      for (int64_t k = 0; k < codes; k++) {
        if ((double)scores[k] + offset[k] < least) continue;
        const int64_t id = ids ? ids[k] : k;
        if (first < 0) {
          first = k, chosen = id;
          continue;
        }
        if (!exact) {
          first_score = exact_score(x, (const T*)p.codebook.data + first * p.codebook.stride[2], d, offset[first]);
          exact = true;
          if (!(first_score > -kInfinity)) first_score = -kInfinity, chosen = -1;
        }
        const double s = exact_score(x, (const T*)p.codebook.data + k * p.codebook.stride[2], d, offset[k]);
        if (s > first_score || (s == first_score && id < chosen)) first_score = s, chosen = id;
      }
      if (chosen < 0)  // no score is above -inf: take the lowest id
        for (int64_t k = 0; k < codes; k++) {
          const int64_t id = ids ? ids[k] : k;
          chosen = chosen < 0 || id < chosen ? id : chosen;
        }
      ((int64_t*)p.out.data)[r] = chosen;
    }
  });
}

template <class T, bool Squares>
FASTATTN_INLINE float dot_row(const T* x, const T* c, int64_t d, float* square) {
  vf s[4] = {}, q[4] = {};
  int64_t i = 0;
  const auto add = [&](int64_t j, int n, int u) {
    const vf a = get(c + j, n);
    s[u] += get(x + j, n) * a;
    if constexpr (Squares) q[u] += a * a;
  };
  for (; i + 4 * W <= d; i += 4 * W)
    for (int u = 0; u < 4; u++) add(i + u * W, W, u);
  for_columns(d - i, [&](int64_t j, int n) { add(i + j, n, 0); });
  if constexpr (Squares) *square = reduce_add((q[0] + q[1]) + (q[2] + q[3]));
  return reduce_add((s[0] + s[1]) + (s[2] + s[3]));
}

template <class T>
static void vocab_dots_of(const VocabDotsParams& p) {
  const int64_t rows = p.x.size[2], d = p.x.size[3], codes = p.codebook.size[2];
  parallel_ranges(codes, row_threads(p.threads, codes, d), [&](int64_t begin, int64_t end, int) {
    for (int64_t k = begin; k < end; k++) {
      const T* c = (const T*)p.codebook.data + k * p.codebook.stride[2];
      for (int64_t r = 0; r < rows; r++) {
        const T* x = (const T*)p.x.data + r * p.x.stride[2];
        float& out = ((float*)p.out.data)[r * p.out.stride[2] + k];
        if (r == 0 && p.squares.data)
          out = dot_row<T, true>(x, c, d, float_at(p.squares, k));
        else
          out = dot_row<T, false>(x, c, d, nullptr);
      }
    }
  });
}

constexpr int64_t kExpandBlock = 8192;

template <class T>
static void vocab_expand_of(const VocabExpandParams& p) {
  const int64_t rows = p.logits.size[2], tokens = p.logits.size[3];
  const int64_t blocks = (tokens + kExpandBlock - 1) / kExpandBlock;
  parallel_ranges(rows * blocks, row_threads(p.threads, rows, tokens), [&](int64_t begin, int64_t end, int) {
    for (int64_t item = begin; item < end; item++) {
      const int64_t r = item / blocks, first = item % blocks * kExpandBlock, stop = min64(tokens, first + kExpandBlock);
      const float* scores = (const float*)p.scores.data + r * p.scores.stride[2];
      T* out = (T*)p.logits.data + r * p.logits.stride[2];
      for (int64_t i = first; i < stop; i += W) {
        const int n = (int)min64(W, stop - i);
        vf y = {};
        for (int w = 0; w < n; w++) y[w] = scores[index_at(p.codes, i + w)];
        if (p.bias.data) y += get((const float*)p.bias.data + i, n);
        put(out + i, y, n);
      }
    }
  });
}

template <class T>
static void vocab_collect_of(const VocabExpandParams& p) {
  const int64_t rows = p.logits.size[2], tokens = p.logits.size[3], codes = p.scores.size[3];
  const int threads = row_threads(p.threads, rows, tokens);
  double* memory = nullptr;
  with_scratch(0, [&](Arena& arena) { memory = arena.take<double>(threads * codes); });
  parallel_ranges(rows, threads, [&](int64_t begin, int64_t end, int thread) {
    double* sums = memory + thread * codes;
    for (int64_t r = begin; r < end; r++) {
      const T* g = (const T*)p.logits.data + r * p.logits.stride[2];
      float* scores = (float*)p.scores.data + r * p.scores.stride[2];
      for (int64_t k = 0; k < codes; k++) sums[k] = 0;
      for (int64_t i = 0; i < tokens; i++) sums[index_at(p.codes, i)] += (double)scalar_at(g + i);
      for (int64_t k = 0; k < codes; k++) scores[k] = (float)sums[k];
    }
  });
}

void vocab_best(const VocabBestParams& p) {
  with_dtype(p.x.dtype, [&](auto* t) { vocab_best_of<std::remove_pointer_t<decltype(t)>>(p); });
}
void vocab_dots(const VocabDotsParams& p) {
  with_dtype(p.x.dtype, [&](auto* t) { vocab_dots_of<std::remove_pointer_t<decltype(t)>>(p); });
}
void vocab_expand(const VocabExpandParams& p) {
  with_dtype(p.logits.dtype, [&](auto* t) { vocab_expand_of<std::remove_pointer_t<decltype(t)>>(p); });
}
void vocab_collect(const VocabExpandParams& p) {
  with_dtype(p.logits.dtype, [&](auto* t) { vocab_collect_of<std::remove_pointer_t<decltype(t)>>(p); });
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
