// Plain structs that the CUDA kernels take; as in src/cpu/params.h, strides count elements.
#pragma once
#include "device.cuh"

namespace fastattn {
namespace cuda {

// Element types, numbered as DType in src/cpu/params.h.
enum : int { kF32 = 0, kBf16 = 1, kF16 = 2 };

// scores and assignment (B, L, G) contiguous, potentials (B, G) f32, lengths (B,) i32 or null.
// partial: workspace of B * blocks * G * 2 floats.
struct SinkhornParams {
  const void* scores = nullptr;
  void* assignment = nullptr;
  float* potentials = nullptr;
  const int32_t* lengths = nullptr;
  float* partial = nullptr;
  int64_t batch = 0, length = 0;
  int32_t iterations = 10;
  float temperature = 0.1f;
};

// A block computes one row of logits: the loss, the largest logit, and the sum of the weights relative to that logit's.
// If grad is given, it overwrites the logits with the loss's gradient.
// logits (rows, classes) f32 with a row stride; bias (classes,) f32 or null; target (rows,) i64; the rest (rows,) f32.
struct VocabRowsParams {
  float* logits = nullptr;
  const float* bias = nullptr;
  const int64_t* target = nullptr;
  const float* temperature = nullptr;
  const float* grad = nullptr;
  float *loss = nullptr, *largest = nullptr, *total = nullptr, *grad_temperature = nullptr;
  int64_t rows = 0, classes = 0, row_stride = 0, ignore_index = -100;
  float softcap = 0, z_loss = 0;
};

constexpr int kMostLayers = 40;  // of a stack: the kernel takes the address of every weight by value

// One token through a hierarchical recurrence at batch 1: H_cycles x (L_cycles L stacks, then the H stack).
// Weights of stack s (0 = L, 1 = H) by layer, row-major: gqkv (4 * heads * head_dim, hidden) gate | q | k | v,
// out (hidden, heads * head_dim), gate_up (2 * inner, hidden), down (hidden, inner).
// Caches (calls, layers, heads, capacity, head_dim), call = h * (L_cycles + 1) + l. `position` tokens are cached
// before. workspace: 3 * hidden + 4 * heads * head_dim + inner floats, and head_dim + 2 for each piece of attention.
struct DecodeParams {
  const void *gqkv[2][kMostLayers] = {}, *out[2][kMostLayers] = {};
  const void *gate_up[2][kMostLayers] = {}, *down[2][kMostLayers] = {};
  void *k_cache = nullptr, *v_cache = nullptr;
  const void *z_h = nullptr, *z_l = nullptr;  // (hidden,) scaled embedding and initial low state
  const int64_t* positions = nullptr;         // (1,), at most `position`; null: `position`
  void* result = nullptr;                     // (hidden,) final high state
  float* workspace = nullptr;
  int64_t capacity = 0, position = 0;
  int32_t hidden = 0, heads = 0, head_dim = 0, inner = 0, layers = 0, h_cycles = 2, l_cycles = 3;
  float theta = 10000, eps = 1e-6f;
};

}  // namespace cuda
}  // namespace fastattn
