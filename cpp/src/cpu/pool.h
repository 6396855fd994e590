// A pool of worker threads for data-parallel loops.
#pragma once

#include <cstdint>
#include <functional>

namespace qmoe {

// Calls body(i) once for every i < count on up to `threads` threads, the calling one included; returns when all are
// done. Concurrent calls take turns. Workers are created on first need, sleep between calls, and are created anew after
// a fork.
void parallel_for(uint64_t count, int threads, const std::function<void(uint64_t)>& body);

}  // namespace qmoe
