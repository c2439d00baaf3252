// src/cuda's kernels as one thread on the host, for tests of their arithmetic where there is no GPU.
#include "../../src/cuda/decode.cuh"
#include "../../src/cuda/sinkhorn.cuh"
#include "../../src/cuda/vocab_rows.cuh"

using namespace fastattn::cuda;

#include <cstddef>

extern "C" {

int64_t host_size_of_params(int32_t i) {
  return i == 0 ? sizeof(SinkhornParams) : i == 1 ? sizeof(VocabRowsParams) : sizeof(DecodeParams);
}
int64_t host_last_field_of_params(int32_t i) {
  return i == 0   ? offsetof(SinkhornParams, temperature)
         : i == 1 ? offsetof(VocabRowsParams, z_loss)
                  : offsetof(DecodeParams, eps);
}

void host_sinkhorn(const float* scores, float* assignment, float* potentials, const int32_t* lengths, float* partial,
                   int64_t batch, int64_t length, int32_t iterations, float temperature) {
  sinkhorn<float, 8, 1>({scores, assignment, potentials, lengths, partial, batch, length, iterations, temperature});
}

void host_vocab_rows(float* logits, const float* bias, const int64_t* target, const float* temperature,
                     const float* grad, float* loss, float* lse, float* grad_temperature, int64_t rows, int64_t classes,
                     float softcap, float z_loss, int32_t stablemax) {
  const VocabRowsParams p{logits,           bias, target,  temperature, grad, loss,    lse,
                          grad_temperature, rows, classes, classes,     -100, softcap, z_loss};
  stablemax ? vocab_rows<true, 1>(p) : vocab_rows<false, 1>(p);
}

int64_t host_decode_workspace(int64_t capacity, int32_t hidden, int32_t heads, int32_t head_dim, int32_t inner) {
  DecodeParams p;
  p.capacity = capacity, p.hidden = hidden, p.heads = heads, p.head_dim = head_dim, p.inner = inner;
  return decode_workspace(p);
}

// tensors: gqkv L, H, out L, H, gate_up L, H, down L, H, k cache, v cache, zH, zL, cos, sin, result, workspace
void host_decode(float** t, int64_t capacity, int64_t position, int32_t hidden, int32_t heads, int32_t head_dim,
                 int32_t inner, int32_t layers, int32_t h_cycles, int32_t l_cycles, float eps) {
  DecodeParams p;
  for (int s = 0; s < 2; s++) p.gqkv[s] = t[s], p.out[s] = t[2 + s], p.gate_up[s] = t[4 + s], p.down[s] = t[6 + s];
  p.k_cache = t[8], p.v_cache = t[9], p.z_h = t[10], p.z_l = t[11], p.cos = t[12], p.sin = t[13];
  p.result = t[14], p.workspace = t[15], p.capacity = capacity, p.position = position;
  p.hidden = hidden, p.heads = heads, p.head_dim = head_dim, p.inner = inner, p.layers = layers;
  p.h_cycles = h_cycles, p.l_cycles = l_cycles, p.eps = eps;
  decode_step<float, 1>(p);
}
}
