#include "rowwise_ffn.h"

#include <algorithm>
#include <vector>

#include "scratch.h"

namespace specmoe {
namespace {

// One unit of work should read about this much of the weights (see expert_ffn.cc).
constexpr int64_t kTaskBytes = 128 * 1024;

int64_t task_rows(int64_t row_bytes) { return std::max<int64_t>(1, kTaskBytes / row_bytes / 4) * 4; }

}  // namespace

int64_t matrix_code_bytes(const RowwiseArgs& a, int64_t rows, int64_t columns) { return rows * code_row_bytes(a, columns); }

int64_t matrix_bytes(const RowwiseArgs& a, int64_t rows, int64_t columns) {
  const int64_t groups = scale_groups(a, columns), codes = matrix_code_bytes(a, rows, columns);
  switch (a.format) {
    case RowFormat::kFp8:
      return codes + (rows + a.block_rows - 1) / a.block_rows * groups * 4;
    case RowFormat::kInt4:
      return codes + rows * groups * 2 + (a.zeros ? rows * ((groups + 1) / 2) : 0);
    case RowFormat::kNvfp4:
      return codes + rows * groups + 4;
    default:
      return codes + rows * groups;
  }
}

int64_t rowwise_expert_bytes(const RowwiseArgs& a) {
  return 2 * matrix_bytes(a, a.F, a.M) + matrix_bytes(a, a.M, a.F) + (a.biased ? (2 * a.F + a.M) * 4 : 0);
}

void rowwise_ffn(const RowwiseArgs& given, const KernelTable& kernels, Parallel& parallel) {
  RowwiseArgs a = given;
  thread_local Grouping own;
  Grouping& grouping = own;  // the tasks run on other threads, which have their own
  group_by_slot(a, grouping);
  ask_for_pages(a, grouping, rowwise_expert_bytes(a));
  std::vector<FfnGroup>& groups = grouping.groups;
  int64_t pairs = 0;
  for (const FfnGroup& g : groups) pairs += g.count;
  const bool in_integers = a.format != RowFormat::kFp8;  // of which hidden units are made once all are known
  const int64_t ld = in_integers ? integer_floats(a.M) : a.M, integers = in_integers ? integer_floats(a.F) : 0;
  float* scratch = thread_scratch(Scratch::kFfnCall, a.n * ld + pairs * (a.F + integers));
  a.rows = scratch;
  float *hidden = scratch + a.n * ld, *first = hidden, *partial = hidden + pairs * a.F, *first_integers = partial;
  for (FfnGroup& g : groups) {
    g.hidden = hidden;
    g.partial = partial;
    hidden += g.count * a.F;
    partial += g.count * integers;
  }
  if (in_integers) {
    for (int64_t i = 0; i < a.n; ++i) kernels.integers_from(a.x, a.x_type, i * a.M, a.M, scratch + i * ld);
  } else {
    float_rows(a, ld, scratch);
  }

  const int64_t G = groups.size();
  const int64_t fw = task_rows(2 * code_row_bytes(a, a.M)), f_tasks = (a.F + fw - 1) / fw;
  auto hidden_units = [&](int64_t i) {
    const int64_t f = i % f_tasks * fw;
    kernels.rowwise_hidden(a, groups[i / f_tasks], f, std::min(a.F, f + fw));
  };
  parallel.for_each(G * f_tasks, hidden_units);

  auto to_integers = [&](int64_t i) { kernels.integers_from(first, DType::kF32, i * a.F, a.F, first_integers + i * integers); };
  if (in_integers) parallel.for_each(pairs, to_integers);

  const int64_t mw = task_rows(code_row_bytes(a, a.F)), m_tasks = (a.M + mw - 1) / mw;
  auto output = [&](int64_t i) {
    const int64_t m = i % m_tasks * mw;
    kernels.rowwise_output(a, groups[i / m_tasks], m, std::min(a.M, m + mw));
  };
  parallel.for_each(G * m_tasks, output);
}

}  // namespace specmoe
