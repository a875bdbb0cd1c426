// Who runs the tasks of a kernel. The kernels know neither XLA nor threads; they are handed a Parallel.
#pragma once
#include <cstdint>

namespace specmoe {

class Parallel {
 public:
  virtual ~Parallel() = default;
  virtual int threads() const = 0;
  // Calls fn(ctx, i) for i in [0, n), each once, claimed in increasing order; returns when all have ended. Throws the first exception
  // that a call of fn threw, after which those that had not begun are left out.
  virtual void run(int64_t n, void (*fn)(void* ctx, int64_t i), void* ctx) = 0;

  template <typename F>
  void for_each(int64_t n, F& f) {
    run(n, [](void* ctx, int64_t i) { (*static_cast<F*>(ctx))(i); }, &f);
  }
};

}  // namespace specmoe
