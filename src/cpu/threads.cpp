#include "threads.h"

#include <thread>
#include <vector>

namespace fastattn {
namespace cpu {

void run_threads(int threads, void (*body)(void* context, int thread), void* context) {
  std::vector<std::thread> others;
  for (int t = 1; t < threads; t++) others.emplace_back(body, context, t);
  body(context, 0);
  for (std::thread& other : others) other.join();
}

}  // namespace cpu
}  // namespace fastattn
