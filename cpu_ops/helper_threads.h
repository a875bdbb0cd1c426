// Parallel over threads of this process that stay awake for a while after a kernel.
#pragma once
#include "parallel.h"

namespace specmoe {

// The caller takes part in a shared claim loop and waits only for tasks that a helper has already claimed: a helper that comes late,
// or never, costs nothing but its help. Any number of callers may run at once, and a task may run kernels of its own.
class HelpedParallel final : public Parallel {
 public:
  explicit HelpedParallel(int64_t threads) : threads_(threads > 1 ? static_cast<int>(threads) : 1) {}

  int threads() const override { return threads_; }
  void run(int64_t n, void (*fn)(void*, int64_t), void* ctx) override;

 private:
  int threads_;
};

}  // namespace specmoe
