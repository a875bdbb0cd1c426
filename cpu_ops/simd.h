// Fixed-width vectors on GCC/Clang vector_size types: one template source, one translation unit per instruction set.
// Everything is in an unnamed namespace and nothing of the C++ library is used, so no function compiled for one instruction set can
// be merged by the linker with its twin of another.
#pragma once
#include <cstdint>

#include "isa.h"
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace specmoe {
namespace {

// Lanes of one register (a vector type wider than the instruction set falls to 3 % of peak), rows of a register tile, and registers
// of columns beside so many rows: at most 24 of 32 or 12 of 16 registers are accumulators, the rest operands.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kMaxRows = 12;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kMaxRows = 6;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kMaxRows = 12;
#else
constexpr int kLanes = 4, kMaxRows = 6;
#endif
// Few rows need more columns to cover the latency of the fused multiply-add (4 cycles x 2 a cycle = 8 accumulators); many rows
// pay better for converting a column to float.
constexpr int vectors_for(int rows) { return kMaxRows == 12 && rows <= 6 ? 4 : 2; }

typedef float vf __attribute__((vector_size(kLanes * 4)));
typedef int32_t vi __attribute__((vector_size(kLanes * 4)));
typedef uint32_t vu __attribute__((vector_size(kLanes * 4)));
typedef uint16_t vh __attribute__((vector_size(kLanes * 2)));
typedef int8_t vb __attribute__((vector_size(kLanes)));

#define SPECMOE_INLINE inline __attribute__((always_inline))
// Loops over registers must vanish, or the registers become memory: GCC peels at most 16 turns of its own accord.
#define SPECMOE_UNROLL _Pragma("GCC unroll 32")
// Into the L2: the tile in work fills the L1, and 1.2x slower at one new token when the next one is sent there too.
#define SPECMOE_PREFETCH(p) __builtin_prefetch(p, 0, 2)

template <typename V>
SPECMOE_INLINE V load_as(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
SPECMOE_INLINE vf load(const float* p) { return load_as<vf>(p); }
SPECMOE_INLINE void store(float* p, vf v) { __builtin_memcpy(p, &v, sizeof v); }
SPECMOE_INLINE vf splat(float x) { return x - vf{}; }
SPECMOE_INLINE vf vmax(vf a, vf b) {  // b where one is NaN
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

// kLanes values at p of the storage type, as float; load_pair: 2 * kLanes values in whatever order is cheapest.
struct F32 {
  typedef float type;
  static constexpr bool kSplitPair = false;
  static SPECMOE_INLINE vf load(const float* p) { return load_as<vf>(p); }
  static SPECMOE_INLINE void load_pair(const float* p, vf& a, vf& b) {
    a = load(p);
    b = load(p + kLanes);
  }
};
struct BF16 {
  typedef uint16_t type;
  static constexpr bool kSplitPair = true;  // a: the even columns, b: the odd ones; one instruction each instead of two
  static SPECMOE_INLINE vf load(const uint16_t* p) {  // GCC's own conversion takes four instructions for the first of two
#if defined(__AVX512F__)
    return (vf)((vu)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))) << 16);
#elif defined(__AVX2__)
    return (vf)((vu)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))) << 16);
#else
    return (vf)(__builtin_convertvector(load_as<vh>(p), vu) << 16);
#endif
  }
  static SPECMOE_INLINE void load_pair(const uint16_t* p, vf& a, vf& b) {
    const vu raw = load_as<vu>(p);
    a = (vf)(raw << 16);
    b = (vf)(raw & 0xffff0000u);
  }
};
struct I8 {
  typedef int8_t type;
  static constexpr bool kSplitPair = false;
  static SPECMOE_INLINE vf load(const int8_t* p) {  // GCC's own conversion of 16 bytes is four times slower
#if defined(__AVX512F__)
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
    return __builtin_convertvector(__builtin_convertvector(load_as<vb>(p), vi), vf);
#endif
  }
  static SPECMOE_INLINE void load_pair(const int8_t* p, vf& a, vf& b) {
    a = load(p);
    b = load(p + kLanes);
  }
};
// bfloat16 K against bfloat16 queries, two products an instruction; V as BF16. Not on Intel's cores, which have AMX too: there attention takes
// 0.9 and 0.8 of the time (4 and 8 new tokens) if K is converted, and other products meet in tiles.
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
#define SPECMOE_BF16_PAIRS 1
#else
#define SPECMOE_BF16_PAIRS 0
#endif
struct BF16Dot : BF16 {};

SPECMOE_INLINE float bf16_to_float(uint16_t h) {
  const uint32_t u = static_cast<uint32_t>(h) << 16;
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}
SPECMOE_INLINE uint16_t float_to_bf16(float f) {  // to nearest even; NaN stays NaN
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  if (f != f) return static_cast<uint16_t>((u >> 16) | 0x40);
  return static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

// Lane i of the result is lane index[i] of a followed by b.
SPECMOE_INLINE vf shuffle(vf a, vf b, vi index) {
#if defined(__clang__)
  vf r;
  for (int i = 0; i < kLanes; ++i) r[i] = index[i] < kLanes ? a[index[i]] : b[index[i] - kLanes];
  return r;
#else
  return __builtin_shuffle(a, b, index);
#endif
}

// lane i of the result is lane i ^ h: one step of a butterfly, so that every lane ends with the same value in a fixed order.
template <int h>
SPECMOE_INLINE vf swap_lanes(vf v) {
  vi index;
  for (int i = 0; i < kLanes; ++i) index[i] = i ^ h;
  return shuffle(v, v, index);
}
SPECMOE_INLINE vf all_max(vf v) {
  if constexpr (kLanes >= 16) v = vmax(v, swap_lanes<8>(v));
  if constexpr (kLanes >= 8) v = vmax(v, swap_lanes<4>(v));
  v = vmax(v, swap_lanes<2>(v));
  return vmax(v, swap_lanes<1>(v));
}
SPECMOE_INLINE float sum_lanes(vf v) {
  if constexpr (kLanes >= 16) v = v + swap_lanes<8>(v);
  if constexpr (kLanes >= 8) v = v + swap_lanes<4>(v);
  v = v + swap_lanes<2>(v);
  v = v + swap_lanes<1>(v);
  return v[0];
}

// The lanes of a and b in halves of `half` lanes, one after the other: first halves of both plus second halves of both.
template <int half>
SPECMOE_INLINE vf add_halves(vf a, vf b) {
  vi first, second;
  SPECMOE_UNROLL for (int i = 0; i < kLanes; ++i) {
    const int j = i / half * 2 * half + i % half;  // of a followed by b
    first[i] = j;
    second[i] = j + half;
  }
  return shuffle(a, b, first) + shuffle(a, b, second);
}

// sum_lanes of four vectors at once, in two fifths of the instructions and with the same bits.
SPECMOE_INLINE void sum_lanes_of_four(const vf (&v)[4], float* to) {
  constexpr int kQuarter = kLanes / 4;
  vf s = add_halves<kQuarter>(add_halves<2 * kQuarter>(v[0], v[1]), add_halves<2 * kQuarter>(v[2], v[3]));
  if constexpr (kQuarter >= 4) s = s + swap_lanes<2>(s);
  if constexpr (kQuarter >= 2) s = s + swap_lanes<1>(s);
  SPECMOE_UNROLL for (int i = 0; i < 4; ++i) to[i] = s[i * kQuarter];
}

// 2^x for x <= 0 (also right up to 127); 0 below -126, where the result would be subnormal. Degree 6 minimax of 2^f on
// [-1/2, 1/2]: relative error 1.2e-8 before rounding.
SPECMOE_INLINE vf exp2_lanes(vf x) {
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vf low = splat(-126.0f);
  const vf y = x < low ? low : x;  // NaN stays NaN
  const vf shifted = y + magic;
  const vf f = y - (shifted - magic);
  vf p = splat(1.5403530393381609954e-4f);
  p = p * f + 1.3333558146428443423e-3f;
  p = p * f + 9.6181291076284771619e-3f;
  p = p * f + 5.5504108664821579953e-2f;
  p = p * f + 2.4022650695910071233e-1f;
  p = p * f + 6.9314718055994530942e-1f;
  p = p * f + 1.0f;
  const vi n = ((vi)shifted - (vi)magic) << 23;
  const vf r = (vf)((vi)p + n);
  return x < low ? vf{} : r;
}

}  // namespace
}  // namespace specmoe
