// Parallel over XLA's own thread pool.
#pragma once
#include <atomic>
#include <exception>
#include <memory>
#include <thread>

#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace specmoe {

// The caller takes part in a shared claim loop and waits only for chunks that somebody has already claimed, so a pool that is busy
// (or whose worker runs this very handler) cannot deadlock it. Helpers that start late find nothing left and touch nothing but the
// shared counter, which they keep alive.
class XlaParallel final : public Parallel {
 public:
  // max_threads 0: as many as the pool has.
  XlaParallel(xla::ffi::ThreadPool& pool, int64_t max_threads) : pool_(pool) {
    const int64_t have = pool.num_threads() > 0 ? pool.num_threads() : 1;
    threads_ = static_cast<int>(max_threads > 0 && max_threads < have ? max_threads : have);
  }

  int threads() const override { return threads_; }

  void run(int64_t n, void (*fn)(void*, int64_t), void* ctx) override {
    auto work = std::make_shared<Work>();  // not on the stack, nor reused: a helper that starts late still looks at it
    work->n = n;
    work->fn = fn;
    work->ctx = ctx;
    const int64_t helpers = (n < threads_ ? n : threads_) - 1;
    for (int64_t i = 0; i < helpers; ++i) {
      pool_.Schedule([work]() { work->claim_loop(); });
    }
    work->claim_loop();
    for (int spin = 0; work->done.load(std::memory_order_acquire) < n; ++spin) {
      if (spin > 64) std::this_thread::yield();
    }
    if (work->failed.load(std::memory_order_acquire)) std::rethrow_exception(work->error);
  }

 private:
  struct Work {
    std::atomic<int64_t> next{0}, done{0};
    int64_t n = 0;
    void (*fn)(void*, int64_t) = nullptr;
    void* ctx = nullptr;
    std::atomic<bool> failed{false};
    std::exception_ptr error;  // written by whoever sets `failed`, read when all are done

    void claim_loop() {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) {
        if (!failed.load(std::memory_order_relaxed)) attempt(i);
        done.fetch_add(1, std::memory_order_release);
      }
    }

    void attempt(int64_t i) noexcept {
      try {
        fn(ctx, i);
      } catch (...) {
        if (!failed.exchange(true, std::memory_order_acq_rel)) error = std::current_exception();
      }
    }
  };
  xla::ffi::ThreadPool& pool_;
  int threads_;
};

}  // namespace specmoe
