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

void few_rows_products(ProductArgs* products, int64_t count, const KernelTable& kernels, Parallel& parallel) {
  const ProductArgs& first = products[0];
  const int64_t row = row_bytes(first.w_type, first.M), multiple = kernels.product_multiple(first);
  float* rows = thread_scratch(Scratch::kProductRows, first.n * kernels.product_row_floats(first));
  kernels.product_gather(first, rows);
  int64_t rows_of_w = 0;
  for (int64_t i = 0; i < count; ++i) {
    products[i].rows = rows;
    rows_of_w += products[i].N;
  }
  const int64_t share = row * rows_of_w / (8 * parallel.threads());
  const int64_t least = kTaskBytes / std::clamp<int64_t>(first.n / 4, 1, kMostShares);
  const int64_t bytes = std::clamp(share, least, kFewTaskBytes);
  // Widths decide who computes an element, never how.
  const int64_t width = std::max<int64_t>(1, bytes / row / multiple) * multiple;
  const auto tasks_of = [width](const ProductArgs& a) { return (a.N + width - 1) / width; };
  int64_t tasks = 0;
  for (int64_t i = 0; i < count; ++i) tasks += tasks_of(products[i]);
  auto task = [&](int64_t i) {
    const ProductArgs* a = products;
    for (; i >= tasks_of(*a); ++a) i -= tasks_of(*a);
    kernels.product_range(*a, i * width, std::min(a->N, (i + 1) * width));
  };
  if (tasks == 1)
    task(0);
  else
    parallel.for_each(tasks, task);
}

}  // namespace specmoe
