// What the CUDA kernels share: element types, reductions, and the grid's barrier.
//
// Every kernel is correct for any number of threads, so that the same source also runs on the host as one thread (tests
// hold its arithmetic to the reference where there is no GPU): there, barriers and shuffles have nothing to do.
#pragma once

#if defined(__CUDACC_RTC__)  // run-time compilation has no standard headers
using int8_t = signed char;
using uint8_t = unsigned char;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
#else
#include <cstdint>
#endif

#if defined(__CUDACC__)
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define FASTATTN_DEVICE __device__ __forceinline__
#define FASTATTN_KERNEL __global__ void
#else
#include <cmath>
#define FASTATTN_DEVICE inline
#define FASTATTN_KERNEL inline void
#define __shared__ static
#define __restrict__
#endif

namespace fastattn {
namespace cuda {

#if defined(__CUDACC__)
constexpr int kWarp = 32;
FASTATTN_DEVICE int thread() { return threadIdx.x; }
FASTATTN_DEVICE int threads() { return blockDim.x; }
FASTATTN_DEVICE int64_t block() { return blockIdx.x; }
FASTATTN_DEVICE int64_t blocks() { return gridDim.x; }
FASTATTN_DEVICE void barrier() { __syncthreads(); }
FASTATTN_DEVICE void grid_barrier() { cooperative_groups::this_grid().sync(); }
FASTATTN_DEVICE float shuffle_xor(float x, int lane) { return __shfl_xor_sync(0xffffffffu, x, lane); }
// Memory that other blocks write between barriers: never through the read-only cache.
FASTATTN_DEVICE float fresh(const float* p) { return __ldcg(p); }
FASTATTN_DEVICE float reciprocal_sqrt(float x) { return rsqrtf(x); }
using bf16 = __nv_bfloat16;
using f16 = __half;
FASTATTN_DEVICE float widen(float x) { return x; }
FASTATTN_DEVICE float widen(bf16 x) { return __bfloat162float(x); }
FASTATTN_DEVICE float widen(f16 x) { return __half2float(x); }
FASTATTN_DEVICE void narrow(float x, float* p) { *p = x; }
FASTATTN_DEVICE void narrow(float x, bf16* p) { *p = __float2bfloat16_rn(x); }
FASTATTN_DEVICE void narrow(float x, f16* p) { *p = __float2half_rn(x); }
#else
constexpr int kWarp = 1;
inline int thread() { return 0; }
inline int threads() { return 1; }
inline int64_t block() { return 0; }
inline int64_t blocks() { return 1; }
inline void barrier() {}
inline void grid_barrier() {}
inline float shuffle_xor(float x, int) { return x; }
inline float fresh(const float* p) { return *p; }
inline float reciprocal_sqrt(float x) { return 1.0f / std::sqrt(x); }
using std::exp;
using std::fabs;
using std::fmax;
using std::log;
inline float expf(float x) { return std::exp(x); }
inline float logf(float x) { return std::log(x); }
inline float log1pf(float x) { return std::log1p(x); }
inline float tanhf(float x) { return std::tanh(x); }
inline float fabsf(float x) { return std::fabs(x); }
inline float fmaxf(float a, float b) { return std::fmax(a, b); }
inline float widen(float x) { return x; }
inline void narrow(float x, float* p) { *p = x; }
#endif

constexpr float kLowest = -3.0e38f;  // stands for -inf where a difference of two of them must not be NaN

FASTATTN_DEVICE float warp_sum(float x) {
  for (int lane = kWarp / 2; lane > 0; lane /= 2) x += shuffle_xor(x, lane);
  return x;
}
FASTATTN_DEVICE float warp_max(float x) {
  for (int lane = kWarp / 2; lane > 0; lane /= 2) x = fmaxf(x, shuffle_xor(x, lane));
  return x;
}

// Over the block, in a fixed order; every thread gets the result. `scratch` holds a float a warp.
FASTATTN_DEVICE float block_sum(float x, float* scratch) {
  x = warp_sum(x);
  barrier();
  if (thread() % kWarp == 0) scratch[thread() / kWarp] = x;
  barrier();
  float total = 0;
  for (int w = 0; w < threads() / kWarp; w++) total += scratch[w];
  return total;
}
FASTATTN_DEVICE float block_max(float x, float* scratch) {
  x = warp_max(x);
  barrier();
  if (thread() % kWarp == 0) scratch[thread() / kWarp] = x;
  barrier();
  float top = kLowest;
  for (int w = 0; w < threads() / kWarp; w++) top = fmaxf(top, scratch[w]);
  return top;
}

// A running log-sum-exp: merges (top, total) pairs.
struct LogSum {
  float top = kLowest, total = 0;
  FASTATTN_DEVICE void add(float other_top, float other_total) {
    const float high = fmaxf(top, other_top);
    total = total * expf(top - high) + other_total * expf(other_top - high);
    top = high;
  }
  FASTATTN_DEVICE float value() const { return top + logf(total); }
};

// dot(row, x) by one warp; row is 16-byte aligned where n is a multiple of 8, x is float32 in shared memory.
template <class T>
FASTATTN_DEVICE float warp_dot(const T* __restrict__ row, const float* x, int n) {
  constexpr int kVector = 16 / sizeof(T);
  const int lane = thread() % kWarp;
  float sum[2] = {0, 0};
  if (n % kVector == 0) {
    struct alignas(16) Vector {
      T at[kVector];
    };
    for (int i = lane * kVector; i < n; i += kWarp * kVector) {
      const Vector v = *reinterpret_cast<const Vector*>(row + i);
      for (int j = 0; j < kVector; j++) sum[j % 2] += widen(v.at[j]) * x[i + j];
    }
  } else {
    for (int i = lane; i < n; i += kWarp) sum[0] += widen(row[i]) * x[i];
  }
  return warp_sum(sum[0] + sum[1]);
}

}  // namespace cuda
}  // namespace fastattn
