// Loops over the threads of the OpenMP pool that torch uses too.
#pragma once
#include <cstdint>
#if defined(_OPENMP)
#include <omp.h>
#elif defined(FASTATTN_STD_THREADS)
#include "threads.h"
#endif

#include "vec.h"

namespace fastattn {
namespace FASTATTN_ISA {

// body(begin, end, thread) over [0, count) in `threads` contiguous parts: a fixed split for a fixed thread count.
template <class Body>
FASTATTN_INLINE void parallel_ranges(int64_t count, int threads, const Body& body) {
  if (threads > count) threads = (int)count;
  if (threads <= 1) {
    if (count > 0) body((int64_t)0, count, 0);
    return;
  }
  const auto part = [&](int t) {
    const int64_t begin = count * t / threads, end = count * (t + 1) / threads;
    if (begin < end) body(begin, end, t);
  };
#if defined(FASTATTN_STD_THREADS)
  cpu::run_threads(threads, [](void* context, int t) { (*(decltype(part)*)context)(t); }, (void*)&part);
#else
#if defined(_OPENMP)
#pragma omp parallel for num_threads(threads) schedule(static, 1)
#endif
  for (int t = 0; t < threads; t++) part(t);
#endif
}

// body(item, thread) over [0, count), the next free thread taking the next item: for items of uneven cost whose results
// do not depend on which thread runs them.
template <class Body>
FASTATTN_INLINE void parallel_items(int64_t count, int threads, const Body& body) {
  if (threads > count) threads = (int)count;
  if (threads <= 1) {
    for (int64_t i = 0; i < count; i++) body(i, 0);
    return;
  }
#if defined(_OPENMP)
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t i = 0; i < count; i++) body(i, omp_get_thread_num());
#elif defined(FASTATTN_STD_THREADS)
  int64_t next = 0;
  const auto work = [&](int t) {
    // relaxed: taking an item orders nothing, so that ThreadSanitizer sees items as unordered
    for (int64_t i; (i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < count;) body(i, t);
  };
  cpu::run_threads(threads, [](void* context, int t) { (*(decltype(work)*)context)(t); }, (void*)&work);
#else
  for (int64_t i = 0; i < count; i++) body(i, 0);
#endif
}

// The number of threads for a number of multiply-adds of dot products: waking a thread takes as long as 2^16 of them.
FASTATTN_INLINE int threads_for(int threads, int64_t multiply_adds) { return multiply_adds < (1 << 16) ? 1 : threads; }

// The number of parts, `least` or up to three more, in which to cut each of `units` equal tasks so that nine tenths of
// the threads' time is used, or as much as possible.
FASTATTN_INLINE int64_t even_parts(int64_t units, int64_t threads, int64_t least) {
  int64_t best = least;
  double most = 0;
  for (int64_t parts = least; parts < least + 4; parts++) {
    const int64_t tasks = units * parts, rounds = (tasks + threads - 1) / threads;
    const double used = double(tasks) / double(rounds * threads);
    if (used > most) most = used, best = parts;
    if (used >= 0.9) break;
  }
  return best;
}

// (A, B, C) rows of four-dimensional tensors as one index.
struct Rows {
  int64_t b, c;
  int64_t count;
  explicit Rows(const Tensor& t) : b(t.size[1]), c(t.size[2]), count(t.size[0] * t.size[1] * t.size[2]) {}
};
template <class T>
FASTATTN_INLINE T* row_of(const Tensor& t, const Rows& rows, int64_t r) {
  const int64_t c = r % rows.c, ab = r / rows.c;
  return (T*)t.data + (ab / rows.b) * t.stride[0] + (ab % rows.b) * t.stride[1] + c * t.stride[2];
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
