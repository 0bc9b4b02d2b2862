// Work on the threads of torch's own OpenMP pool.
#pragma once
#include <cstdint>

namespace normkit::cpu {

// The number torch.set_num_threads set for this thread; 1 where there is no pool to join.
int max_threads();

// Threads that pay for work that moves so many bytes and can be cut into so many pieces.
int threads_for(int64_t bytes, int64_t pieces);

// Calls work(context, part) for each part in [0, parts), a part to a thread, and returns when all
// are done.  Part p of one call runs where part p of the last one ran, so its rows may still be in
// that core's cache.
void run_on_threads(int parts, void (*work)(void* context, int part), void* context);

}  // namespace normkit::cpu
