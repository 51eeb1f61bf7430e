// A pool of threads that share chunks of work with the caller.
#pragma once

#include <cstdint>
#include <functional>

namespace expertfleet {

// Threads that a parallel_for may use, the caller among them; at least 1.
void set_num_threads(int count);
int num_threads();

// Calls body(chunk) once for each chunk in [0, num_chunks), num_chunks < 2^20, and returns when all
// are done. Chunks are claimed one by one, so a thread that gets no core holds up nothing but the
// chunk it has begun: the caller does the rest. Which thread computes a chunk must not matter.
// Calls from several threads at once are safe; all but one of them run on their own thread alone.
void parallel_for(int64_t num_chunks, const std::function<void(int64_t)>& body);

}  // namespace expertfleet
