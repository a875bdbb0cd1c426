#include "bench.h"

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <thread>
#include <vector>

#include "isa.h"

namespace specmoe {
namespace {

template <typename F>
double seconds_on(int threads, F f) {
  std::vector<std::thread> pool;
  const auto start = std::chrono::steady_clock::now();
  for (int i = 1; i < threads; ++i) pool.emplace_back(f, i);
  f(0);
  for (auto& t : pool) t.join();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

const KernelTable& table(const std::string& isa) {
  const KernelTable* t = isa_table(isa);
  if (t == nullptr) throw std::invalid_argument("no such instruction set on this machine: " + isa);
  return *t;
}

// Kept between calls: touching fresh pages costs far more than reading them.
struct Pool {
  char* data = nullptr;
  int64_t bytes = 0;
  char* get(int64_t want) {
    if (want > bytes) {
      std::free(data);
      bytes = 0;
      data = static_cast<char*>(std::aligned_alloc(4096, (want + 4095) / 4096 * 4096));
      if (data == nullptr) throw std::bad_alloc();
      std::memset(data, 1, want);
      bytes = want;
    }
    return data;
  }
};

}  // namespace

double read_bandwidth(const std::string& isa, int64_t bytes, int threads) {
  static Pool pool;
  char* data = pool.get(bytes);
  const int64_t part = bytes / threads / 4096 * 4096;
  std::vector<double> sums(threads);
  const auto& t = table(isa);
  const double s = seconds_on(threads, [&](int i) { sums[i] = t.read_sum(data + i * part, part); });
  return static_cast<double>(part) * threads / s;
}

double fma_peak(const std::string& isa, int threads) {
  constexpr int64_t kIterations = 20'000'000;  // some 30 ms: beyond the start of the threads, below anyone's patience
  std::vector<double> flops(threads);
  const auto& t = table(isa);
  const double s = seconds_on(threads, [&](int i) { flops[i] = t.fma_peak(kIterations); });
  double total = 0;
  for (double f : flops) total += f;
  return total / s;
}

}  // namespace specmoe
