// src/cuda for the host: the launches of kernels.cu, other tile constants, and faulty kernels that have to be found
// out.
#include "../../../src/cuda/kernels.cu"

namespace fastattn {
namespace cuda {
__align__(16) thread_local float decode_vector[13 << 10];
}  // namespace cuda
}  // namespace fastattn

namespace host {
void set_dynamic_shared(void* begin, size_t size);
}

namespace {

struct FaultParams {
  float* data;
  int32_t which;
};

FASTATTN_KERNEL(64) faulty(FaultParams p) {
  __shared__ float slot[64];
  const int t = thread();
  switch (p.which) {
    case 0:  // nothing wrong: a block's sum, then the grid's
      slot[t] = (float)t;
      barrier();
      if (t == 0) p.data[block()] = slot[0] + slot[63];
      grid_barrier();
      if (t == 0 && block() == 0) p.data[2] = fresh(p.data) + fresh(p.data + 1);
      break;
    case 1:  // a barrier missing between write and read
      slot[t] = (float)t;
      p.data[block() * 64 + t] = slot[63 - t];
      break;
    case 2:  // a barrier missing between read and write
      slot[t] = (float)t;
      barrier();
      p.data[block() * 64 + t] = slot[63 - t];
      slot[t] = 0;
      break;
    case 3:  // a block's barrier where the grid's is needed
      if (block() == 0) p.data[t] = 1;
      barrier();
      if (block() == 1) p.data[64 + t] = p.data[t];
      break;
    case 4:  // half of the block waits
      if (t < 32) barrier();
      break;
    case 5:  // half of a warp shuffles
      if (t % 32 < 16) p.data[t] = warp_sum(1);
      break;
    case 6:
      p.data[block() * 64 + t] = slot[t];
      break;
    case 7:
      p.data[128 + t] = 0;
      break;
    case 8:
      if (t == 0) p.data[0] = decode_vector[16];
      break;
    case 9:  // two threads write one place
      if (block() == 0) p.data[t / 2] = 1;
      break;
    case 10: {  // 16 bytes at an address that is not a multiple of 16
      struct alignas(16) Four {
        float at[4];
      };
      const Four four = *reinterpret_cast<const Four*>(p.data + 1);
      if (four.at[0] == 1e30f) grid_barrier();
      break;
    }
    case 11: {
      float three[3] = {1, 2, 3};
      p.data[block() * 64 + t] = three[t % 4];
      break;
    }
    case 12:  // another block's value through the first-level cache
      if (block() == 0 && t == 0) p.data[0] = 1;
      grid_barrier();
      if (block() == 1 && t == 0) p.data[1] = p.data[0];
      break;
    case 13:  // different barriers
      if (block() == 0)
        grid_barrier();
      else
        barrier();
      break;
  }
}

template <class P, void (*kernel)(P)>
cudaError_t start(const void* params, int blocks, int threads, size_t shared, bool cooperative) {
  P copy = *(const P*)params;
  void* arguments[] = {&copy};
  const auto launch = cooperative ? cudaLaunchCooperativeKernel<P> : cudaLaunchKernel<P>;
  return launch(kernel, blocks, threads, arguments, shared, nullptr);
}

// What _cuda.py would compile at run time, by the name it asks for.
struct Compiled {
  const char* name;
  cudaError_t (*start)(const void*, int, int, size_t, bool);
};
#define HOST_COMPILED(params, ...) {#__VA_ARGS__, start<params, __VA_ARGS__>}
const Compiled compiled[] = {
    HOST_COMPILED(SinkhornParams, fastattn::cuda::sinkhorn<float, 6, 64>),
    HOST_COMPILED(SinkhornParams, fastattn::cuda::sinkhorn<fastattn::cuda::bf16, 40, 128>),
    HOST_COMPILED(VocabRowsParams, fastattn::cuda::vocab_rows<false, 64>),
    HOST_COMPILED(VocabRowsParams, fastattn::cuda::vocab_rows<true, 64>),
    HOST_COMPILED(DecodeParams, fastattn::cuda::decode_step<float, 32, 128, 4, 16>),
    HOST_COMPILED(DecodeParams, fastattn::cuda::decode_step<float, 160, 128, 2, 32>),
    HOST_COMPILED(DecodeParams, fastattn::cuda::decode_step<fastattn::cuda::bf16, 64, 128, 2, 16>),
};

struct SetUp {
  SetUp() { host::set_dynamic_shared(decode_vector, sizeof(decode_vector)); }
} set_up;

}  // namespace

FASTATTN_EXPORT host_faulty(float* data, int which) {
  FaultParams p{data, which};
  void* arguments[] = {&p};
  return message(cudaLaunchCooperativeKernel(faulty, 2, 64, arguments, 64, nullptr));
}

FASTATTN_EXPORT host_compiled(const char* name, const void* params, int blocks, int threads, int64_t shared,
                              int cooperative) {
  for (const Compiled& c : compiled)
    if (!strcmp(c.name, name)) return message(c.start(params, blocks, threads, (size_t)shared, cooperative));
  return "there is no such kernel";
}
