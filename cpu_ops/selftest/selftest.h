// What the self-test's files share. Each runs its kernels on every instruction set of the machine, and gives the number of failures.
#pragma once
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "../helper_threads.h"
#include "../isa.h"

namespace specmoe {

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
int thread_failures();

}  // namespace specmoe
