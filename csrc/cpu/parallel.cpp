#include "parallel.hpp"

#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

namespace raco {

void parallel_for(std::int64_t count, int threads, const std::function<void(std::int64_t)>& body) {
  std::atomic<std::int64_t> next{0};
  const auto work = [&] {
    for (std::int64_t i = next++; i < count; i = next++) body(i);
  };
  std::vector<std::thread> others;
  if (count > 1 && threads > 1) {
    others.reserve(static_cast<std::size_t>(threads - 1));
    try {
      while (static_cast<int>(others.size()) + 1 < threads) others.emplace_back(work);
    } catch (const std::system_error&) {
      // The system has no thread to spare: those that started, and this one, do all the work.
    }
  }
  work();
  for (std::thread& other : others) other.join();
}

}  // namespace raco
