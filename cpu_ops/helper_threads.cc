#include "helper_threads.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace specmoe {
namespace {

// A thread that sleeps takes 30 to 70 us to come in a virtual machine, as long as a small kernel; from one kernel of a step to the next
// it is less than this. XLA's own pool is asleep by then.
constexpr std::chrono::microseconds kLinger{200};
constexpr int kPausesBetweenYields = 64;  // some microseconds: whoever else wants the core gets it

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// The CPU that this thread is on; -1 where the system does not tell.
int this_cpu() {
#if defined(__linux__)
  return sched_getcpu();
#else
  return -1;
#endif
}

// Sends a thread to another CPU than that, if this one may be on another.
void send_away([[maybe_unused]] pthread_t thread, [[maybe_unused]] int cpu) {
#if defined(__linux__)
  cpu_set_t cpus;
  if (pthread_getaffinity_np(pthread_self(), sizeof cpus, &cpus) != 0) return;
  CPU_CLR(cpu, &cpus);
  if (CPU_COUNT(&cpus) > 0) pthread_setaffinity_np(thread, sizeof cpus, &cpus);
#endif
}

struct Work {
  std::atomic<int64_t> next{0}, done{0};
  std::atomic<int> places;  // of helpers
  int64_t n;
  void (*fn)(void*, int64_t);
  void* ctx;
  std::atomic<bool> failed{false};
  std::exception_ptr error;  // written by whoever sets `failed`, read when all are done

  Work(int helpers, int64_t tasks, void (*task)(void*, int64_t), void* with) : places(helpers), n(tasks), fn(task), ctx(with) {}

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

  bool takes_a_helper() { return next.load(std::memory_order_relaxed) < n && places.fetch_sub(1, std::memory_order_relaxed) > 0; }
};

struct Helper {
  pthread_t thread;
  std::atomic<int> cpu{-1};  // where it waits for an offer; -1: it does not, or asleep
};

class Helpers {
 public:
  // Never destroyed: its threads end with the process.
  static Helpers& of_this_process() {
    static Helpers* const helpers = new Helpers;
    return *helpers;
  }

  void offer(const std::shared_ptr<Work>& work, int helpers) {
    bool asleep;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      hire(helpers);
      works_.push_back(work);
      offers_.fetch_add(1, std::memory_order_release);
      asleep = sleepers_ > 0;
      // The system may put the thread that runs a program where a helper waits, and leaves both there with other CPUs idle.
      const int cpu = this_cpu();
      for (const auto& helper : helpers_) {
        if (cpu >= 0 && helper->cpu.load(std::memory_order_relaxed) == cpu) send_away(helper->thread, cpu);
      }
    }
    for (int i = 0; asleep && i < helpers; ++i) wake_.notify_one();
  }

  void withdraw(const std::shared_ptr<Work>& work) {
    std::lock_guard<std::mutex> lock(mutex_);
    works_.erase(std::find(works_.begin(), works_.end(), work));
  }

 private:
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::shared_ptr<Work>> works_;
  std::atomic<uint64_t> offers_{0};
  std::vector<std::unique_ptr<Helper>> helpers_;
  int sleepers_ = 0;

  // Without the process's signals, which are for threads that Python knows.
  void hire(int wanted) {
    if (static_cast<int>(helpers_.size()) >= wanted) return;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
      while (static_cast<int>(helpers_.size()) < wanted) {
        auto helper = std::make_unique<Helper>();
        std::thread thread([this, own = helper.get()] { help(*own); });
        helper->thread = thread.native_handle();
        thread.detach();
        helpers_.push_back(std::move(helper));
      }
    } catch (const std::system_error&) {  // the system has no thread left: fewer help
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  void help(Helper& self) {
    for (uint64_t seen = 0;;) {
      seen = next_offer(seen, self);
      self.cpu.store(-1, std::memory_order_relaxed);
      while (const std::shared_ptr<Work> work = open_work()) work->claim_loop();
    }
  }

  // Returns when there are other offers than those seen, and how many there were.
  uint64_t next_offer(uint64_t seen, Helper& self) {
    const auto until = std::chrono::steady_clock::now() + kLinger;
    do {
      self.cpu.store(this_cpu(), std::memory_order_relaxed);
      for (int i = 0; i < kPausesBetweenYields; ++i) {
        const uint64_t offers = offers_.load(std::memory_order_acquire);
        if (offers != seen) return offers;
        pause();
      }
      std::this_thread::yield();
    } while (std::chrono::steady_clock::now() < until);
    std::unique_lock<std::mutex> lock(mutex_);
    ++sleepers_;
    self.cpu.store(-1, std::memory_order_relaxed);
    wake_.wait(lock, [&] { return offers_.load(std::memory_order_relaxed) != seen; });
    --sleepers_;
    return offers_.load(std::memory_order_relaxed);
  }

  std::shared_ptr<Work> open_work() {
    std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& work : works_) {
      if (work->takes_a_helper()) return work;
    }
    return nullptr;
  }
};

}  // namespace

void HelpedParallel::run(int64_t n, void (*fn)(void*, int64_t), void* ctx) {
  const int helpers = static_cast<int>(std::min<int64_t>(n, threads_)) - 1;
  const auto work = std::make_shared<Work>(helpers, n, fn, ctx);  // helpers that come late still look at it
  if (helpers > 0) Helpers::of_this_process().offer(work, helpers);
  work->claim_loop();
  if (helpers > 0) Helpers::of_this_process().withdraw(work);
  for (int spin = 0; work->done.load(std::memory_order_acquire) < n; ++spin) {
    if (spin > kPausesBetweenYields) std::this_thread::yield();
  }
  if (work->failed.load(std::memory_order_acquire)) std::rethrow_exception(work->error);
}

}  // namespace specmoe
