// SwiGLU of chosen experts for chosen tokens, the rows of one expert together. Plain pointers and shapes; no XLA, no Python.
#pragma once
#include <cstdint>
#include <vector>

#include "chunked_attention.h"

namespace specmoe {

struct FfnArgs {
  int64_t n, A, M, F, R;  // tokens, choices of each, model dim, hidden dim, resident slots
  DType x_type, w_type;   // x: float32 or bfloat16; weights also kI8, kI4 and kLossless
  const void* x;          // [n, M]
  const void* blocks;     // [R] experts of expert_bytes: gate, up, down transposed, each [F, M]; if packed, their scales behind
  int64_t expert_bytes;
  // [R], where each expert lies, instead of blocks; null where they are one array. An odd address: one lower, in pages of a file that
  // may have to be read.
  const void* const* table;
  const int32_t* slots;   // [n, A]; outside [0, R): no expert, zeros
  float* y;               // [n, A, M]
  const float* rows;      // [n, row_floats(a)], x as the kernels read it
  float* hidden;          // pairs * padded(F)
};

inline const char* expert_at(const FfnArgs& a, int64_t slot) {
  if (!a.table) return static_cast<const char*>(a.blocks) + slot * a.expert_bytes;
  const char* at = static_cast<const char*>(a.table[slot]);
  return at - (reinterpret_cast<uintptr_t>(at) & 1);
}

// Hidden units summed in one go before they are added to y: keeps 256 x 64 weights in the L1 while all rows pass.
constexpr int64_t kHiddenBlock = 256;
// What 32 neighbours in a row of 4-bit weights share: a bfloat16 scale. Their codes are 16 bytes, the even one of two low.
constexpr int64_t kGroup = 32;
inline int64_t groups_of(int64_t M) { return (M + kGroup - 1) / kGroup; }

// Packed experts, see models/packing. kI8: float32 scales [F] of gate, [F] of up, [M] of down. kI4: bfloat16 [3, F, groups].
// kLossless: bfloat16 of [3, F, M] in two planes: signs and mantissas, a byte each, and how far an exponent is below the largest of
// its row, half a byte each; rows of whole groups. Of the fours of a group the even ones come before the odd ones, and byte i of its
// half bytes holds weights i and i + 16 of that order: so a group falls apart into registers of AVX2 in the order of its columns.
// Then exponents that are farther: places int32 [exceptions] in ascending order, 3 F M where there are no more, and their bits uint16;
// and the largest exponents uint8 [3, F].
inline int64_t code_bytes(DType type, int64_t F, int64_t M) { return 3 * F * (type == DType::kI8 ? M : groups_of(M) * kGroup / 2); }
// A row of M weights as it is read, without what stands behind all codes of int8: how units of work are measured.
inline int64_t row_bytes(DType type, int64_t M) {
  if (type == DType::kI4) return groups_of(M) * (kGroup / 2 + 2);
  if (type == DType::kLossless) return groups_of(M) * (kGroup + kGroup / 2);
  return M * (type == DType::kF32 ? 4 : type == DType::kBF16 ? 2 : 1);
}
inline int64_t exceptions(int64_t F, int64_t M) { return 64 + 3 * F * M / 512; }
inline int64_t packed_expert_bytes(DType type, int64_t F, int64_t M) {
  if (type == DType::kLossless) return 3 * F * row_bytes(type, M) + 6 * exceptions(F, M) + 3 * F;
  return code_bytes(type, F, M) + (type == DType::kI8 ? (2 * F + M) * 4 : 3 * F * groups_of(M) * 2);
}

// Floats of a row of partial sums, and of a row of x. 4-bit weights have whole registers of codes on every instruction set; of their
// columns, every eighth of a register's stand side by side, and x is in integers (IntegerRow).
inline int64_t whole_columns(int64_t M) { return (M + 127) / 128 * 128; }
inline int64_t integer_floats(int64_t M) { return whole_columns(M) / 4 * 3; }
inline int64_t sum_floats(const FfnArgs& a) { return a.w_type == DType::kI4 ? whole_columns(a.M) : padded(a.M); }
inline int64_t row_floats(const FfnArgs& a) { return a.w_type == DType::kI4 ? integer_floats(a.M) : padded(a.M); }

// Hidden units of one partial sum. 4-bit experts keep the partial sums of all rows: at most eight, or they would fill the memory,
// unless the integers that are summed would overflow.
inline int64_t hidden_block(const FfnArgs& a) {
  constexpr int64_t kLeast = 2 * kHiddenBlock, kLargest = 4096;  // times 15 times 32767 < 2^31
  if (a.w_type != DType::kI4) return kHiddenBlock;
  const int64_t eighth = (a.F + 7) / 8, most = eighth < kLargest ? eighth : kLargest;
  return most > kLeast ? most : kLeast;
}

// Rows of one expert up to which its products wait for memory more than for arithmetic; one register tile on every machine.
constexpr int64_t kFewRows = 4;

// How a kernel goes about a call.
struct FfnWay {
  int64_t few_rows;  // up to so many rows of an expert ffn_partial is called, beyond them ffn_output
  bool reads_x;      // ffn_hidden takes rows from x and lays them out in each task, instead of FfnArgs::rows
};

// The (token, choice) pairs of one slot.
struct FfnGroup {
  int64_t slot, count;
  const int32_t* pairs;  // token * A + choice
  // count * padded(F): of each register tile, which starts at its first row * padded(F), [F][rows]; of tiles of AMX two planes (HiddenPlanes)
  float* hidden;
  float* partial;        // up to FfnWay::few_rows: [blocks of hidden units][count][padded(M)]
};

// The pairs of a call by slot. A thread keeps one from call to call, so that in a steady state nothing is allocated.
struct Grouping {
  std::vector<int32_t> pairs, start;
  std::vector<FfnGroup> groups;
};
// A stable counting sort; pairs without an expert get zeros.
void group_by_slot(const FfnArgs& a, Grouping& to);
// Asks the system for the pages of those experts that may have to be read: all together, where each would else be waited for.
// bytes: of an expert.
void ask_for_pages(const FfnArgs& a, const Grouping& groups, int64_t bytes);
// x as float, rows of `ld` floats with zeros behind.
void float_rows(const FfnArgs& a, int64_t ld, float* rows);

void expert_ffn(const FfnArgs& args, const KernelTable& kernels, Parallel& parallel);

}  // namespace specmoe
