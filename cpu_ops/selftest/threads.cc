#include <atomic>
#include <chrono>
#include <stdexcept>
#include <thread>
#include <vector>

#include "selftest.h"

namespace specmoe {
namespace {

// Every task once, also where tasks run tasks of their own.
int missed(HelpedParallel& parallel, int64_t n) {
  std::vector<std::atomic<int>> times(n);
  auto task = [&](int64_t i) {
    std::atomic<int64_t> sum{0};
    auto inner = [&](int64_t j) { sum += j; };
    parallel.for_each(3, inner);
    times[i] += sum == 3;
  };
  parallel.for_each(n, task);
  int failures = 0;
  for (const auto& count : times) failures += count != 1;
  return failures;
}

// The first exception reaches the caller, and the next run works.
int lost_exceptions(HelpedParallel& parallel) {
  auto task = [](int64_t i) {
    if (i % 5 == 3) throw std::runtime_error("task");
  };
  for (int round = 0; round < 50; ++round) {
    try {
      parallel.for_each(20, task);
      return 1;
    } catch (const std::runtime_error&) {
    }
  }
  return missed(parallel, 7);
}

}  // namespace

int thread_failures() {
  std::atomic<int> failures{0};
  const auto caller = [&] {
    for (int threads : {1, 2, 4}) {
      HelpedParallel parallel(threads);
      for (int64_t n : {0, 1, 2, 3, 40}) failures += missed(parallel, n);
      std::this_thread::sleep_for(std::chrono::milliseconds(2));  // helpers fall asleep
      failures += missed(parallel, 9) + lost_exceptions(parallel);
    }
  };
  std::vector<std::thread> callers;
  for (int i = 0; i < 3; ++i) callers.emplace_back(caller);
  for (auto& thread : callers) thread.join();
  return failures;
}

}  // namespace specmoe
