#include "few_rows_product.h"

#include <algorithm>

#include "expert_ffn.h"
#include "scratch.h"

namespace specmoe {
namespace {

// One unit of work reads about this much of W: far above the cost of claiming it, yet small enough that all threads end together.
// Where arithmetic takes longer than reading, fewer bytes are as much work.
constexpr int64_t kTaskBytes = 128 * 1024, kFewTaskBytes = 1024 * 1024, kMostShares = 4;

}  // namespace

void few_rows_product(const ProductArgs& given, const KernelTable& kernels, Parallel& parallel) {
  ProductArgs a = given;
  const int64_t ld = kernels.product_row_floats(a);
  float* rows = thread_scratch(Scratch::kProductRows, a.n * ld);
  kernels.product_gather(a, rows);
  a.rows = rows;
  const int64_t row_bytes = a.w_type == DType::kI4 ? groups_of(a.M) * (kGroup / 2 + 2) : a.M * (a.w_type == DType::kF32 ? 4 : a.w_type == DType::kBF16 ? 2 : 1);
  const int64_t share = row_bytes * a.N / (8 * parallel.threads());
  const int64_t least = kTaskBytes / std::clamp<int64_t>(a.n / 4, 1, kMostShares);
  const int64_t bytes = std::clamp(share, least, kFewTaskBytes);
  // Widths decide who computes an element, never how.
  const int64_t multiple = kernels.product_multiple(a);
  const int64_t width = std::max<int64_t>(1, bytes / row_bytes / multiple) * multiple, tasks = (a.N + width - 1) / width;
  auto task = [&](int64_t i) { kernels.product_range(a, i * width, std::min(a.N, (i + 1) * width)); };
  if (tasks == 1)
    task(0);
  else
    parallel.for_each(tasks, task);
}

}  // namespace specmoe
