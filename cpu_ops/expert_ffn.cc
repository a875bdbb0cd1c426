#include "expert_ffn.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace specmoe {
namespace {

// One unit of work should read about this much of the weights: far above the cost of claiming it (0.1 us), yet small enough that a
// single expert feeds all cores.
constexpr int64_t kTaskBytes = 128 * 1024;

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

// A stable counting sort of the pairs by slot; pairs without an expert get zeros.
std::vector<FfnGroup> group_by_slot(const FfnArgs& a, std::vector<int32_t>& pairs) {
  const int64_t P = a.n * a.A;
  std::vector<int32_t> start(a.R + 1, 0);
  for (int64_t p = 0; p < P; ++p) {
    const int32_t s = a.slots[p];
    if (s >= 0 && s < a.R)
      ++start[s + 1];
    else
      std::memset(a.y + p * a.M, 0, a.M * sizeof(float));
  }
  std::vector<FfnGroup> groups;
  for (int64_t s = 0; s < a.R; ++s) {
    const int64_t first = start[s], count = start[s + 1];
    start[s + 1] += start[s];
    if (count > 0) groups.push_back({s, count, pairs.data() + first, a.hidden + first * padded(a.F)});
  }
  for (int64_t p = 0; p < P; ++p) {
    const int32_t s = a.slots[p];
    if (s >= 0 && s < a.R) pairs[start[s]++] = static_cast<int32_t>(p);
  }
  return groups;
}

int64_t task_width(int64_t bytes_per_unit, int64_t multiple) {
  return std::max<int64_t>(1, kTaskBytes / bytes_per_unit / multiple) * multiple;
}

}  // namespace

void expert_ffn(const FfnArgs& given, const KernelTable& kernels, Parallel& parallel) {
  FfnArgs a = given;
  const int64_t P = a.n * a.A, item = a.w_type == DType::kF32 ? 4 : 2;
  float* scratch = thread_scratch(2, a.n * padded(a.M) + P * padded(a.F));
  float_rows(a, scratch);
  a.rows = scratch;
  a.hidden = scratch + a.n * padded(a.M);
  std::vector<int32_t> pairs(P);
  const std::vector<FfnGroup> groups = group_by_slot(a, pairs);
  const int64_t G = groups.size();

  // Widths decide who computes an element, never how, so they may depend on the shapes.
  const int64_t fw = task_width(2 * a.M * item, kBlock), f_tasks = (a.F + fw - 1) / fw;
  auto hidden = [&](int64_t i) {
    const int64_t f = i % f_tasks * fw;
    kernels.ffn_hidden(a, groups[i / f_tasks], f, std::min(a.F, f + fw));
  };
  parallel.for_each(G * f_tasks, hidden);

  // One or two rows read the weights once and wait for memory: runs as long as they can be while every thread has four strips.
  const int64_t strips = std::max<int64_t>(1, 4 * parallel.threads() / std::max<int64_t>(1, G));
  const int64_t wanted = P <= 2 * G ? a.M / strips / 64 * 64 : task_width(a.F * item, 64);
  const int64_t mw = std::max<int64_t>(64, std::min<int64_t>(512, wanted)), m_tasks = (a.M + mw - 1) / mw;
  auto output = [&](int64_t i) {
    const int64_t m = i % m_tasks * mw;
    kernels.ffn_output(a, groups[i / m_tasks], m, std::min(a.M, m + mw));
  };
  parallel.for_each(G * m_tasks, output);
}

}  // namespace specmoe
