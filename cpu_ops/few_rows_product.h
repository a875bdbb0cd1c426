// y = x W^T for few rows of x and some W, where reading them is what takes the time. Plain pointers and shapes; no XLA, no Python.
#pragma once
#include <cstdint>

#include "chunked_attention.h"

namespace specmoe {

struct ProductArgs {
  int64_t n, M, N;       // rows, columns of W, rows of W
  DType x_type, w_type;  // float32 or bfloat16; weights also kI8 and kI4
  const void* x;         // [n, M]
  const void* w;         // [N, M]; kI4: [N, bytes of whole groups], the even one of two codes low, code c stands for c - 8
  const void* scales;    // of W: kI8 float32 [N], kI4 bfloat16 [N, groups]
  float* y;              // [n, N]
  const float* rows;     // x as the kernel reads it, of which it says how many floats a row has
};

// `count` products of the same x with matrices of one type; sets their `rows`.
void few_rows_products(ProductArgs* products, int64_t count, const KernelTable& kernels, Parallel& parallel);

}  // namespace specmoe
