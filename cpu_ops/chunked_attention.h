// Attention of T new tokens of each request to its long cache (SpecMoEOff 5.1). Plain pointers and shapes; no XLA, no Python.
#pragma once
#include <cstdint>

#include "isa.h"
#include "parallel.h"

namespace specmoe {

enum class DType { kF32, kBF16, kI8, kI4, kLossless };

// Tokens whose scores are held at once. 64 x 128 floats of K are 32 KiB, which the L1 of the machines in mind (32 to 48 KiB) just
// holds while all query rows pass over it; one row's mask over the tile is one 64-bit word.
constexpr int64_t kTile = 64;
// Tokens per K block: one AVX-512 register of 32-bit units. Part of the packed format, so the same for every instruction set.
constexpr int64_t kBlock = 16;
// Tokens whose contribution is summed on its own and then merged in order. Boundaries depend on the position alone, so a sequence
// gives the same bits whether one thread walks over it or many share it. Merging costs 1 / (2 kChunk) of the arithmetic.
constexpr int64_t kChunk = 1024;
constexpr int64_t kMaxNew = 64;  // new tokens of one call: one mask word

struct AttentionArgs {
  int64_t B, T, H, K, D;  // alphabet of types.py
  int64_t S;              // tokens per cache row, or per page when there is a table
  int64_t rows;           // cache rows: B, or the number of pages
  int64_t pages;          // table entries per request; 0: no table, request b owns cache row b
  DType q_type, new_type, out_type, cache_type;
  bool packed;  // K as [S/16][D/u][16][u], u = 4 bytes' worth of elements; else [S][D]. V always [S][D].
  const void *q, *k_new, *v_new;
  const int32_t *lengths, *num_new;
  const uint8_t* mask;  // [T, T] or [B, T, T]; nullptr: causal
  bool mask_per_request;
  const int32_t* table;  // [B, pages]
  void *k_cache, *v_cache;
  float *k_scale, *v_scale;  // [rows, K, S] for int8
  void* out;
  float scale, softcap;  // softcap 0: none
  int64_t window;        // 0: none
};

struct AttentionRequest {
  int64_t b, length, total, num_new;  // total: positions that exist after the append
  int64_t low_min;                    // no row attends below this position
  int64_t low_max;                    // every row attends the prefix from here on
  int64_t low[kMaxNew];               // first prefix position that row t attends
  uint64_t allow[kMaxNew];            // bit c: row t attends new token c
};

// Accumulator rows are padded to whole AVX-512 registers.
inline int64_t padded(int64_t n) { return (n + kBlock - 1) / kBlock * kBlock; }

// Running softmax of `rows` query rows: exponentials relative to max[r] (base 2).
struct AttentionState {
  float* max;  // [rows]
  float* sum;  // [rows][16], one partial sum per lane
  float* acc;  // [rows][padded(D)]
  static int64_t floats(int64_t rows, int64_t D) { return padded(rows) + rows * (kBlock + padded(D)); }
  static AttentionState at(float* p, int64_t rows, int64_t D) { return {p + rows * (kBlock + padded(D)), p + rows * padded(D), p}; }
};

void chunked_attention(const AttentionArgs& args, const KernelTable& kernels, Parallel& parallel);

}  // namespace specmoe
