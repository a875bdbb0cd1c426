// What the self-test's files share. Each runs its kernels on every instruction set of the machine, and gives the number of failures.
#pragma once
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "../isa.h"
#include "../parallel.h"

namespace specmoe {

struct Threads final : Parallel {
  int count;
  explicit Threads(int n) : count(n) {}
  int threads() const override { return count; }
  void run(int64_t n, void (*fn)(void*, int64_t), void* ctx) override {
    std::atomic<int64_t> next{0};
    const auto loop = [&] {
      for (int64_t i; (i = next.fetch_add(1)) < n;) fn(ctx, i);
    };
    std::vector<std::thread> helpers;
    for (int i = 1; i < count; ++i) helpers.emplace_back(loop);
    loop();
    for (auto& t : helpers) t.join();
  }
};

// n items that start `item` bytes behind a 64-byte boundary and end where the allocation ends.
template <typename T>
struct Exact {
  std::unique_ptr<char[]> raw;
  T* data;
  int64_t size;
  explicit Exact(int64_t n, int64_t item = sizeof(T)) : raw(new char[n * sizeof(T) + 64 + item]), size(n) {
    data = reinterpret_cast<T*>(raw.get() + 64 + item);
  }
  T& operator[](int64_t i) { return data[i]; }
};

inline std::mt19937 rng(1);
inline float draw() { return std::normal_distribution<float>()(rng); }

inline uint16_t bfloat16_bits(float f) {  // towards zero
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return static_cast<uint16_t>(bits >> 16);
}

inline double of_bfloat16(uint16_t bits) {
  const uint32_t whole = static_cast<uint32_t>(bits) << 16;
  float f;
  std::memcpy(&f, &whole, 4);
  return static_cast<double>(f);
}

int attention_failures();
int expert_failures();
int product_failures();

}  // namespace specmoe
