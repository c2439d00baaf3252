// Sinkhorn iteration in the log domain: only the row and column potentials are kept, scores stay in the L2 cache.
//   v = -LSE_tokens(x + u), u = -LSE_groups(x + v), assignment = exp(x + u + v), x = scores / temperature
#pragma once
#include "params.h"

namespace fastattn {
namespace cuda {

// GROUPS: columns. A warp processes one token at a time; its lanes are groups. A cooperative launch divides the tokens.
template <class T, int GROUPS, int THREADS>
FASTATTN_KERNEL(THREADS)
sinkhorn(SinkhornParams p) {
  constexpr int kWarps = THREADS / kWarp;
  __shared__ float tops[kWarps][GROUPS], totals[kWarps][GROUPS];
  __shared__ float v[GROUPS];
  const int warp = thread() / kWarp, lane = thread() % kWarp;
  const float scale = 1.0f / p.temperature;
  for (int64_t b = 0; b < p.batch; b++) {
    // elements on a GPU are not checked; clamping keeps every access inside the tensor
    const int64_t valid = p.lengths && p.lengths[b] < p.length ? p.lengths[b] : p.length;
    const T* scores = (const T*)p.scores + b * p.length * GROUPS;
    T* assignment = (T*)p.assignment + b * p.length * GROUPS;
    float* partial = p.partial + b * blocks() * GROUPS * 2;
    barrier();
    for (int g = thread(); g < GROUPS; g += threads()) v[g] = 0;
    barrier();
    for (int iteration = 0; iteration < p.iterations && valid > 0; iteration++) {
      LogSum mine[(GROUPS + kWarp - 1) / kWarp];
      for (int64_t t = block() * kWarps + warp; t < valid; t += blocks() * kWarps) {
        // the row potential follows from the previous iteration's column potentials; it is 0 in the first iteration
        LogSum row;
        for (int g = lane; g < GROUPS; g += kWarp) row.add(widen(scores[t * GROUPS + g]) * scale + v[g], 1);
        const float high = warp_max(row.top);
        const float u = iteration == 0 ? 0 : -(high + logf(warp_sum(row.total * expf(row.top - high))));
        for (int g = lane, i = 0; g < GROUPS; g += kWarp, i++)
          mine[i].add(widen(scores[t * GROUPS + g]) * scale + u, 1);
      }
      for (int g = lane, i = 0; g < GROUPS; g += kWarp, i++) {
        tops[warp][g] = mine[i].top;
        totals[warp][g] = mine[i].total;
      }
      barrier();
      for (int g = thread(); g < GROUPS; g += threads()) {
        LogSum all;
        for (int w = 0; w < kWarps; w++) all.add(tops[w][g], totals[w][g]);
        partial[(block() * GROUPS + g) * 2] = all.top;
        partial[(block() * GROUPS + g) * 2 + 1] = all.total;
      }
      grid_barrier();
      // every block adds the same partial sums in the same order
      for (int g = thread(); g < GROUPS; g += threads()) {
        LogSum all;
        for (int64_t i = 0; i < blocks(); i++)
          all.add(fresh(partial + (i * GROUPS + g) * 2), fresh(partial + (i * GROUPS + g) * 2 + 1));
        v[g] = -all.value();
      }
      grid_barrier();
    }
    for (int64_t t = block() * kWarps + warp; t < p.length; t += blocks() * kWarps) {
      LogSum row;
      for (int g = lane; g < GROUPS; g += kWarp) row.add(widen(scores[t * GROUPS + g]) * scale + v[g], 1);
      const float high = warp_max(row.top);
      const float u = p.iterations == 0 ? 0 : -(high + logf(warp_sum(row.total * expf(row.top - high))));
      for (int g = lane; g < GROUPS; g += kWarp)
        narrow(t < valid ? expf(widen(scores[t * GROUPS + g]) * scale + u + v[g]) : 0.0f, assignment + t * GROUPS + g);
    }
    if (block() == 0)
      for (int g = thread(); g < GROUPS; g += threads()) p.potentials[b * GROUPS + g] = v[g];
  }
}

}  // namespace cuda
}  // namespace fastattn
