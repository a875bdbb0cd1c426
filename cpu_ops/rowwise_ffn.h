// Chosen experts whose matrices are packed row by row, [out, in], as quantised checkpoints publish them (models/packing/matrices.py).
// Plain pointers and shapes; no XLA, no Python.
#pragma once
#include <cstdint>

#include "expert_ffn.h"

namespace specmoe {

// How a matrix [rows, columns] is packed; its parts lie one behind the other.
enum class RowFormat : int {
  kFp8,    // codes e4m3 [rows, columns]; float32 scales of blocks of block_rows x group weights
  kMxfp4,  // codes e2m1, two to a byte, the even column low; a power of two (its exponent + 127) to `group` columns
  kInt4,   // codes 0 to 15 less their zero, likewise; half_scales: float16, else bfloat16, [rows, groups]; zeros, if any, two to a byte
  kNvfp4,  // codes e2m1, likewise; scales e4m3 [rows, groups], and one float32 for all
  kCount,
};

struct RowwiseArgs : FfnArgs {  // gate [F, M], up [F, M], down [M, F]; biased: float32 biases of gate, up, down behind them
  RowFormat format;
  int64_t group;       // columns that share a scale, a multiple of 32 (kNvfp4: 16)
  int64_t block_rows;  // kFp8: rows that share one
  bool half_scales, zeros, biased;
  bool clamped;        // (up + 1) * gate * sigmoid(alpha * gate), both clamped to `limit`; else a SwiGLU
  float alpha, limit;
};

constexpr int64_t kColumnUnit = 32;  // M and F are multiples of it

inline int64_t scale_groups(const RowwiseArgs& a, int64_t columns) { return (columns + a.group - 1) / a.group; }
inline int64_t code_row_bytes(const RowwiseArgs& a, int64_t columns) { return a.format == RowFormat::kFp8 ? columns : columns / 2; }

// Bytes of the codes of a matrix, and with its scales and zeros.
int64_t matrix_code_bytes(const RowwiseArgs& a, int64_t rows, int64_t columns);
int64_t matrix_bytes(const RowwiseArgs& a, int64_t rows, int64_t columns);
int64_t rowwise_expert_bytes(const RowwiseArgs& a);

void rowwise_ffn(const RowwiseArgs& args, const KernelTable& kernels, Parallel& parallel);

}  // namespace specmoe
