#include "chunked_attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

#include "scratch.h"

namespace specmoe {

namespace {

int64_t capacity(const AttentionArgs& a, int64_t b) {
  if (a.pages == 0) return a.S;
  int64_t valid = 0;
  for (; valid < a.pages; ++valid) {
    const int32_t page = a.table[b * a.pages + valid];
    if (page < 0 || page >= a.rows) break;
  }
  return valid * a.S;
}

AttentionRequest make_request(const AttentionArgs& a, int64_t b) {
  AttentionRequest r;
  const int64_t cap = capacity(a, b);
  r.b = b;
  r.length = std::clamp<int64_t>(a.lengths[b], 0, cap);
  r.num_new = std::clamp<int64_t>(a.num_new[b], 0, a.T);
  r.total = std::min(r.length + r.num_new, cap);
  const int64_t present = r.total - r.length;
  const uint64_t exist = present >= 64 ? ~uint64_t{0} : (uint64_t{1} << present) - 1;
  const uint8_t* mask = a.mask == nullptr ? nullptr : a.mask + (a.mask_per_request ? b * a.T * a.T : 0);
  int64_t depth[kMaxNew];  // ancestors among the new tokens; t for a chain
  for (int64_t t = 0; t < r.num_new; ++t) {
    uint64_t allow = 0;
    for (int64_t c = 0; c < r.num_new; ++c) {
      if (mask == nullptr ? c <= t : mask[t * a.T + c] != 0) allow |= uint64_t{1} << c;
    }
    depth[t] = std::max(0, __builtin_popcountll(allow) - 1);
    r.allow[t] = allow & exist;
  }
  r.low_min = r.total;
  r.low_max = 0;
  for (int64_t t = 0; t < r.num_new; ++t) {
    r.low[t] = a.window > 0 ? std::max<int64_t>(0, r.length + depth[t] - a.window + 1) : 0;
    r.low_min = std::min(r.low_min, r.low[t]);
    r.low_max = std::max(r.low_max, r.low[t]);
    for (int64_t c = 0; a.window > 0 && c < r.num_new; ++c) {
      if (depth[c] <= depth[t] - a.window) r.allow[t] &= ~(uint64_t{1} << c);
    }
  }
  // New tokens are written even where no row attends them, so a chunk that holds one is never skipped.
  r.low_min = std::min(r.low_min, r.length);
  return r;
}

void clear(AttentionState& s, int64_t rows, int64_t D) {
  std::fill(s.max, s.max + rows, -INFINITY);
  std::memset(s.sum, 0, rows * kBlock * sizeof(float));
  std::memset(s.acc, 0, rows * padded(D) * sizeof(float));
}

int64_t chunks_of(const AttentionRequest& r) { return (r.total + kChunk - 1) / kChunk; }

struct Job {
  const AttentionArgs& args;
  const KernelTable& kernels;
  const std::vector<AttentionRequest>& requests;
  int64_t G, max_rows, state_floats;

  void zero_rows(const AttentionRequest& r, int64_t k) const {
    const int64_t item = args.out_type == DType::kF32 ? 4 : 2;
    for (int64_t t = r.num_new; t < args.T; ++t) {
      std::memset(static_cast<char*>(args.out) + ((r.b * args.T + t) * args.H + k * G) * args.D * item, 0, G * args.D * item);
    }
  }

  void chunk(const AttentionRequest& r, int64_t k, int64_t c, AttentionState& s) const {
    clear(s, r.num_new * G, args.D);
    const int64_t end = std::min(r.total, (c + 1) * kChunk);
    if (end > r.low_min) kernels.attention_chunk(args, r, k, c * kChunk, end, s);
  }

  // A whole head by one thread.
  void head(const AttentionRequest& r, int64_t k) const {
    zero_rows(r, k);
    const int64_t rows = r.num_new * G;
    if (rows == 0) return;
    float* p = thread_scratch(Scratch::kAttentionStates, 2 * state_floats);
    AttentionState total = AttentionState::at(p, rows, args.D), part = AttentionState::at(p + state_floats, rows, args.D);
    clear(total, rows, args.D);
    for (int64_t c = 0; c < chunks_of(r); ++c) {
      chunk(r, k, c, part);
      kernels.attention_merge(args, rows, total, part);
    }
    kernels.attention_finish(args, r, k, total);
  }
};

struct ChunkTask {
  const AttentionRequest* r;
  int64_t k, c;
  bool last;
};

// What a thread keeps from call to call, so that in a steady state nothing is allocated.
struct Plan {
  std::vector<AttentionRequest> requests;
  std::vector<int64_t> order;
  std::vector<ChunkTask> tasks;
  std::vector<char> done;
};

// Chunks of all heads, in order, shared by the threads; whoever completes the next in order merges it. `slots` partial results
// exist at once, so memory does not grow with the sequence; a thread that is too far ahead waits for a chunk that somebody is
// working on.
class Split {
 public:
  Split(const Job& job, int threads, Plan& plan) : job_(job), slots_(4 * threads), tasks_(plan.tasks), done_(plan.done) {
    tasks_.clear();
    done_.assign(slots_, 0);
    for (const AttentionRequest& r : job.requests) {
      for (int64_t k = 0; k < job.args.K; ++k) {
        job.zero_rows(r, k);
        if (r.num_new == 0) continue;
        const int64_t n = std::max<int64_t>(1, chunks_of(r));
        for (int64_t c = 0; c < n; ++c) tasks_.push_back({&r, k, c, c + 1 == n});
      }
    }
    p_ = thread_scratch(Scratch::kAttentionStates, (slots_ + 1) * job.state_floats);
  }

  int64_t size() const { return tasks_.size(); }

  void operator()(int64_t i) {
    try {
      compute(i);
    } catch (...) {
      failed_.store(true, std::memory_order_release);
      throw;
    }
  }

 private:
  void compute(int64_t i) {
    while (frontier_.load(std::memory_order_acquire) <= i - slots_) {
      if (failed_.load(std::memory_order_acquire)) return;  // the chunk that this one waits for never comes
      std::this_thread::yield();
    }
    const ChunkTask& t = tasks_[i];
    AttentionState part = state(1 + i % slots_, *t.r);
    job_.chunk(*t.r, t.k, t.c, part);
    std::lock_guard<std::mutex> lock(mutex_);
    done_[i % slots_] = 1;
    int64_t f = frontier_.load(std::memory_order_relaxed);
    for (; f < size() && done_[f % slots_]; ++f) {
      done_[f % slots_] = 0;
      merge(f);
    }
    frontier_.store(f, std::memory_order_release);
  }

  AttentionState state(int64_t slot, const AttentionRequest& r) {
    return AttentionState::at(p_ + slot * job_.state_floats, r.num_new * job_.G, job_.args.D);
  }

  void merge(int64_t i) {
    const ChunkTask& t = tasks_[i];
    const int64_t rows = t.r->num_new * job_.G;
    AttentionState total = state(0, *t.r), part = state(1 + i % slots_, *t.r);
    if (t.c == 0) clear(total, rows, job_.args.D);
    job_.kernels.attention_merge(job_.args, rows, total, part);
    if (t.last) job_.kernels.attention_finish(job_.args, *t.r, t.k, total);
  }

  const Job& job_;
  int64_t slots_;
  std::vector<ChunkTask>& tasks_;
  std::vector<char>& done_;
  float* p_;
  std::mutex mutex_;
  std::atomic<int64_t> frontier_{0};
  std::atomic<bool> failed_{false};
};

}  // namespace

void chunked_attention(const AttentionArgs& args, const KernelTable& kernels, Parallel& parallel) {
  thread_local Plan own;
  Plan& plan = own;  // the tasks run on other threads, which have plans of their own
  std::vector<AttentionRequest>& requests = plan.requests;
  requests.clear();
  for (int64_t b = 0; b < args.B; ++b) requests.push_back(make_request(args, b));
  const int64_t G = args.H / args.K, max_rows = args.T * G;
  const Job job{args, kernels, requests, G, max_rows, AttentionState::floats(max_rows, args.D)};
  if (args.B * args.K < 4 * parallel.threads() && parallel.threads() > 1) {
    Split split(job, parallel.threads(), plan);
    parallel.for_each(split.size(), split);
    return;
  }
  // Longest first: the last heads to be claimed are then the shortest, and no thread is left alone with a long one.
  std::vector<int64_t>& order = plan.order;
  order.resize(args.B);
  for (int64_t b = 0; b < args.B; ++b) order[b] = b;
  std::sort(order.begin(), order.end(), [&](int64_t x, int64_t y) {
    const int64_t lx = requests[x].total, ly = requests[y].total;
    return lx != ly ? lx > ly : x < y;
  });
  auto task = [&](int64_t i) { job.head(requests[order[i / args.K]], i % args.K); };
  parallel.for_each(args.B * args.K, task);
}

}  // namespace specmoe
