#include "expert_ffn.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "scratch.h"

namespace specmoe {
namespace {

// One unit of work should read about this much of the weights: far above the cost of claiming it (0.1 us), yet small enough that a
// single expert feeds all cores. Few rows take up to eight times as much, since each unit waits for its first weights.
constexpr int64_t kTaskBytes = 128 * 1024, kFewTaskBytes = 1024 * 1024;

void float_rows(const FfnArgs& a, float* rows) {
  const int64_t ld = padded(a.M);
  for (int64_t i = 0; i < a.n; ++i) {
    float* to = rows + i * ld;
    for (int64_t m = 0; m < a.M; ++m) {
      if (a.x_type == DType::kF32) {
        to[m] = static_cast<const float*>(a.x)[i * a.M + m];
      } else {
        const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(a.x)[i * a.M + m]) << 16;
        std::memcpy(&to[m], &bits, 4);
      }
    }
    std::fill(to + a.M, to + ld, 0.0f);
  }
}

// Output columns [begin, end) of a group: all hidden units, or one block of them where rows are few.
struct OutputTask {
  const FfnGroup* g;
  int64_t block, begin, end;
};

// Who does what in a call. A thread keeps its own from call to call, so that in a steady state nothing is allocated.
struct Plan {
  std::vector<int32_t> pairs, start;
  std::vector<int64_t> at;
  std::vector<FfnGroup> groups;
  std::vector<OutputTask> tasks;
  std::vector<const FfnGroup*> few;
};

// A stable counting sort of the pairs by slot; pairs without an expert get zeros.
void group_by_slot(const FfnArgs& a, Plan& plan) {
  const int64_t P = a.n * a.A;
  std::vector<int32_t>&start = plan.start, &pairs = plan.pairs;
  start.assign(a.R + 1, 0);
  pairs.resize(P);
  plan.groups.clear();
  for (int64_t p = 0; p < P; ++p) {
    const int32_t s = a.slots[p];
    if (s >= 0 && s < a.R)
      ++start[s + 1];
    else
      std::memset(a.y + p * a.M, 0, a.M * sizeof(float));
  }
  for (int64_t s = 0; s < a.R; ++s) {
    const int64_t first = start[s], count = start[s + 1];
    start[s + 1] += start[s];
    if (count > 0) plan.groups.push_back({s, count, pairs.data() + first, nullptr, nullptr});
  }
  for (int64_t p = 0; p < P; ++p) {
    const int32_t s = a.slots[p];
    if (s >= 0 && s < a.R) pairs[start[s]++] = static_cast<int32_t>(p);
  }
}

int64_t task_width(int64_t bytes_per_unit, int64_t multiple, int64_t bytes = kTaskBytes) {
  return std::max<int64_t>(1, bytes / bytes_per_unit / multiple) * multiple;
}

int64_t parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

bool is_few(const FfnGroup& g) { return g.count <= kFewRows; }

// Gives the groups their buffers behind the float rows, all in one scratch buffer.
void place(FfnArgs& a, Plan& plan) {
  const int64_t blocks = parts(a.F, kHiddenBlock);
  int64_t floats = a.n * padded(a.M);
  plan.at.clear();
  for (const FfnGroup& g : plan.groups) {
    plan.at.push_back(floats);
    floats += g.count * padded(a.F) + (is_few(g) ? blocks * g.count * padded(a.M) : 0);
  }
  float* scratch = thread_scratch(Scratch::kFfnCall, floats);
  a.rows = scratch;
  for (size_t i = 0; i < plan.groups.size(); ++i) {
    FfnGroup& g = plan.groups[i];
    g.hidden = scratch + plan.at[i];
    g.partial = g.hidden + g.count * padded(a.F);
  }
  float_rows(a, scratch);
}

void plan_output(const FfnArgs& a, Plan& plan, int threads) {
  const int64_t item = a.w_type == DType::kF32 ? 4 : 2, blocks = parts(a.F, kHiddenBlock), G = plan.groups.size();
  const int64_t strip = std::min<int64_t>(512, task_width(a.F * item, 64));
  // Blocks are read as they lie; only where there are fewer than four a thread are they cut, into runs of at least 256 columns.
  const int64_t cuts = parts(4 * threads, std::max<int64_t>(1, G * blocks));
  const int64_t run = std::max<int64_t>(256, parts(parts(a.M, cuts), 64) * 64);
  plan.tasks.clear();
  plan.few.clear();
  for (const FfnGroup& g : plan.groups) {
    if (is_few(g)) plan.few.push_back(&g);
    const int64_t width = is_few(g) ? run : strip;
    for (int64_t b = 0; b < (is_few(g) ? blocks : 1); ++b) {
      for (int64_t m = 0; m < a.M; m += width) plan.tasks.push_back({&g, b, m, std::min(a.M, m + width)});
    }
  }
}

void add_partials(const FfnArgs& a, const FfnGroup& g) {
  const int64_t ld = padded(a.M), blocks = parts(a.F, kHiddenBlock);
  for (int64_t r = 0; r < g.count; ++r) {
    float* y = a.y + g.pairs[r] * a.M;
    std::fill(y, y + a.M, 0.0f);
    for (int64_t b = 0; b < blocks; ++b) {
      const float* p = g.partial + (b * g.count + r) * ld;
      for (int64_t m = 0; m < a.M; ++m) y[m] += p[m];
    }
  }
}

}  // namespace

void expert_ffn(const FfnArgs& given, const KernelTable& kernels, Parallel& parallel) {
  FfnArgs a = given;
  thread_local Plan own;
  Plan& plan = own;  // the tasks run on other threads, which have plans of their own
  group_by_slot(a, plan);
  place(a, plan);
  plan_output(a, plan, parallel.threads());
  const int64_t G = plan.groups.size(), item = a.w_type == DType::kF32 ? 4 : 2;

  // Widths decide who computes an element, never how, so they may depend on the shapes.
  const int64_t share = 2 * a.F * a.M * item * G / (16 * parallel.threads());
  const bool few_rows = a.n * a.A <= kFewRows * G;
  const int64_t bytes = few_rows ? std::clamp<int64_t>(share, kTaskBytes, kFewTaskBytes) : kTaskBytes;
  const int64_t fw = task_width(2 * a.M * item, kBlock, bytes), f_tasks = parts(a.F, fw);
  auto hidden = [&](int64_t i) {
    const int64_t f = i % f_tasks * fw;
    kernels.ffn_hidden(a, plan.groups[i / f_tasks], f, std::min(a.F, f + fw));
  };
  parallel.for_each(G * f_tasks, hidden);

  auto output = [&](int64_t i) {
    const OutputTask& t = plan.tasks[i];
    if (is_few(*t.g))
      kernels.ffn_partial(a, *t.g, t.block, t.begin, t.end);
    else
      kernels.ffn_output(a, *t.g, t.begin, t.end);
  };
  parallel.for_each(plan.tasks.size(), output);

  auto add = [&](int64_t i) { add_partials(a, *plan.few[i]); };
  if (!plan.few.empty()) parallel.for_each(plan.few.size(), add);
}

}  // namespace specmoe
