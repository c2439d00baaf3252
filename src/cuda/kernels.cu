// Default instantiations and their launches; other tile constants are compiled at run time (fastattn/_cuda.py).
//
// Each launch takes a params struct and a stream by address and returns null, or what went wrong.
#include "decode.cuh"
#include "sinkhorn.cuh"
#include "vocab_rows.cuh"

namespace fastattn {
namespace cuda {
namespace {

constexpr int kThreads = 256;

// As many blocks as run at once, at most `wanted`: a cooperative grid must be resident as a whole.
template <class Kernel>
cudaError_t resident(Kernel kernel, size_t shared, int64_t wanted, int* blocks) {
  int device = 0, processors = 0, each = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess && shared > 48 * 1024)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, kThreads, shared);
  if (error == cudaSuccess && each == 0) error = cudaErrorLaunchOutOfResources;
  const int64_t most = (int64_t)processors * each;
  *blocks = (int)(wanted < most ? (wanted > 0 ? wanted : 1) : most);
  return error;
}

template <class P>
cudaError_t cooperative(void (*kernel)(P), const P& p, size_t shared, int64_t wanted, cudaStream_t stream) {
  int blocks = 0;
  const cudaError_t error = resident(kernel, shared, wanted, &blocks);
  if (error != cudaSuccess) return error;
  P copy = p;
  void* arguments[] = {&copy};
  return cudaLaunchCooperativeKernel((const void*)kernel, blocks, kThreads, arguments, shared, stream);
}

template <class T>
cudaError_t sinkhorn_of(const SinkhornParams& p, int groups, int64_t blocks, cudaStream_t stream) {
  switch (groups) {
    case 4:
      return cooperative(sinkhorn<T, 4, kThreads>, p, 0, blocks, stream);
    case 8:
      return cooperative(sinkhorn<T, 8, kThreads>, p, 0, blocks, stream);
    case 16:
      return cooperative(sinkhorn<T, 16, kThreads>, p, 0, blocks, stream);
    case 32:
      return cooperative(sinkhorn<T, 32, kThreads>, p, 0, blocks, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

}  // namespace cuda
}  // namespace fastattn

using namespace fastattn::cuda;

#define FASTATTN_EXPORT extern "C" __attribute__((visibility("default"))) const char*

static const char* message(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

// blocks: as many as `partial` has room for; fewer run where the device holds fewer at once.
FASTATTN_EXPORT fastattn_sinkhorn(const SinkhornParams* p, int dtype, int groups, int64_t blocks, void* stream) {
  const cudaStream_t on = (cudaStream_t)stream;
  cudaError_t error = cudaErrorInvalidValue;
  if (dtype == kF32) error = sinkhorn_of<float>(*p, groups, blocks, on);
  if (dtype == kBf16) error = sinkhorn_of<bf16>(*p, groups, blocks, on);
  if (dtype == kF16) error = sinkhorn_of<f16>(*p, groups, blocks, on);
  return message(error);
}

FASTATTN_EXPORT fastattn_vocab_rows(const VocabRowsParams* p, int stablemax, void* stream) {
  const cudaStream_t on = (cudaStream_t)stream;
  const unsigned blocks = (unsigned)(p->rows < (1 << 20) ? p->rows : (1 << 20));
  if (blocks == 0) return nullptr;
  if (stablemax)
    vocab_rows<true, kThreads><<<blocks, kThreads, 0, on>>>(*p);
  else
    vocab_rows<false, kThreads><<<blocks, kThreads, 0, on>>>(*p);
  return message(cudaGetLastError());
}

FASTATTN_EXPORT fastattn_decode_step(const DecodeParams* p, int dtype, void* stream) {
  const cudaStream_t on = (cudaStream_t)stream;
  const size_t shared = (size_t)decode_shared(*p);
  cudaError_t error = cudaErrorInvalidValue;
  if (p->head_dim <= Decode<float, kThreads>::kMostDim && p->position < p->capacity) {
    if (dtype == kF32) error = cooperative(decode_step<float, kThreads>, *p, shared, 1 << 20, on);
    if (dtype == kBf16) error = cooperative(decode_step<bf16, kThreads>, *p, shared, 1 << 20, on);
    if (dtype == kF16) error = cooperative(decode_step<f16, kThreads>, *p, shared, 1 << 20, on);
  }
  return message(error);
}

FASTATTN_EXPORT fastattn_decode_workspace(const DecodeParams* p, int64_t* floats) {
  *floats = decode_workspace(*p);
  return nullptr;
}
