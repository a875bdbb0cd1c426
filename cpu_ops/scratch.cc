#include "scratch.h"

#include <cstdlib>
#include <new>

namespace specmoe {
namespace {

constexpr int64_t kStep = 1024;  // floats; also what aligned_alloc wants: a multiple of the alignment
constexpr int64_t kMost = INT64_MAX / 8;

struct Buffer {
  float* data = nullptr;
  int64_t size = 0;
  ~Buffer() { std::free(data); }

  void grow(int64_t floats) {
    std::free(data);
    data = nullptr;
    size = 0;
    if (floats > kMost) throw std::bad_alloc();
    const int64_t rounded = (floats + kStep - 1) / kStep * kStep;
    data = static_cast<float*>(std::aligned_alloc(64, rounded * sizeof(float)));
    if (data == nullptr) throw std::bad_alloc();
    size = rounded;
  }
};

}  // namespace

float* thread_scratch(Scratch which, int64_t floats) {
  thread_local Buffer buffers[static_cast<int>(Scratch::kCount)];
  Buffer& buffer = buffers[static_cast<int>(which)];
  if (buffer.size < floats) buffer.grow(floats);
  return buffer.data;
}

}  // namespace specmoe
