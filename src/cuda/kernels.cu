// Default instantiations and their launches; other tile constants are compiled at run time (fastattn/runtime/cuda.py).
//
// Each launch takes a params struct and a stream by address and returns null or an error message.
#include "hrm_step.cuh"
#include "sinkhorn.cuh"
#include "cross_entropy.cuh"

namespace fastattn {
namespace cuda {
namespace {

constexpr int kThreads = 256;
// A block has 48 KiB of shared memory without opting in, including its kernel's static arrays (at most 4 KiB).
constexpr size_t kUnasked = 44 * 1024;
constexpr int kDecodeThreads = 512, kDecodeRows = 1, kDecodeSpan = 64;

// As many blocks as run at once, at most `wanted`: a cooperative grid must be resident as a whole.
template <class Kernel>
cudaError_t resident(Kernel kernel, int threads, size_t shared, int64_t wanted, int* blocks) {
  int device = 0, processors = 0, each = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess && shared > kUnasked)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, shared);
  if (error == cudaSuccess && each == 0) error = cudaErrorLaunchOutOfResources;
  const int64_t most = (int64_t)processors * each;
  *blocks = (int)(wanted < most ? (wanted > 0 ? wanted : 1) : most);
  return error;
}

template <class P>
cudaError_t cooperative(void (*kernel)(P), P p, int threads, size_t shared, int64_t wanted, cudaStream_t stream) {
  int blocks = 0;
  const cudaError_t error = resident(kernel, threads, shared, wanted, &blocks);
  if (error != cudaSuccess) return error;
  void* arguments[] = {&p};
  return cudaLaunchCooperativeKernel(kernel, blocks, threads, arguments, shared, stream);
}

template <class T>
cudaError_t sinkhorn_of(const SinkhornParams& p, int groups, int64_t blocks, cudaStream_t stream) {
  switch (groups) {
    case 4:
      return cooperative(sinkhorn<T, 4, kThreads>, p, kThreads, 0, blocks, stream);
    case 8:
      return cooperative(sinkhorn<T, 8, kThreads>, p, kThreads, 0, blocks, stream);
    case 16:
      return cooperative(sinkhorn<T, 16, kThreads>, p, kThreads, 0, blocks, stream);
    case 32:
      return cooperative(sinkhorn<T, 32, kThreads>, p, kThreads, 0, blocks, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

template <class T>
cudaError_t decode_of(const DecodeParams& p, size_t shared, int64_t blocks, cudaStream_t stream) {
  if (p.head_dim > 256) return cudaErrorInvalidValue;
  const auto kernel = p.head_dim > 128 ? decode_step<T, 256, kDecodeThreads, kDecodeRows, kDecodeSpan>
                                       : decode_step<T, 128, kDecodeThreads, kDecodeRows, kDecodeSpan>;
  return cooperative(kernel, p, kDecodeThreads, shared, blocks, stream);
}

}  // namespace

}  // namespace cuda
}  // namespace fastattn

using namespace fastattn::cuda;

#define FASTATTN_EXPORT extern "C" __attribute__((visibility("default"))) const char*

static const char* message(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

// blocks: the number for which `partial` has room; fewer run if the device holds fewer at once.
FASTATTN_EXPORT fastattn_sinkhorn(const SinkhornParams* p, int dtype, int groups, int64_t blocks, void* stream) {
  const cudaStream_t on = (cudaStream_t)stream;
  cudaError_t error = cudaErrorInvalidValue;
  if (dtype == kF32) error = sinkhorn_of<float>(*p, groups, blocks, on);
  if (dtype == kBf16) error = sinkhorn_of<bf16>(*p, groups, blocks, on);
  if (dtype == kF16) error = sinkhorn_of<f16>(*p, groups, blocks, on);
  return message(error);
}

FASTATTN_EXPORT fastattn_vocab_rows(const VocabRowsParams* p, int stablemax, void* stream) {
  const unsigned blocks = (unsigned)(p->rows < (1 << 20) ? p->rows : (1 << 20));
  const auto kernel = stablemax ? vocab_rows<true, kThreads> : vocab_rows<false, kThreads>;
  VocabRowsParams copy = *p;
  void* arguments[] = {&copy};
  return message(cudaLaunchKernel(kernel, blocks, kThreads, arguments, 0, (cudaStream_t)stream));
}

// shared: bytes of decode_vector. blocks: fewer run if the device holds fewer at once.
FASTATTN_EXPORT fastattn_decode_step(const DecodeParams* p, int dtype, int64_t shared, int64_t blocks, void* stream) {
  const cudaStream_t on = (cudaStream_t)stream;
  cudaError_t error = cudaErrorInvalidValue;
  if (dtype == kF32) error = decode_of<float>(*p, (size_t)shared, blocks, on);
  if (dtype == kBf16) error = decode_of<bf16>(*p, (size_t)shared, blocks, on);
  if (dtype == kF16) error = decode_of<f16>(*p, (size_t)shared, blocks, on);
  return message(error);
}
