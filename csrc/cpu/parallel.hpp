// A parallel loop on plain threads, started for the call and joined before it returns.
//
// No OpenMP, because torch brings a runtime of its own and two in one process fight over the cores;
// no pool, because a pool does not survive fork() (data loaders fork) and starting a thread costs
// about 20 us, little beside a pass over a model. Indices are handed out by a counter, so a core
// that is busy with something else gets fewer; a result must not depend on who computed what.
#pragma once

#include <cstdint>
#include <functional>

namespace raco {

// body(i) for every i in [0, count), on at most `threads` threads including the caller's.
// `body` must not throw.
void parallel_for(std::int64_t count, int threads, const std::function<void(std::int64_t)>& body);

}  // namespace raco
