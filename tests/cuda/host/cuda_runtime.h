// What src/cuda uses of CUDA, for a host compiler: a launch runs every block and thread as a fiber of one OS thread,
// and every memory access of the kernels is checked (grid.cpp). Included before the kernels' sources, which are CUDA's
// own.
#pragma once
#include <math.h>

#include <cstddef>
#include <cstdint>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __align__(bytes) __attribute__((aligned(bytes)))
// One block's copy is in place while its threads run: grid.cpp swaps the module's thread-local storage.
#define __shared__ thread_local

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace host {
enum Wait : int { kRunning, kShuffle, kBlock, kGrid, kDone };
dim3 thread_index();
dim3 block_index();
dim3 block_size();
dim3 grid_size();
void wait(Wait kind);
float shuffle_xor(unsigned mask, float x, int lane);
float load_past_l1(const float* p);

struct Launch {
  void (*call)(const void* kernel, const void* params);
  const void *kernel, *params;
  size_t params_size;
  dim3 grid, block;
  size_t shared;
  bool cooperative;
};
int run(const Launch& launch);
int occupancy();
int processors();
int largest_shared();
void ask(const void* kernel, int bytes);
const char* error(int code);

template <class P>
void call(const void* kernel, const void* params) {
  ((void (*)(P))kernel)(*(const P*)params);
}
template <class P>
int launch(void (*kernel)(P), dim3 grid, dim3 block, void** arguments, size_t shared, bool cooperative) {
  return run({call<P>, (const void*)kernel, arguments[0], sizeof(P), grid, block, shared, cooperative});
}
}  // namespace host

#define threadIdx host::thread_index()
#define blockIdx host::block_index()
#define blockDim host::block_size()
#define gridDim host::grid_size()

inline void __syncthreads() { host::wait(host::kBlock); }
inline float __shfl_xor_sync(unsigned mask, float x, int lane) { return host::shuffle_xor(mask, x, lane); }
inline float __ldcg(const float* p) { return host::load_past_l1(p); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }

using cudaError_t = int;
using cudaStream_t = void*;
enum : int { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchOutOfResources = 701 };
enum : int { cudaDevAttrMultiProcessorCount, cudaFuncAttributeMaxDynamicSharedMemorySize };

inline cudaError_t cudaGetDevice(int* device) { return *device = 0; }
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) {
  *value = host::processors();
  return cudaSuccess;
}
template <class P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P), int, int bytes) {
  if (bytes > host::largest_shared()) return cudaErrorInvalidValue;
  host::ask((const void*)kernel, bytes);
  return cudaSuccess;
}
template <class P>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*)(P), int, size_t) {
  *blocks = host::occupancy();
  return cudaSuccess;
}
template <class P>
cudaError_t cudaLaunchKernel(void (*kernel)(P), dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t) {
  return host::launch(kernel, grid, block, arguments, shared, false);
}
template <class P>
cudaError_t cudaLaunchCooperativeKernel(void (*kernel)(P), dim3 grid, dim3 block, void** arguments, size_t shared,
                                        cudaStream_t) {
  return host::launch(kernel, grid, block, arguments, shared, true);
}
inline const char* cudaGetErrorString(cudaError_t code) { return host::error(code); }
