// Threads for builds with ThreadSanitizer, which does not see how OpenMP's threads wait for each other.
#pragma once

namespace fastattn {
namespace cpu {
// body(context, thread) once for each of `threads` threads, the caller's own among them.
void run_threads(int threads, void (*body)(void* context, int thread), void* context);
}  // namespace cpu
}  // namespace fastattn
