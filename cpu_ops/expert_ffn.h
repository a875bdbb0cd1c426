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
  float* hidden;          // pairs * padded(F)
};

// Hidden units summed in one go before they are added to y: keeps 256 x 64 weights in the L1 while all rows pass.
constexpr int64_t kHiddenBlock = 256;
// Rows of one expert up to which its products wait for memory more than for arithmetic; one register tile on every machine.
constexpr int64_t kFewRows = 4;

// The (token, choice) pairs of one slot.
struct FfnGroup {
  int64_t slot, count;
  const int32_t* pairs;  // token * A + choice
  float* hidden;         // count * padded(F): of each register tile, which starts at its first row * padded(F), [F][rows]
  float* partial;        // up to kFewRows rows: [blocks of hidden units][count][padded(M)]
};

void expert_ffn(const FfnArgs& args, const KernelTable& kernels, Parallel& parallel);

}  // namespace specmoe
