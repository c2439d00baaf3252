// Plain structs that kernels take: addresses, sizes and strides in elements. Shared by CPU, CUDA and the bindings.
#pragma once
#include <cstdint>

namespace fastattn {

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2, f64 = 3, i32 = 4, i64 = 5, u8 = 6 };

// Up to four dimensions, right-aligned: missing leading ones have size 1 and stride 0. data == nullptr: absent.
struct Tensor {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t size[4] = {1, 1, 1, 1};
  int64_t stride[4] = {0, 0, 0, 0};
};

// A struct's fields by name, its base's first: visit("a, b", a, b). The binding fills a struct by them.
#define FASTATTN_FIELDS(...)          \
  template <class Visit>              \
  void fields(const Visit& visit) {   \
    visit(#__VA_ARGS__, __VA_ARGS__); \
  }
#define FASTATTN_FIELDS_OF(Base, ...) \
  template <class Visit>              \
  void fields(const Visit& visit) {   \
    Base::fields(visit);              \
    visit(#__VA_ARGS__, __VA_ARGS__); \
  }

// Options of row kernels: a second thread runs from `serial` elements on; kernels prefetch `prefetch` bytes ahead.
struct RowsParams {
  int64_t serial = 1 << 14, prefetch = 512;
  int32_t threads = 1;
  FASTATTN_FIELDS(serial, prefetch, threads)
};

// normed = total * rsqrt(mean(total^2) + eps) * weight, total = x + residual. All (A, B, C, D) of one type, weight (D,)
// of it or f32, rstd (A, B, C, 1) f32, which may be absent.
struct RmsNormParams : RowsParams {
  Tensor x, residual, weight, normed, total, rstd;
  double eps = 1e-6;
  FASTATTN_FIELDS_OF(RowsParams, x, residual, weight, normed, total, rstd, eps)
};

// grad of total; weight_partials is (threads, D) f32, reduced by the caller in order. grad_total may be absent.
struct RmsNormBackwardParams : RowsParams {
  Tensor grad_normed, grad_total, total, weight, rstd, grad, weight_partials;
  FASTATTN_FIELDS_OF(RowsParams, grad_normed, grad_total, total, weight, rstd, grad, weight_partials)
};

// out = f(a, b) over (A, B, C, D), or with the gradient of out: (grad_a, grad_b). swiglu: a gate, b up; gated: a gate,
// b x.
struct GateParams : RowsParams {
  Tensor a, b, out;
  Tensor grad_out, grad_a, grad_b;
  FASTATTN_FIELDS_OF(RowsParams, a, b, out, grad_out, grad_a, grad_b)
};

// out (1, 1, M, N) = x (M, K) weight (N, K)^T for M <= 8; add: out, f32, += it. rows_at_once: the rows of weight that a
// thread reads at a time, 1, 2 or 4. dot: for M > 1, multiply bf16 x and weight by the bf16 dot, if the instruction set
// has one, instead of converting them to f32.
struct MatvecParams {
  Tensor x, weight, out;
  int32_t add = 0, rows_at_once = 1, dot = 0;
  int32_t threads = 1;
  FASTATTN_FIELDS(x, weight, out, add, rows_at_once, dot, threads)
};

// One token a row through a hierarchical recurrence of pre-norm blocks: H_cycles times (L_cycles L stacks, then the H
// stack). z_h, z_l, out (B, C), B <= 8; weights (2 * layers, 4) i64, the addresses of each layer's gqkv (4 H D, C),
// gate | q | k | v, o (C, H D), gate_up (2 I, C) and down (C, I), contiguous and of the states' dtype, first the L
// stack's. keys, values (calls * layers * B, H, capacity, D), to which row b's token is added at positions[b];
// positions, lengths = positions + 1 (B,) i32; cos, sin (R, D/2) f32 by position row rows[b], (B, 1) i32. rows_at_once:
// of a weight, as in MatvecParams.
struct DecodeStepParams {
  Tensor z_h, z_l, out, weights, keys, values, positions, lengths, cos, sin, rows;
  int64_t layers = 0, inner = 0, longest = 0;  // of a stack; I; the largest of lengths
  int32_t h_cycles = 1, l_cycles = 1, rows_at_once = 1;
  double eps = 1e-6;
  int32_t threads = 1;
  FASTATTN_FIELDS(z_h, z_l, out, weights, keys, values, positions, lengths, cos, sin, rows, layers, inner, longest,
                  h_cycles, l_cycles, rows_at_once, eps, threads)
};

// Rotates x (B, H, L, D) into out by cos/sin rows (R, D/2 or D) f32; rows (B or 1, 1, 1, L) i32 selects a token's row.
struct RotaryParams : RowsParams {
  Tensor x, out, cos, sin, rows;
  int32_t inverse = 0;
  FASTATTN_FIELDS_OF(RowsParams, x, out, cos, sin, rows, inverse)
};

// Which keys each query attends: what fastattn/masks.py describes. Index tensors are int32; dense, u8, is broadcast by
// strides of 0 to (B, Hq, Lq, Lk). An entry n - 2^31 of key_lengths: n keys, and the last query is aligned with the
// last of them, not of all. attention_mask.h says it row by row.
struct MaskParams {
  Tensor prefix_lengths, cu_seqlens_q, cu_seqlens_k, key_lengths, dense;
  // i32: row r, of (B or 1, list_heads, blocks of list_q queries), lists key blocks list_keys[list_offsets[r] ..
  // list_offsets[r + 1]] of list_k keys; list_starts and list_queries: a backward's, the same by key block
  Tensor list_offsets, list_keys, list_starts, list_queries;
  int32_t causal = 0;
  int64_t window_left = -1, window_right = -1;
  int64_t list_q = 1, list_k = 1, list_heads = 1;
  FASTATTN_FIELDS(prefix_lengths, cu_seqlens_q, cu_seqlens_k, key_lengths, dense, list_offsets, list_keys, list_starts,
                  list_queries, causal, window_left, window_right, list_q, list_k, list_heads)
};
inline int64_t length_of(int64_t entry) { return entry < 0 ? entry + (int64_t(1) << 31) : entry; }

// out = weights(scale * q k^T + bias) v under a mask, and its gradients. q, out (B, Hq, Lq, D), k, v (B, Hkv, Lk, D);
// bias and tile_class are broadcast by strides of 0 to (B, Hq, Lq, Lk), the last one to its tiles.
struct AttentionParams : MaskParams {
  Tensor q, k, v, out, lse;  // lse: of given weights a row's sum
  Tensor state;  // softmax, (B, Hq, Lq, 2) f32: a row's maximum of q.k (of the scores with a bias), log of the sum
                 // below it
  Tensor
      top_keys;  // softmax of a program, (B, Hq, Lq) i64: the first key of a row's largest score, -1: none above -inf
  Tensor bias;
  Tensor distances;   // (Hq, Lq + Lk - 1) f32 in place of a bias: what key j of a sequence adds for row i at
                      // j - (i + offset) + Lk - 1, offset from a row to the key on its diagonal
  Tensor tile_class;  // u8 by (block_q, block_k) tiles of dense, or of bias: 0 nothing attends, 1 everything, 2 mixed
  Tensor residual;    // of 16-bit outputs: what rounding took from out, which the backward adds again
  Tensor sink;        // softmax, (Hq,) f32: a score that takes a share of every row's weights and has no value
  Tensor rng;         // i64 (2,), seed and offset of what is dropped: attention_dropout.h
  Tensor grad_out, grad_lse, grad_q, grad_k, grad_v;
  Tensor grad_sink;  // (B, Hq, Lq) f32, of each row: to be summed
  // the bias's gradient, one of them. grad_bias: of a bias with a number for each key, as bias is broadcast; f32, zero
  // at first and summed in place, or of bias's dtype. grad_row_bias: (B, Hq, Lq) f32 of each row, to be summed
  Tensor grad_bias, grad_row_bias;
  Tensor grad_distances;  // as distances, zero at first, each head apart
  // i32 (words,): a score becomes what the program makes of it, in tiles of class 1 and of class 2, whose program masks
  // too; masked_program absent: the same in both. Of given weights it gives the weight itself. In place of bias,
  // distances and softcap: score_program.h
  Tensor program, masked_program;
  Tensor tables, indices;  // f32 and i32 (n,), what programs load from
  Tensor grad_tables;      // (copies, n of tables) f32, zero at first, to be summed: of tasks that are not in order
  double scale = 1, bias_value = 0;
  double softcap = 0;   // scores, before the bias, become softcap * tanh(score / softcap); 0: as they are
  int64_t dropped = 0;  // of 65536 weights, those that become 0; what is left is scaled up
  int32_t score = 0;
  int32_t default_bias = 0;             // use -log(keys of the sequence) in place of bias_value
  int64_t block_q = 96, block_k = 128;  // rows and keys of a tile
  int64_t pack_kib = 16384;             // packed keys and values kept at a time
  int64_t decode_rows = 8;              // rows a key head up to which a sequence is decoded: keys read in place, split
  int64_t chunk_k = 512;                // decoding: keys of one task
  int64_t bias_parts = 1, bias_part = 0;  // sums of grad_bias, f32, to be added: how many, elements between them
  int32_t threads = 1;
  FASTATTN_FIELDS_OF(MaskParams, q, k, v, out, lse, state, top_keys, bias, distances, tile_class, residual, sink, rng,
                     grad_out, grad_lse, grad_q, grad_k, grad_v, grad_sink, grad_bias, grad_row_bias, grad_distances,
                     program, masked_program, tables, indices, grad_tables, scale, bias_value, softcap, dropped, score,
                     default_bias, block_q, block_k, pack_kib, decode_rows, chunk_k, bias_parts, bias_part, threads)
};

// LSSA (reweigh == 0) and LSSAR. statistics (B, Hq, Lq, 3) f32: highest score, 1 / (highest - threshold) or 0, sum of
// weights.
struct LssaParams : AttentionParams {
  Tensor statistics;
  double power = 1;
  int32_t reweigh = 0;
  FASTATTN_FIELDS_OF(AttentionParams, statistics, power, reweigh)
};

// Causal softmax attention (but for a prefix) to a window on both sides and to shared groups. groups (B, Lq),
// key_groups (B, Lk) i64, contiguous.
struct GroupedParams : AttentionParams {
  Tensor groups, key_groups;
  int64_t window = 0;
  FASTATTN_FIELDS_OF(AttentionParams, groups, key_groups, window)
};

// Causal softmax attention (but for a prefix) with gated distant scores. assignment (B, L, G) f32, sharpness () f32;
// gate 0 multiplies, 1 adds the logarithm. Gradients to be summed over heads: grad_query_assignment (B, Hq, L, G),
// grad_key_assignment (B, Hkv, L, G), grad_sharpness (B, Hq, L), all f32.
struct GatedParams : AttentionParams {
  Tensor assignment, sharpness;
  Tensor grad_query_assignment, grad_key_assignment, grad_sharpness;
  int64_t window = 0;
  int32_t gate = 0;
  FASTATTN_FIELDS_OF(AttentionParams, assignment, sharpness, grad_query_assignment, grad_key_assignment, grad_sharpness,
                     window, gate)
};

// Linear attention: tokens decay, write to and read a state (dk, columns) of each value head. q, k (B, Hk, L, dk), v,
// out (B, Hv, L, dv); logarithms decay (1, B, Hv, L) f32, any strides, or channels (B, Hv, L, dk); beta (1, B, Hv, L)
// f32. decay, channels and beta may be absent. offsets (documents + 1,) i64 of a batch of one, or absent. columns = dv,
// or dv + 1 with normalize. initial, state (B or documents, Hv, dk, columns) f32. states (B, Hv * kept, dk, columns)
// f32: before every chunk, for document i from offsets[i] / chunk + i on; if not causal, after the last token. A task
// has a key head's value heads, or one of head_parts of them, or one of value_parts of a value head's columns. With
// parts = head_parts * value_parts > 1 the gradients of q and k are (parts * B, Hk, L, dk) f32. Gradients of decay and
// beta are (value_parts, B, Hv, L) f32, those of channels (value_parts * B, Hv, L, dk) f32.
struct LinearAttentionParams {
  Tensor q, k, v, decay, channels, beta, offsets, initial, out, state, states;
  Tensor grad_out, grad_state, grad_q, grad_k, grad_v, grad_decay, grad_channels, grad_beta, grad_initial;
  double scale = 1;
  int32_t delta_rule = 0, normalize = 0, qk_norm = 0, causal = 1;
  int64_t head_parts = 1, value_parts = 1;
  int32_t threads = 1;
  FASTATTN_FIELDS(q, k, v, decay, channels, beta, offsets, initial, out, state, states, grad_out, grad_state, grad_q,
                  grad_k, grad_v, grad_decay, grad_channels, grad_beta, grad_initial, scale, delta_rule, normalize,
                  qk_norm, causal, head_parts, value_parts, threads)
};

// One token of linear attention: q, k (1, B, Hk, dk), v, out (1, B, Hv, dv), decay, beta (1, 1, B, Hv) f32 or channels
// (1, B, Hv, dk). state (B, Hv, dk, columns) f32 is overwritten with the state after the token.
struct LinearStepParams {
  Tensor q, k, v, decay, channels, beta, state, out;
  double scale = 1;
  int32_t delta_rule = 0, normalize = 0, qk_norm = 0;
  int32_t threads = 1;
  FASTATTN_FIELDS(q, k, v, decay, channels, beta, state, out, scale, delta_rule, normalize, qk_norm, threads)
};

// Sinkhorn's iterations over the rows (T, G) of sequences: rows [begin, begin + count) of each; begins and counts (S,)
// i64. causal: the first prefix rows of a sequence share their sums; prefixes (S,) i64, or absent (0). Forward: out
// (T, G) is the assignment, potentials (S, G) f32. Backward: grad (T, G), out is the gradient of scores. Rows that
// belong to no sequence are not written.
struct SinkhornParams {
  Tensor scores, begins, counts, prefixes, out, potentials, grad;
  double temperature = 0.1;
  int64_t iterations = 10;
  int32_t causal = 0;
  int32_t threads = 1;
  FASTATTN_FIELDS(scores, begins, counts, prefixes, out, potentials, grad, temperature, iterations, causal, threads)
};

// y_t = bias + sum_k weight[:, k] x_{t-K+1+k}, or its SiLU, over each sequence's tokens. x, out (B, L, D); weight (D,
// K), bias (D,) of x's type or f32. A sequence is a batch entry, or with offsets cu_seqlens (S + 1,) i64 a document of
// a batch of one. initial_state, state (S, K - 1, D): the inputs before a sequence's first token and before its next
// one. Backward: grad_state (absent: zero), grad_x and grad_initial_state have these shapes; grad_sums (B, ceil(L /
// slice), K + 1, D) f32: gradients of taps and bias, summed over `slice` tokens each and then by the caller.
struct CausalConv1dParams {
  Tensor x, weight, bias, initial_state, cu_seqlens, out, state;
  Tensor grad_out, grad_state, grad_x, grad_initial_state, grad_sums;
  int64_t slice = 256;
  int32_t silu = 0;
  int32_t threads = 1;
  FASTATTN_FIELDS(x, weight, bias, initial_state, cu_seqlens, out, state, grad_out, grad_state, grad_x,
                  grad_initial_state, grad_sums, slice, silu, threads)
};

// h_t = a_t h_{t-1} + b_t over each sequence's tokens, as above, forwards or in reverse; log_a: e^a in place of a. a
// (of b's type or f32; broadcast by strides of 0), b, out (A, B, L, D); initial (S, D) f32, contiguous, or absent (0);
// S is A * B, or the number of documents. pairs: D complex numbers; every tensor is a view of the real parts, and each
// is followed by its imaginary part. Backward, from grad_out, a, initial and out: grad_b as b; grad_initial as initial,
// or absent; grad_a absent, or by grad_a_kind: 0 as b, of a's type; 1 summed over `slice` channels each, (ceil(D /
// slice), A * B, L); 2 summed over tokens, (S, segments, D); 1 and 2 are f32, and the caller reduces them further.
// segments: the number of parts of a sequence, more than 1 if threads would be idle; not with documents.
struct LinearScanParams {
  Tensor a, b, initial, cu_seqlens, out;
  Tensor grad_out, grad_a, grad_b, grad_initial;
  int32_t pairs = 0, reverse = 0, log_a = 0, grad_a_kind = 0;
  int64_t segments = 1, slice = 64;
  int32_t threads = 1;
  FASTATTN_FIELDS(a, b, initial, cu_seqlens, out, grad_out, grad_a, grad_b, grad_initial, pairs, reverse, log_a,
                  grad_a_kind, segments, slice, threads)
};

// Mamba-1 over each sequence's tokens, as above: d = dt + dt_bias, or its softplus; h = e^(d A) h + (d u) B_t;
// out = (C_t . h + D u) silu(z). u, dt, z, out (B, L, E) and B, C (B, L, N) of one type; A (E, N), D, dt_bias (E,) f32;
// initial_state, state (S, E, N) f32; D, z, dt_bias, initial_state may be absent. checkpoints (B, ceil(L / interval),
// N, E) f32: h before every interval-th token. Backward: grad_u, grad_dt, grad_z as u; summed over a batch entry's
// tokens grad_A (B, N, E), grad_D, grad_dt_bias (B, E); summed over `slice` channels each grad_B, grad_C (ceil(E /
// slice), B, L, N): all f32 and reduced by the caller.
struct SelectiveScanParams {
  Tensor u, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, out, state, checkpoints;
  Tensor grad_out, grad_state, grad_u, grad_dt, grad_A, grad_B, grad_C, grad_D, grad_z, grad_dt_bias;
  Tensor grad_initial_state;
  int64_t interval = 64, slice = 64;
  int32_t dt_softplus = 1;
  int32_t threads = 1;
  FASTATTN_FIELDS(u, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, out, state, checkpoints, grad_out,
                  grad_state, grad_u, grad_dt, grad_A, grad_B, grad_C, grad_D, grad_z, grad_dt_bias, grad_initial_state,
                  interval, slice, dt_softplus, threads)
};

// classes u8 of a dense bool mask or a floating bias (B or 1, H or 1, Lq, Lk), as tile_class above; room for a tile of
// block_q by block_k elements, which the kernel rounds up to its own multiples.
struct TileClassParams {
  Tensor mask, classes;
  int64_t block_q = 96, block_k = 64;
  int32_t threads = 1;
  FASTATTN_FIELDS(mask, classes, block_q, block_k, threads)
};

// Logits (R, C) of classes [first, first + C). They are prepared in place (f32 only): + bias, soft cap, and for
// stablemax / temperature. A class has the weight e^((x - row_max) / temperature + log_count), or s(x) / s(row_max) for
// stablemax; never e^x or e^(x - lse), because lse is rounded at x's magnitude. statistics: these columns are added to
// row_max (the largest prepared logit), row_sum (of the weights) and picked (the target's prepared logit). gradient:
// out (may be x) becomes the gradient of mass * (lse + z_loss * lse^2) - grad * x[target] for the unprepared x, from
// row_max and row_sum, which with statistics are computed first. out may be bf16 if x is f32; x is then overwritten.
struct VocabRowsParams {
  Tensor x, out, bias, target, temperature;  // (R, C), (R, C), (C,) f32, (R,) i32 or i64, (R,) f32
  Tensor log_count;                          // (C,) f32 or absent (0), not with temperature or z_loss
  Tensor row_max, row_sum, picked;           // (R,) f32
  Tensor grad, mass, grad_temperature;       // (R,) f32; mass may be absent (grad); the last is added to
  int64_t first = 0, ignore_index = 0;       // rows with this target give zeros
  double softcap = 0, z_loss = 0;            // softcap 0: none
  int32_t stablemax = 0, statistics = 0, gradient = 0;
  int32_t threads = 1;
  FASTATTN_FIELDS(x, out, bias, target, temperature, log_count, row_max, row_sum, picked, grad, mass, grad_temperature,
                  first, ignore_index, softcap, z_loss, stablemax, statistics, gradient, threads)
};

// The tokens of a head with a codebook: codes (V,) i32 or i64 in [0, K), bias (V,) f32 or absent (zero).
struct VocabTokensParams {
  Tensor codes, bias;
  Tensor largest;         // (K,) f32 each code's largest bias
  Tensor beta, sums;      // (K,) f32 logsumexp by code of (bias - largest) * inverse_temperature; (K,) f64 scratch
  Tensor best;            // (K,) i64 the first token of the largest bias, V where a code has none; beta: that bias
  Tensor mass, out;       // (K,) f32, (V,) f32: out_i = exp(bias_i - largest_c - beta_c) * mass_c with c = codes_i
  Tensor order, offsets;  // (V,) i32 tokens by code, lowest first; (K + 1,) i64 where each code's begin
  double inverse_temperature = 1;
  FASTATTN_FIELDS(codes, bias, largest, beta, sums, best, mass, out, order, offsets, inverse_temperature)
};

// out (R,) i64: for each row a code from softmax((scores + largest) * inverse_temperature + beta), then one of its
// tokens.
struct VocabSampleParams {
  Tensor scores, uniform;  // (R, K) f32, overwritten; (R, 2) f64
  Tensor largest, beta, bias, order, offsets, out;
  double inverse_temperature = 1;
  int32_t threads = 1;
  FASTATTN_FIELDS(scores, uniform, largest, beta, bias, order, offsets, out, inverse_temperature, threads)
};

// out (R,) i64: the id of the largest x . codebook_k + offset_k, the lowest id among equals. scores (R, K) f32 are the
// products within slack * |x| + offset_slack; candidates that are this close are compared in f64.
struct VocabBestParams {
  Tensor scores, x, codebook, offset, ids, out;  // offset (K,) f64; ids (K,) i64 or absent (k)
  double slack = 0, offset_slack = 0;
  int32_t threads = 1;
  FASTATTN_FIELDS(scores, x, codebook, offset, ids, out, slack, offset_slack, threads)
};

// out (R, K) f32 = x (R, d) codebook (K, d)^T for a few rows; squares (K,) f32, if given: of codebook rows.
struct VocabDotsParams {
  Tensor x, codebook, out, squares;
  int32_t threads = 1;
  FASTATTN_FIELDS(x, codebook, out, squares, threads)
};

// logits (R, V) = scores (R, K) f32 at codes, + bias; for collect, scores = the logits summed by code.
struct VocabExpandParams {
  Tensor scores, codes, bias, logits;
  int32_t threads = 1;
  FASTATTN_FIELDS(scores, codes, bias, logits, threads)
};

// digest i64 (1,) of a contiguous source u8 (bytes,).
struct DigestParams {
  Tensor source, digest;
  int32_t threads = 1;
  FASTATTN_FIELDS(source, digest, threads)
};

// Packs B (steps, columns) of a product into `packed`: source is (columns, steps), or (steps, columns) when transposed.
// parts: the number of equal runs of columns, each padded by itself. If packed is absent, its size in bytes is written
// to `bytes` (1,) i64.
struct PackParams {
  Tensor source, packed, bytes;
  int32_t transposed = 0, parts = 1;
  int32_t threads = 1;
  FASTATTN_FIELDS(source, packed, bytes, transposed, parts, threads)
};

// out (M, N) = epilogue(prologue(x) B), sums in f32. x (A, B, H, D): M = A * B rows of K = H * D elements; transposed:
// (K, M). Prologue: * sigmoid(gate) with gate as x, or * the row's rstd, which is written to rstd (M,) f32. Epilogue:
// if gated_up, B has 2N columns, gate and up, and the result is silu(gate) * up; `product` (M, 2N), if given, gets the
// product; then + residual (M, N), which may be out. out has x's dtype or f32; product and residual have out's.
struct LinearParams {
  Tensor x, gate, packed, residual, out, product, rstd;
  double eps = 0;
  int32_t transposed = 0, norm = 0, gated_up = 0;
  int64_t block_rows = 192, block_columns = 128, block_steps = 1024;  // of a task; steps of a pass over the contraction
  int32_t threads = 1;
  FASTATTN_FIELDS(x, gate, packed, residual, out, product, rstd, eps, transposed, norm, gated_up, block_rows,
                  block_columns, block_steps, threads)
};

// `iterations` of multiply-add chains in registers on every thread. operations (1,) i64: counted in one iteration of
// one thread, 0 where the instruction set has no bf16 dot; sink (threads,) f32 keeps the work from being dropped.
struct PeakParams {
  Tensor sink, operations;
  int64_t iterations = 1;
  int32_t bf16 = 0;
  int32_t threads = 1;
  FASTATTN_FIELDS(sink, operations, iterations, bf16, threads)
};

}  // namespace fastattn
