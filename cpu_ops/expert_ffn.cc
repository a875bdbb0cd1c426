#include "expert_ffn.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "scratch.h"

namespace specmoe {
namespace {

// One unit of work should read about this much of the weights: far above the cost of claiming it (0.1 us), yet small enough that a
// single expert feeds all cores. Few rows take up to eight times as much, since each unit waits for its first weights.
constexpr int64_t kTaskBytes = 128 * 1024, kFewTaskBytes = 1024 * 1024;

float value(const FfnArgs& a, int64_t i) {
  if (a.x_type == DType::kF32) return static_cast<const float*>(a.x)[i];
  const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(a.x)[i]) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// The columns in their order, from sums of 4-bit weights.
void join(const float* from, int64_t columns, int lanes, float* to) {
  for (int64_t m = 0; m < columns; m += 8 * lanes) {
    const int64_t last = std::min<int64_t>(columns - m, 8 * lanes);
    for (int64_t i = 0; i < last; ++i) to[m + i] = from[m + i % 8 * lanes + i / 8];
  }
}

}  // namespace

void float_rows(const FfnArgs& a, int64_t ld, float* rows) {
  for (int64_t i = 0; i < a.n; ++i) {
    float* to = rows + i * ld;
    for (int64_t m = 0; m < a.M; ++m) to[m] = value(a, i * a.M + m);
    std::fill(to + a.M, to + ld, 0.0f);
  }
}

void group_by_slot(const FfnArgs& a, Grouping& to) {
  const int64_t P = a.n * a.A;
  std::vector<int32_t>&start = to.start, &pairs = to.pairs;
  start.assign(a.R + 1, 0);
  pairs.resize(P);
  to.groups.clear();
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
    if (count > 0) to.groups.push_back({s, count, pairs.data() + first, nullptr, nullptr});
  }
  for (int64_t p = 0; p < P; ++p) {
    const int32_t s = a.slots[p];
    if (s >= 0 && s < a.R) pairs[start[s]++] = static_cast<int32_t>(p);
  }
}

void ask_for_pages(const FfnArgs& a, const Grouping& groups, int64_t bytes) {
  static const uintptr_t page = sysconf(_SC_PAGESIZE);
  for (const FfnGroup& g : groups.groups) {
    if (!a.table || !(reinterpret_cast<uintptr_t>(a.table[g.slot]) & 1)) continue;
    const uintptr_t at = reinterpret_cast<uintptr_t>(expert_at(a, g.slot)), first = at / page * page;
    madvise(reinterpret_cast<void*>(first), at + bytes - first, MADV_WILLNEED);  // no more than advice: nothing depends on it
  }
}

namespace {

int64_t expert_bytes(const FfnArgs& a) {
  if (a.w_type == DType::kF32 || a.w_type == DType::kBF16) return 3 * a.F * a.M * (a.w_type == DType::kF32 ? 4 : 2);
  return packed_expert_bytes(a.w_type, a.F, a.M);
}

// Output columns [begin, end) of a group: all hidden units, or one block of them where rows are few.
struct OutputTask {
  const FfnGroup* g;
  int64_t block, begin, end;
};

// Who does what in a call. A thread keeps its own from call to call, so that in a steady state nothing is allocated.
struct Plan : Grouping {
  FfnWay way;
  std::vector<int64_t> at;
  std::vector<OutputTask> tasks;
  std::vector<const FfnGroup*> few;
};

int64_t task_width(int64_t bytes_per_unit, int64_t multiple, int64_t bytes = kTaskBytes) {
  return std::max<int64_t>(1, bytes / bytes_per_unit / multiple) * multiple;
}

int64_t parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

// Floats of a row of hidden units, which tiles of AMX read 32 at a time; of its last tile, rows that are not there are read too.
int64_t hidden_floats(const FfnArgs& a) { return parts(a.F, 32) * 32; }
constexpr int64_t kTileRows = 16;

// Gives the groups their buffers behind the rows of x, all in one scratch buffer.
void place(FfnArgs& a, const KernelTable& kernels, Plan& plan) {
  const int64_t blocks = parts(a.F, hidden_block(a));
  plan.way = kernels.ffn_way(a);
  int64_t floats = a.n * row_floats(a);
  plan.at.clear();
  for (const FfnGroup& g : plan.groups) {
    plan.at.push_back(floats);
    floats += g.count * hidden_floats(a) + (g.count <= plan.way.few_rows ? blocks * g.count * sum_floats(a) : 0);
  }
  float* scratch = thread_scratch(Scratch::kFfnCall, floats + kTileRows * hidden_floats(a));
  a.rows = scratch;
  for (size_t i = 0; i < plan.groups.size(); ++i) {
    FfnGroup& g = plan.groups[i];
    g.hidden = scratch + plan.at[i];
    g.partial = g.hidden + g.count * hidden_floats(a);
  }
  if (plan.way.reads_x) return;
  if (a.w_type != DType::kI4) return float_rows(a, row_floats(a), scratch);
  for (int64_t i = 0; i < a.n; ++i) kernels.integers_from(a.x, a.x_type, i * a.M, a.M, scratch + i * row_floats(a));
}

void plan_output(const FfnArgs& a, Plan& plan, int threads) {
  const int64_t blocks = parts(a.F, hidden_block(a)), G = plan.groups.size();
  const int64_t strip = std::min<int64_t>(512, task_width(std::max<int64_t>(1, a.F * row_bytes(a.w_type, a.M) / a.M), 64));
  // Blocks are read as they lie; only where there are fewer than four a thread are they cut, into runs of at least 256 columns.
  const int64_t cuts = parts(4 * threads, std::max<int64_t>(1, G * blocks));
  const int64_t run = std::max<int64_t>(256, parts(parts(a.M, cuts), 128) * 128);
  plan.tasks.clear();
  plan.few.clear();
  for (const FfnGroup& g : plan.groups) {
    const bool is_few = g.count <= plan.way.few_rows;
    if (is_few) plan.few.push_back(&g);
    const int64_t width = is_few ? run : strip;
    for (int64_t b = 0; b < (is_few ? blocks : 1); ++b) {
      for (int64_t m = 0; m < a.M; m += width) plan.tasks.push_back({&g, b, m, std::min(a.M, m + width)});
    }
  }
}

// y of the rows of a group from its partial sums, of which the first is overwritten.
void add_partials(const FfnArgs& a, int lanes, const FfnGroup& g) {
  const int64_t ld = sum_floats(a), blocks = parts(a.F, hidden_block(a));
  const int64_t used = a.w_type == DType::kI4 ? parts(a.M, 8 * lanes) * 8 * lanes : a.M;
  const char* scales = expert_at(a, g.slot) + code_bytes(DType::kI8, a.F, a.M) + 2 * a.F * 4;
  for (int64_t r = 0; r < g.count; ++r) {
    float *y = a.y + g.pairs[r] * a.M, *sum = g.partial + r * ld;
    for (int64_t b = 1; b < blocks; ++b) {
      const float* p = g.partial + (b * g.count + r) * ld;
      for (int64_t m = 0; m < used; ++m) sum[m] += p[m];
    }
    if (a.w_type == DType::kI4) {
      join(sum, a.M, lanes, y);
    } else {
      std::copy(sum, sum + a.M, y);
    }
    for (int64_t m = 0; a.w_type == DType::kI8 && m < a.M; ++m) {
      float scale;
      std::memcpy(&scale, scales + m * 4, 4);
      y[m] *= scale;
    }
  }
}

}  // namespace

void expert_ffn(const FfnArgs& given, const KernelTable& kernels, Parallel& parallel) {
  FfnArgs a = given;
  thread_local Plan own;
  Plan& plan = own;  // the tasks run on other threads, which have plans of their own
  group_by_slot(a, plan);
  ask_for_pages(a, plan, expert_bytes(a));
  place(a, kernels, plan);
  plan_output(a, plan, parallel.threads());
  const int64_t G = plan.groups.size(), row = row_bytes(a.w_type, a.M);

  // Widths decide who computes an element, never how, so they may depend on the shapes.
  const int64_t share = 2 * a.F * row * G / (16 * parallel.threads());
  // Few rows; and tiles, which lay out their rows in each task.
  const bool few_rows = a.n * a.A <= kFewRows * G || plan.way.reads_x;
  const int64_t bytes = few_rows ? std::clamp<int64_t>(share, kTaskBytes, kFewTaskBytes) : kTaskBytes;
  const int64_t fw = task_width(2 * row, kBlock, bytes), f_tasks = parts(a.F, fw);
  auto hidden = [&](int64_t i) {
    const int64_t f = i % f_tasks * fw;
    kernels.ffn_hidden(a, plan.groups[i / f_tasks], f, std::min(a.F, f + fw));
  };
  parallel.for_each(G * f_tasks, hidden);

  auto output = [&](int64_t i) {
    const OutputTask& t = plan.tasks[i];
    if (t.g->count <= plan.way.few_rows)
      kernels.ffn_partial(a, *t.g, t.block, t.begin, t.end);
    else
      kernels.ffn_output(a, *t.g, t.begin, t.end);
  };
  parallel.for_each(plan.tasks.size(), output);

  auto add = [&](int64_t i) { add_partials(a, kernels.lanes, *plan.few[i]); };
  if (!plan.few.empty()) parallel.for_each(plan.few.size(), add);
}

}  // namespace specmoe
