// SwiGLU of chosen experts for chosen tokens, the rows of one expert together. Plain pointers and shapes; no XLA, no Python.
#pragma once
#include <cstdint>

#include "chunked_attention.h"

namespace specmoe {

struct FfnArgs {
  int64_t n, A, M, F, R;  // tokens, choices of each, model dim, hidden dim, resident slots
  DType x_type, w_type;   // float32 or bfloat16
  const void* x;          // [n, M]
  const void* blocks;     // [R, 3, F, M]: gate, up, down transposed
  const int32_t* slots;   // [n, A]; outside [0, R): no expert, zeros
  float* y;               // [n, A, M]
  const float* rows;      // [n, padded(M)], x as float
  float* hidden;          // [pairs, padded(F)]
};

// The (token, choice) pairs of one slot.
struct FfnGroup {
  int64_t slot, count;
  const int32_t* pairs;  // token * A + choice
  float* hidden;         // [count, padded(F)]
};

void expert_ffn(const FfnArgs& args, const KernelTable& kernels, Parallel& parallel);

}  // namespace specmoe
