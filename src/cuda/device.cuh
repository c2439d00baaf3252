// What the CUDA kernels share: element types, reductions, and the grid's barrier.
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

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define FASTATTN_DEVICE __device__ __forceinline__
#define FASTATTN_KERNEL(threads) __global__ void __launch_bounds__(threads)

namespace fastattn {
namespace cuda {

constexpr int kWarp = 32;
FASTATTN_DEVICE int thread() { return threadIdx.x; }
FASTATTN_DEVICE int threads() { return blockDim.x; }
FASTATTN_DEVICE int64_t block() { return blockIdx.x; }
FASTATTN_DEVICE int64_t blocks() { return gridDim.x; }
FASTATTN_DEVICE void barrier() { __syncthreads(); }
FASTATTN_DEVICE void grid_barrier() { cooperative_groups::this_grid().sync(); }
FASTATTN_DEVICE float shuffle_xor(float x, int lane) { return __shfl_xor_sync(0xffffffffu, x, lane); }
// A load of memory that other blocks write between barriers: it bypasses the read-only cache.
FASTATTN_DEVICE float fresh(const float* p) { return __ldcg(p); }

using bf16 = __nv_bfloat16;
using f16 = __half;
FASTATTN_DEVICE float widen(float x) { return x; }
FASTATTN_DEVICE float widen(bf16 x) { return __bfloat162float(x); }
FASTATTN_DEVICE float widen(f16 x) { return __half2float(x); }
FASTATTN_DEVICE void narrow(float x, float* p) { *p = x; }
FASTATTN_DEVICE void narrow(float x, bf16* p) { *p = __float2bfloat16_rn(x); }
FASTATTN_DEVICE void narrow(float x, f16* p) { *p = __float2half_rn(x); }

constexpr float kLowest = -3.0e38f;  // stands for -inf where a difference of two of them must not be NaN

FASTATTN_DEVICE float warp_sum(float x) {
  for (int lane = kWarp / 2; lane > 0; lane /= 2) x += shuffle_xor(x, lane);
  return x;
}
FASTATTN_DEVICE float warp_max(float x) {
  for (int lane = kWarp / 2; lane > 0; lane /= 2) x = fmaxf(x, shuffle_xor(x, lane));
  return x;
}

// Reductions over the block in a fixed order; every thread gets the result. `scratch` has one float for each warp.
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

// sum[r] = dot(row[r], x) by one warp for N rows at a time; x is float32 in shared memory. Rows and x are aligned to 16
// bytes if n is a multiple of the vector.
template <class T, int N>
FASTATTN_DEVICE void warp_dots(const T* const (&row)[N], const float* x, int n, float (&sum)[N]) {
  constexpr int kVector = 16 / sizeof(T);
  struct alignas(16) Vector {
    T at[kVector];
  };
  struct alignas(16) Four {
    float at[4];
  };
  const int lane = thread() % kWarp;
  for (int r = 0; r < N; r++) sum[r] = 0;
  if (n % kVector == 0) {
#pragma unroll 4
    for (int i = lane * kVector; i < n; i += kWarp * kVector) {
      Vector v[N];
      for (int r = 0; r < N; r++) v[r] = *reinterpret_cast<const Vector*>(row[r] + i);
      for (int j = 0; j < kVector; j += 4) {
        const Four f = *reinterpret_cast<const Four*>(x + i + j);
        for (int r = 0; r < N; r++)
          for (int k = 0; k < 4; k++) sum[r] += widen(v[r].at[j + k]) * f.at[k];
      }
    }
  } else {
    for (int i = lane; i < n; i += kWarp)
      for (int r = 0; r < N; r++) sum[r] += widen(row[r][i]) * x[i];
  }
  for (int r = 0; r < N; r++) sum[r] = warp_sum(sum[r]);
}

}  // namespace cuda
}  // namespace fastattn
