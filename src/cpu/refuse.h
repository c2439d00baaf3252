// For kernels, which are compiled for many instruction sets and so cannot throw what the standard library inlines.
#pragma once
#include <cstdint>

namespace fastattn {
namespace cpu {

// Throws std::invalid_argument: no kernel knows this code of a params field. Never inside a parallel loop, where an
// exception ends the process.
[[noreturn]] void unknown_code(const char* field, int64_t code);

}  // namespace cpu
}  // namespace fastattn
