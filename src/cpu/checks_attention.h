// The checks of attention and of the ops that share its parameters: see checks.h.
#pragma once
#include "attention_score.h"
#include "checks_words.h"
#include "score_program.h"

namespace fastattn {

// Lists of `columns` blocks, `rows` of them for each (batch entry, head).
inline void check_lists(const Checks& c, const char* name, const Tensor& offsets, const Tensor& keys, int64_t batch,
                        int64_t rows, int64_t columns) {
  const int64_t entries = offsets.size[3], there = keys.data ? keys.size[3] : 0;
  c.contiguous(name, offsets, {1, 1, 1, entries}, DType::i32);
  c.require(entries == rows + 1 || entries == batch * rows + 1, name, "must have an entry more than there are rows");
  c.contiguous(name, keys, {1, 1, 1, there}, DType::i32);
  const int32_t *at = (const int32_t*)offsets.data, *key = (const int32_t*)keys.data;
  c.index(name, 0, at[0], 0, 0);
  for (int64_t row = 0; row + 1 < entries; row++) {
    c.index(name, row + 1, at[row + 1], at[row], there);
    for (int64_t i = at[row], before = -1; i < at[row + 1]; before = key[i++])
      c.index(name, i, key[i], before + 1, columns - 1);
  }
}
inline void check_lists(const Checks& c, const MaskParams& p, const Size& scores) {
  c.in("list_q", p.list_q, 1, INT32_MAX);
  c.in("list_k", p.list_k, 1, INT32_MAX);
  c.in("list_heads", p.list_heads, 1, INT32_MAX);
  if (!p.list_offsets.data) {
    c.require(!p.list_starts.data, "list_starts", "goes with list_offsets");
    return;
  }
  const int64_t batch = scores.of[0], heads = scores.of[1];
  c.require(heads % p.list_heads == 0, "list_heads", "must divide the heads");
  c.require(p.list_k >= limits::list_keys && p.list_k % 2 == 0, "list_k", "must be even, and 16 at least");
  c.require(!p.cu_seqlens_q.data, "list_offsets", "go without packed documents");
  const int64_t q_blocks = (scores.of[2] + p.list_q - 1) / p.list_q,
                k_blocks = (scores.of[3] + p.list_k - 1) / p.list_k;
  check_lists(c, "list_keys", p.list_offsets, p.list_keys, batch, p.list_heads * q_blocks, k_blocks);
  if (!c.backward()) return;
  c.require(p.list_starts.data &&
                p.list_starts.size[3] - 1 == (p.list_offsets.size[3] - 1) / (q_blocks ? q_blocks : 1) * k_blocks,
            "list_starts", "must be list_offsets transposed");
  check_lists(c, "list_queries", p.list_starts, p.list_queries, batch, p.list_heads * k_blocks, q_blocks);
}

// The mask of scores (batch, heads, rows, keys).
inline void check_mask(const Checks& c, const MaskParams& p, const Size& scores) {
  const int64_t batch = scores.of[0], rows = scores.of[2], keys = scores.of[3];
  if (p.dense.data) c.tensor("dense", p.dense, scores, DType::u8);
  const bool packed = p.cu_seqlens_q.data;
  c.require(packed == (p.cu_seqlens_k.data != nullptr), "cu_seqlens_k", "goes with cu_seqlens_q");
  c.require(!packed || batch == 1, "cu_seqlens_q", "needs a batch of one");
  const int64_t entries = p.cu_seqlens_q.size[3], sequences = packed ? entries - 1 : batch;
  const auto entry = [](const Tensor& t, int64_t i) { return (int64_t)((const int32_t*)t.data)[i]; };
  const auto offsets = [&](const char* name, const Tensor& t, int64_t length) {
    c.contiguous(name, t, {1, 1, 1, entries}, DType::i32);
    for (int64_t i = 0; i < entries; i++) c.index(name, i, entry(t, i), i ? entry(t, i - 1) : 0, i ? length : 0);
  };
  if (packed) {
    c.in("cu_seqlens_q's entries", entries, 1, INT64_MAX);
    offsets("cu_seqlens_q", p.cu_seqlens_q, rows);
    offsets("cu_seqlens_k", p.cu_seqlens_k, keys);
  }
  const auto lengths = [&](const char* name, const Tensor& t, bool aligned) {
    if (!t.data) return;
    c.contiguous(name, t, {1, 1, 1, sequences}, DType::i32);
    for (int64_t i = 0; i < sequences; i++) {
      const int64_t most = packed ? entry(p.cu_seqlens_k, i + 1) - entry(p.cu_seqlens_k, i) : keys;
      const int64_t given = entry(t, i), length = aligned ? length_of(given) : given;
      c.index(name, i, length > most ? given : length, 0, most);
    }
  };
  lengths("prefix_lengths", p.prefix_lengths, false);
  lengths("key_lengths", p.key_lengths, true);
  check_lists(c, p, scores);
  c.in("window_left", p.window_left, INT64_MIN, limits::length);
  c.in("window_right", p.window_right, INT64_MIN, limits::length);
}

// What every kind of attention takes.
inline void check_attention(const Checks& c, const AttentionParams& p) {
  c.floating("q", p.q);
  const int64_t batch = p.q.size[0], heads = p.q.size[1], rows = p.q.size[2], head_dim = p.q.size[3];
  const int64_t kv_heads = p.k.size[1], keys = p.k.size[2], value_dim = p.v.size[3];
  c.in("k's heads", kv_heads, 1, INT64_MAX);
  c.require(heads % kv_heads == 0, "k", "must have a number of heads that divides q's");
  c.in("q's last dimension", head_dim, 1, limits::head_dim);
  c.in("v's last dimension", value_dim, 1, limits::head_dim);
  c.in("q's length", rows, 0, limits::length);
  c.in("k's length", keys, 0, limits::length);
  c.tensor("k", p.k, {batch, kv_heads, keys, head_dim}, p.q.dtype);
  c.tensor("v", p.v, {batch, kv_heads, keys, value_dim}, p.q.dtype);
  c.tensor("out", p.out, {batch, heads, rows, value_dim}, p.q.dtype);
  if (c.backward()) {
    c.like("grad_out", p.grad_out, p.out);
    if (p.grad_lse.data) c.strided("grad_lse", p.grad_lse, {1, batch, heads, rows}, DType::f32);
    c.like("grad_q", p.grad_q, p.q);
    c.like("grad_k", p.grad_k, p.k);
    c.like("grad_v", p.grad_v, p.v);
  }
  if (p.bias.data) c.tensor("bias", p.bias, {batch, heads, rows, keys}, p.q.dtype);
  check_mask(c, p, {batch, heads, rows, keys});
  c.in("block_q", p.block_q, 1, limits::block);
  c.in("block_k", p.block_k, 1, limits::block);
  c.in("pack_kib", p.pack_kib, 0, INT32_MAX);
  c.in("chunk_k", p.chunk_k, 1, limits::length);
  c.require(!std::isnan(p.bias_value), "bias_value", "must be a number");
  // kernels multiply by both at once
  c.require(!std::isfinite((float)p.scale) || std::isfinite((float)(p.scale * 1.4426950408889634)), "scale",
            "must be a float32 with log2(e) as a factor too");
  if (p.tile_class.data) {
    c.tensor("tile_class", p.tile_class, {batch, heads, p.tile_class.size[2], p.tile_class.size[3]}, DType::u8);
    c.in("tile_class's rows", p.tile_class.size[2], (rows + p.block_q - 1) / p.block_q, INT64_MAX);
    c.in("tile_class's columns", p.tile_class.size[3], (keys + p.block_k - 1) / p.block_k, INT64_MAX);
    c.require(!p.cu_seqlens_q.data, "tile_class", "is of no packed documents");
  }
}

// What only attention itself has.
inline void check_no_options(const Checks& c, const AttentionParams& p) {
  c.require(!p.residual.data, "residual", "is not served");
  c.require(!p.sink.data, "sink", "is not served");
  c.require(p.softcap == 0, "softcap", "is not served");
  c.require(p.dropped == 0, "dropped", "is not served");
  c.require(!p.grad_bias.data, "grad_bias", "is not served");
  c.require(!p.grad_row_bias.data, "grad_row_bias", "is not served");
  c.require(!p.distances.data, "distances", "is not served");
  c.require(!p.program.data, "program", "is not served");
  c.require(!p.top_keys.data, "top_keys", "is not served");
  c.require(!p.list_offsets.data, "list_offsets", "are not served");
}
inline void check_program(const Checks& c, const AttentionParams& p) {
  if (!p.program.data) {
    c.require(!p.masked_program.data, "masked_program", "goes with program");
    c.require(!p.grad_tables.data, "grad_tables", "goes with program");
    return;
  }
  c.require(!p.bias.data && !p.distances.data && p.softcap == 0, "program", "goes without bias, distances and softcap");
  const int64_t tables = p.tables.data ? p.tables.size[3] : 0, indices = p.indices.data ? p.indices.size[3] : 0;
  c.in("tables' size", tables, 0, INT32_MAX);
  c.in("indices' size", indices, 0, INT32_MAX);
  c.contiguous("tables", p.tables, {1, 1, 1, tables}, DType::f32);
  c.contiguous("indices", p.indices, {1, 1, 1, indices}, DType::i32);
  for (const auto& [name, t] : {std::pair{"program", &p.program}, std::pair{"masked_program", &p.masked_program}}) {
    if (!t->data) continue;
    c.contiguous(name, *t, {1, 1, 1, t->size[3]}, DType::i32);
    const char* fault = program_fault((const int32_t*)t->data, t->size[3], tables, indices);
    c.require(!fault, name, fault);
    const ScoreProgram program((const int32_t*)t->data);
    c.require(!c.backward() || program.slope != -1, name, "must give a slope");
    c.require(!program.loads || !c.backward() || p.grad_tables.data, "grad_tables", "is needed");
  }
  if (!p.grad_tables.data) return;
  c.require(c.backward(), "grad_tables", "is of a backward");
  c.contiguous("grad_tables", p.grad_tables, {1, 1, p.grad_tables.size[2], tables}, DType::f32);
  c.in("grad_tables' copies", p.grad_tables.size[2], 1, INT32_MAX);
}
inline void check_options(const Checks& c, const AttentionParams& p) {
  check_program(c, p);
  const int64_t heads = p.q.size[1];
  c.require(p.softcap >= 0 && std::isfinite((float)p.softcap), "softcap", "must be finite and 0 at least");
  c.require(p.softcap == 0 || (float)p.softcap >= 0x1p-100f, "softcap", "must be 0 or 2^-100 at least");
  if (p.residual.data) {
    c.require(p.q.dtype != DType::f32, "residual", "is of 16-bit outputs");
    c.like("residual", p.residual, p.out);
  }
  c.in("dropped", p.dropped, 0, limits::dropped);
  if (p.dropped > 0) c.contiguous("rng", p.rng, {1, 1, 1, 2}, DType::i64);
  if (p.sink.data) {
    c.require(p.score == 0, "sink", "goes with softmax");
    c.strided("sink", p.sink, {1, 1, 1, heads}, DType::f32);
  }
  if (p.grad_sink.data) {
    c.require(p.sink.data, "grad_sink", "goes with sink");
    c.strided("grad_sink", p.grad_sink, {1, p.q.size[0], heads, p.q.size[2]}, DType::f32);
  }
  if (p.distances.data) {
    const Size by_distance{1, 1, heads, p.q.size[2] + p.k.size[2] - 1};
    c.require(!p.bias.data, "distances", "go without bias");
    c.tensor("distances", p.distances, by_distance, DType::f32);
    if (p.grad_distances.data) c.contiguous("grad_distances", p.grad_distances, by_distance, DType::f32);
  }
  c.require(p.distances.data || !p.grad_distances.data, "grad_distances", "goes with distances");
  if (p.grad_bias.data) {
    c.require(p.bias.data, "grad_bias", "goes with bias");
    const bool summed = p.grad_bias.dtype == DType::f32;
    c.tensor("grad_bias", p.grad_bias, Checks::size_of(p.bias), summed ? DType::f32 : p.bias.dtype);
    c.in("bias_parts", p.bias_parts, 1, summed ? INT32_MAX : 1);
    c.in("bias_part", p.bias_part, p.bias_parts > 1 ? 1 : 0, INT64_MAX);
  }
  if (p.grad_row_bias.data) {
    c.require((p.bias.data || p.k.size[2] == 0) && !p.grad_bias.data, "grad_row_bias",
              "goes with bias, and without grad_bias");
    c.strided("grad_row_bias", p.grad_row_bias, {1, p.q.size[0], heads, p.q.size[2]}, DType::f32);
  }
}

// What the forward finds of each row and the backward reads.
inline void check_state(const Checks& c, const AttentionParams& p) {
  c.contiguous("state", p.state, {p.q.size[0], p.q.size[1], p.q.size[2], 2}, DType::f32);
}

// The log-sum-exp that a forward may give.
inline void check_lse(const Checks& c, const AttentionParams& p) {
  if (!c.backward() && p.lse.data) c.tensor("lse", p.lse, {1, p.q.size[0], p.q.size[1], p.q.size[2]}, DType::f32);
}

inline void check_fields(const Checks& c, const AttentionParams& p) {
  c.in("score", p.score, 0, AnyScores::kCount - 1);
  check_attention(c, p);
  check_options(c, p);
  if (p.top_keys.data) {
    c.require(p.program.data && p.score == 0 && !c.backward(), "top_keys", "is of a forward of softmax by a program");
    c.require(p.decode_rows == 0, "decode_rows", "must be 0 where top_keys is wanted");
    c.contiguous("top_keys", p.top_keys, {1, p.q.size[0], p.q.size[1], p.q.size[2]}, DType::i64);
  }
  const bool given = AnyScores::given(p.score);
  c.require(!given || p.program.data, "program", "gives this score's weights");
  c.require(!given || p.dropped == 0, "dropped", "is not of given weights");
  c.require(!given || !p.grad_lse.data, "grad_lse", "is not of given weights");
  if (!AnyScores::normalised(p.score)) return;
  // a forward whose caller reads neither leaves them out
  if (!given && (c.backward() || p.state.data)) check_state(c, p);
  if (!c.backward() && !p.lse.data) return;
  const Size by_row{1, p.q.size[0], p.q.size[1], p.q.size[2]};
  c.strided("lse", p.lse, by_row, DType::f32);
  if (!c.backward()) c.tensor("lse", p.lse, by_row, DType::f32);
}

inline void check_fields(const Checks& c, const LssaParams& p) {
  check_attention(c, p);
  check_no_options(c, p);
  c.contiguous("statistics", p.statistics, {p.q.size[0], p.q.size[1], p.q.size[2], 3}, DType::f32);
  c.require(!p.reweigh || (p.power >= 1 && std::isfinite(p.power)), "power", "must be finite and 1 at least");
  c.require(!p.reweigh || !p.grad_lse.data, "grad_lse", "is not served with reweigh");
}

// Of Focus's kernels, whatever decides which distant keys count.
template <class Params>
void check_focus(const Checks& c, const Params& p) {
  check_attention(c, p);
  c.require(p.causal, "causal", "must be set");
  check_no_options(c, p);
  check_state(c, p);
  check_lse(c, p);
  c.in("window", p.window, 0, limits::length);
}
inline void check_fields(const Checks& c, const GroupedParams& p) {
  check_focus(c, p);
  c.contiguous("groups", p.groups, {1, 1, p.q.size[0], p.q.size[2]}, DType::i64);
  c.contiguous("key_groups", p.key_groups, {1, 1, p.q.size[0], p.k.size[2]}, DType::i64);
}

inline void check_fields(const Checks& c, const GatedParams& p) {
  check_focus(c, p);
  const int64_t batch = p.q.size[0], rows = p.q.size[2], groups = p.assignment.size[3];
  c.require(p.k.size[2] == rows, "k", "must have q's length");
  c.in("assignment's groups", groups, 1, INT32_MAX);
  c.contiguous("assignment", p.assignment, {1, batch, rows, groups}, DType::f32);
  c.strided("sharpness", p.sharpness, {1, 1, 1, 1}, DType::f32);
  c.in("gate", p.gate, 0, 1);
  // logarithms of gates are divided by it
  c.require(p.scale == 0 || !(std::fabs(p.scale) < 0x1p-100), "scale", "must be 0 or beyond 2^-100");
  if (!c.backward()) return;
  c.contiguous("grad_query_assignment", p.grad_query_assignment, {batch, p.q.size[1], rows, groups}, DType::f32);
  c.contiguous("grad_key_assignment", p.grad_key_assignment, {batch, p.k.size[1], rows, groups}, DType::f32);
  c.contiguous("grad_sharpness", p.grad_sharpness, {1, batch, p.q.size[1], rows}, DType::f32);
}

inline void check_fields(const Checks& c, const SinkhornParams& p) {
  const int64_t rows = p.scores.size[2], groups = p.scores.size[3], sequences = p.begins.size[3];
  c.floating("scores", p.scores);
  c.in("scores' groups", groups, 1, limits::groups);
  c.contiguous("scores", p.scores, {1, 1, rows, groups}, p.scores.dtype);
  c.contiguous("begins", p.begins, {1, 1, 1, sequences}, DType::i64);
  c.contiguous("counts", p.counts, {1, 1, 1, sequences}, DType::i64);
  c.require(p.causal || !p.prefixes.data, "prefixes", "go with causal");
  if (p.prefixes.data) c.contiguous("prefixes", p.prefixes, {1, 1, 1, sequences}, DType::i64);
  c.contiguous("out", p.out, {1, 1, rows, groups}, p.scores.dtype);
  if (c.backward())
    c.contiguous("grad", p.grad, {1, 1, rows, groups}, p.scores.dtype);
  else
    c.contiguous("potentials", p.potentials, {1, sequences, 1, groups}, DType::f32);
  c.require(p.temperature > 0, "temperature", "must be more than zero");
  c.in("iterations", p.iterations, 1, limits::iterations);
  for (int64_t i = 0; i < sequences; i++) {
    const int64_t begin = ((const int64_t*)p.begins.data)[i];
    c.index("cu_seqlens", i, begin, 0, rows);
    const int64_t count = ((const int64_t*)p.counts.data)[i];
    c.index("lengths", i, count, 0, rows - begin);
    if (p.prefixes.data) c.index("prefix_lengths", i, ((const int64_t*)p.prefixes.data)[i], 0, count);
  }
}

inline void check_fields(const Checks& c, const TileClassParams& p) {
  if (p.mask.dtype != DType::u8) c.floating("mask", p.mask);
  c.tensor("mask", p.mask, Checks::size_of(p.mask), p.mask.dtype);
  c.in("block_q", p.block_q, 1, limits::block);
  c.in("block_k", p.block_k, 1, limits::block);
  const int64_t bands = p.classes.size[2], columns = p.classes.size[3];
  c.tensor("classes", p.classes, {p.mask.size[0], p.mask.size[1], bands, columns}, DType::u8);
  c.in("classes' rows", bands, (p.mask.size[2] + p.block_q - 1) / p.block_q, INT64_MAX);
  c.in("classes' columns", columns, (p.mask.size[3] + p.block_k - 1) / p.block_k, INT64_MAX);
}

}  // namespace fastattn
