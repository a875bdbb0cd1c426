// Small odd shapes on exactly sized, misaligned heap buffers, on every instruction set of the machine:
//   cmake -S cpu_ops -B build/sanitize -DSPECMOE_SANITIZE=ON && cmake --build build/sanitize && ctest --test-dir build/sanitize
#include <cstdio>
#include <new>

#include "../expert_ffn.h"
#include "../scratch.h"
#include "selftest.h"

namespace specmoe {
namespace {

// A call that fails says so, leaves no thread waiting, and the next one works.
int failing() {
  struct : Parallel {
    int threads() const override { return 1; }
    void run(int64_t, void (*)(void*, int64_t), void*) override { throw std::bad_alloc(); }
  } none;
  const KernelTable& kernels = *isa_table("auto");
  float x[4] = {1, 1, 1, 1}, w[3 * 4 * 4] = {}, y[4];
  int32_t slot = 0;
  FfnArgs a{};
  a.n = 1;
  a.A = 1;
  a.M = 4;
  a.F = 4;
  a.R = 1;
  a.expert_bytes = sizeof w;
  a.x = x;
  a.blocks = w;
  a.slots = &slot;
  a.y = y;
  try {
    expert_ffn(a, kernels, none);
    return 1;
  } catch (const std::bad_alloc&) {
  }
  try {
    thread_scratch(Scratch::kFfnCall, int64_t{1} << 60);
    return 1;
  } catch (const std::bad_alloc&) {
  }
  HelpedParallel parallel(1);
  expert_ffn(a, kernels, parallel);
  return y[0] != 0;
}

}  // namespace
}  // namespace specmoe

int main() {
  using namespace specmoe;
  const int failures = thread_failures() + attention_failures() + expert_failures() + product_failures() + failing();
  std::printf("%d failures\n", failures);
  return failures != 0;
}
