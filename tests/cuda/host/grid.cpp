// A CUDA grid on one OS thread: each thread is a fiber that runs until it waits. Found while it runs, as errors of the
// launch: threads of a warp, block or grid that do not all reach the same barrier; accesses outside of the tensors
// allowed, of the shared memory asked for or off their alignment; shared memory read before it was written; another
// block's value read through the first-level cache; and two accesses of different threads to one place, one of them a
// write, with no barrier between them, in whatever order they happened to run. Kernels are compiled with
// -fsanitize=thread, whose callbacks are at the end.
#include <link.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "cuda_runtime.h"

namespace host {
namespace {

constexpr int kLanes = 32, kLimit = 1024;
constexpr size_t kStack = 64 << 10;
constexpr int kFailed = 719;                        // cudaErrorLaunchFailure
constexpr size_t kUnasked = 48 << 10, kOwn = 1088;  // of shared memory; a decode step's arrays: 16 warps, 256 angles

struct Fiber {
  ucontext_t context;
  jmp_buf resume;
  bool started = false;
  Wait state = kRunning;
  int shuffles = 0;
};
struct Group {  // the threads that wait for one another
  int arrived = 0, size = 0, epoch = 0;
};
struct Range {
  uintptr_t begin, end;
};

// Of two bytes of memory: the last write, and the reads since the last barrier of the reader's grid and block.
struct Access {
  int thread = -1, grid_epoch = -1, block_epoch = -1;  // thread: of the whole grid
};
struct Cell {
  Access write, read;
  bool blocks_read = false, threads_read = false;  // another block's, another thread's of the block, beside `read`
};

// set by tests
std::vector<Range> allowed;
uint32_t seed = 0;
int processors_ = 2, occupancy_ = 1;
std::unordered_map<const void*, size_t> asked;  // by kernel

// of the launch
const Launch* launch_ = nullptr;
std::unique_ptr<Fiber[]> fibers;
std::vector<Group> warps, blocks;
Group grid_;
std::vector<float> lanes;  // a value a thread and parity
std::vector<std::vector<char>> shared;
std::unordered_map<uintptr_t, Cell> cells;
int threads_of_block = 0, current = -1, block_in_place = -1;
char* stacks = nullptr;
size_t stacks_size = 0;
jmp_buf scheduler;
std::string failure;

// the module's thread-local storage, which is the kernels' shared memory
char* storage = nullptr;
size_t storage_size = 0;
Range dynamic_{};

int block_of(int fiber) { return fiber / threads_of_block; }
uint32_t random(uint32_t below) {
  seed = seed * 1664525u + 1013904223u;
  return (uint32_t)(((uint64_t)(seed >> 8) * below) >> 24);
}

[[noreturn]] void fail(const std::string& what) {
  if (failure.empty()) {
    failure = what;
    if (current >= 0)
      failure += " (block " + std::to_string(block_of(current)) + ", thread " +
                 std::to_string(current % threads_of_block) + ")";
  }
  _longjmp(scheduler, 2);
}

void yield() {
  if (_setjmp(fibers[current].resume) == 0) _longjmp(scheduler, 1);
}

void enter() {
  launch_->call(launch_->kernel, launch_->params);
  fibers[current].state = kDone;
  _longjmp(scheduler, 1);
}

int find_storage(dl_phdr_info* info, size_t, void*) {
  bool here = false;
  size_t size = 0;
  for (int i = 0; i < info->dlpi_phnum; i++) {
    const auto& header = info->dlpi_phdr[i];
    const uintptr_t begin = info->dlpi_addr + header.p_vaddr, at = (uintptr_t)&find_storage;
    if (header.p_type == PT_LOAD && at >= begin && at < begin + header.p_memsz) here = true;
    if (header.p_type == PT_TLS) size = header.p_memsz;
  }
  if (!here) return 0;
  storage = (char*)info->dlpi_tls_data;
  storage_size = size;
  return 1;
}

void place(int block) {
  if (block_in_place == block) return;
  if (block_in_place >= 0) memcpy(shared[block_in_place].data(), storage, storage_size);
  memcpy(storage, shared[block].data(), storage_size);
  block_in_place = block;
}

// Runs a fiber until it waits.
void resume(int fiber) {
  current = fiber;
  Fiber& f = fibers[fiber];
  if (_setjmp(scheduler) == 0) {
    if (f.started) _longjmp(f.resume, 1);
    f.started = true;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = stacks + kStack * fiber;
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = nullptr;
    makecontext(&f.context, enter, 0);
    setcontext(&f.context);
  }
  current = -1;
}

std::string stuck(int begin, int end) {
  static const char* const names[] = {"run", "are at a shuffle", "are at a barrier of the block",
                                      "are at a barrier of the grid", "have returned"};
  int count[5] = {};
  for (int i = begin; i < end; i++) count[fibers[i].state]++;
  std::string text = "threads do not reach the same barrier:";
  for (int s = 0; s < 5; s++)
    if (count[s]) text += " " + std::to_string(count[s]) + " " + names[s] + ";";
  text.pop_back();
  return text;
}

// Seed 0: in order; 1: backwards; others: at random.
void reorder(std::vector<int>& order) {
  if (seed > 1)
    for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[random((uint32_t)i)]);
}
std::vector<int> ordered(int begin, int end) {
  std::vector<int> order;
  for (int i = begin; i < end; i++) order.push_back(i);
  if (seed == 1) std::reverse(order.begin(), order.end());
  return order;
}

// All blocks of [first, last) side by side, until every thread has returned.
void run_blocks(int first, int last) {
  std::vector<int> order = ordered(first, last);
  std::vector<std::vector<int>> threads;
  for (int b = 0; b < last; b++)
    threads.push_back(b < first ? std::vector<int>() : ordered(b * threads_of_block, (b + 1) * threads_of_block));
  for (bool moved = true; moved && failure.empty();) {
    moved = false;
    reorder(order);
    for (int b : order) {
      place(b);
      for (bool again = true; again && failure.empty();) {
        again = false;
        reorder(threads[b]);
        for (int i : threads[b]) {
          if (fibers[i].state != kRunning) continue;
          resume(i);
          if (!failure.empty()) return;
          again = moved = true;
        }
      }
    }
  }
  for (int i = first * threads_of_block; i < last * threads_of_block && failure.empty(); i++)
    if (fibers[i].state != kDone) failure = stuck(first * threads_of_block, last * threads_of_block);
}

bool ordered_before(const Access& a, int block, const Access& now) {
  return a.grid_epoch < now.grid_epoch || (block_of(a.thread) == block && a.block_epoch < now.block_epoch);
}

std::string where(bool in_shared) { return in_shared ? " shared memory" : " global memory"; }

void check(const void* pointer, size_t size, bool write, bool past_l1 = false) {
  if (current < 0) return;
  const uintptr_t at = (uintptr_t)pointer;
  if (at >= (uintptr_t)stacks && at < (uintptr_t)stacks + stacks_size) return;
  const bool in_shared = at >= (uintptr_t)storage && at < (uintptr_t)storage + storage_size;
  const char* verb = write ? "writes" : "reads";
  const int block = block_of(current);
  uintptr_t key = at;
  if (in_shared) {
    if (at >= dynamic_.begin && at < dynamic_.end && at + size > dynamic_.begin + launch_->shared)
      fail(std::string(verb) + " beyond the dynamic shared memory asked for");
    key = ((uintptr_t)(block + 1) << 48) + (at - (uintptr_t)storage);
  } else {
    const auto range = std::find_if(allowed.begin(), allowed.end(),
                                    [&](const Range& r) { return at >= r.begin && at + size <= r.end; });
    if (range == allowed.end()) fail(std::string(verb) + where(false) + " outside of every tensor");
    if (range != allowed.begin()) std::swap(*range, *(range - 1));
  }
  const Access now{current, grid_.epoch, blocks[block].epoch};
  for (uintptr_t k = key & ~(uintptr_t)1; k < key + size; k += 2) {
    Cell& cell = cells[k];
    const bool wrote = cell.write.thread >= 0;
    if (in_shared && !write && !wrote) fail("reads shared memory that was never written");
    if (wrote && cell.write.thread != current && !ordered_before(cell.write, block, now))
      fail(std::string(verb) + where(in_shared) + " that thread " +
           std::to_string(cell.write.thread % threads_of_block) + " of block " +
           std::to_string(block_of(cell.write.thread)) + " wrote, with no barrier between");
    if (wrote && !write && !past_l1 && block_of(cell.write.thread) != block)
      fail("reads what another block wrote, not by __ldcg");
    Access& read = cell.read;
    const bool fresh = read.thread < 0 || read.grid_epoch < now.grid_epoch;
    if (write) {
      if (!fresh) {
        const bool same = block_of(read.thread) == block, earlier = read.block_epoch < now.block_epoch;
        if (cell.blocks_read || !same || (!earlier && (cell.threads_read || read.thread != current)))
          fail("writes" + where(in_shared) + " that another thread read, with no barrier between");
      }
      cell.write = now;
    } else if (fresh) {
      read = now;
      cell.blocks_read = cell.threads_read = false;
    } else if (block_of(read.thread) != block) {
      cell.blocks_read = true;
    } else if (read.block_epoch < now.block_epoch) {
      read = now;
      cell.threads_read = false;
    } else if (read.thread != current) {
      cell.threads_read = true;
    }
  }
}

}  // namespace

dim3 thread_index() { return current % threads_of_block; }
dim3 block_index() { return block_of(current); }
dim3 block_size() { return launch_->block; }
dim3 grid_size() { return launch_->grid; }
int occupancy() { return occupancy_; }
int processors() { return processors_; }
void ask(const void* kernel, int bytes) { asked[kernel] = (size_t)bytes; }
int largest_shared() { return (int)(dynamic_.end - dynamic_.begin); }
const char* error(int code) {
  return code == kFailed ? failure.c_str() : code == cudaErrorInvalidValue ? "invalid argument" : "out of resources";
}

void wait(Wait kind) {
  const int block = block_of(current), warp = current / kLanes;
  if (kind == kGrid && !launch_->cooperative) fail("a barrier of the grid in a launch that is not cooperative");
  Group& group = kind == kShuffle ? warps[warp] : kind == kBlock ? blocks[block] : grid_;
  Fiber& self = fibers[current];
  self.state = kind;
  // a warp's lanes may be at different barriers
  const int begin = kind == kShuffle ? warp * kLanes : kind == kBlock ? block * threads_of_block : 0;
  if (++group.arrived < group.size) return yield();
  for (int i = begin; i < begin + group.size; i++)
    if (fibers[i].state != kind) fail(stuck(begin, begin + group.size));
  for (int i = begin; i < begin + group.size; i++) fibers[i].state = kRunning;
  group.arrived = 0;
  group.epoch++;
  if (kind == kGrid)
    for (Group& b : blocks) b.epoch++;
}

float shuffle_xor(unsigned mask, float x, int lane) {
  if (mask != 0xffffffffu || lane <= 0 || lane >= kLanes) fail("a shuffle of a part of the warp");
  const int parity = fibers[current].shuffles++ & 1;
  lanes[2 * current + parity] = x;
  wait(kShuffle);
  return lanes[2 * (current ^ lane) + parity];
}

float load_past_l1(const float* p) {
  check(p, sizeof(float), false, true);
  return *p;
}

int run(const Launch& launch) {
  const int count = (int)launch.grid.x;
  threads_of_block = (int)launch.block.x;
  if (count <= 0 || threads_of_block <= 0 || threads_of_block > kLimit || threads_of_block % kLanes)
    return cudaErrorInvalidValue;
  if (launch.cooperative && count > processors_ * occupancy_) return cudaErrorLaunchOutOfResources;
  if (launch.shared > (size_t)largest_shared()) return cudaErrorInvalidValue;
  if (launch.shared + kOwn > kUnasked && launch.shared > asked[launch.kernel]) return cudaErrorLaunchOutOfResources;
  launch_ = &launch;
  const int total = count * threads_of_block;
  failure.clear();
  dl_iterate_phdr(find_storage, nullptr);
  fibers.reset(new Fiber[total]);
  warps.assign(total / kLanes, {0, kLanes, 0});
  blocks.assign(count, {0, threads_of_block, 0});
  grid_ = {0, total, 0};
  lanes.assign(2 * total, NAN);
  shared.assign(count, std::vector<char>(storage_size, (char)0xff));  // NaN in every float type
  cells.clear();
  block_in_place = -1;
  stacks_size = kStack * total;
  stacks =
      (char*)mmap(nullptr, stacks_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  const auto params = (uintptr_t)launch.params;
  allowed.push_back({params, params + launch.params_size});
  if (launch.cooperative)
    run_blocks(0, count);
  else
    for (int b : ordered(0, count))
      if (failure.empty()) run_blocks(b, b + 1);
  const auto own = std::find_if(allowed.begin(), allowed.end(), [&](const Range& r) { return r.begin == params; });
  allowed.erase(own);
  munmap(stacks, stacks_size);
  launch_ = nullptr;
  return failure.empty() ? cudaSuccess : kFailed;
}

void set_dynamic_shared(void* begin, size_t size) { dynamic_ = {(uintptr_t)begin, (uintptr_t)begin + size}; }

}  // namespace host

extern "C" {

void host_allow(void* begin, int64_t bytes) {
  host::allowed.push_back({(uintptr_t)begin, (uintptr_t)begin + (uintptr_t)bytes});
}
void host_forget() { host::allowed.clear(); }
void host_configure(uint32_t seed, int processors, int occupancy) {
  host::seed = seed;
  host::processors_ = processors;
  host::occupancy_ = occupancy;
}

// What -fsanitize=thread calls before each access.
#define HOST_ACCESS(size)                                                    \
  void __tsan_read##size(void* p) { host::check(p, size, false); }           \
  void __tsan_write##size(void* p) { host::check(p, size, true); }           \
  void __tsan_unaligned_read##size(void* p) { host::check(p, size, false); } \
  void __tsan_unaligned_write##size(void* p) { host::check(p, size, true); }
HOST_ACCESS(1)
HOST_ACCESS(2)
HOST_ACCESS(4)
HOST_ACCESS(8)
HOST_ACCESS(16)
void __tsan_read_range(void* p, size_t size) { host::check(p, size, false); }
void __tsan_write_range(void* p, size_t size) { host::check(p, size, true); }
void __tsan_init() {}

// What -fsanitize=alignment,bounds calls where one is violated.
void __ubsan_handle_type_mismatch_v1(void*, void*) { host::fail("an access off its type's alignment"); }
void __ubsan_handle_out_of_bounds(void*, void*) { host::fail("an index beyond its array"); }
}
