// All kernels for one instruction set: SPECMOE_ISA names it and the compile flags choose it. One that has only some kernels of its own takes
// the others from the table of SPECMOE_OTHERS_OF: compiled again they would be the same, in a minute.
#include <type_traits>

#include "chunked_attention.h"
#include "expert_ffn.h"
#include "few_rows_product.h"
#include "isa.h"
#include "rowwise_ffn.h"
#include "scratch.h"
#include "simd.h"

#define SPECMOE_TEXT2(x) #x
#define SPECMOE_TEXT(x) SPECMOE_TEXT2(x)

namespace specmoe {
#if defined(SPECMOE_OTHERS_OF)
namespace SPECMOE_OTHERS_OF {
const KernelTable& table();
}
#endif
namespace SPECMOE_ISA {
namespace {

#if defined(SPECMOE_OTHERS_OF)
SPECMOE_INLINE const KernelTable& others() { return SPECMOE_OTHERS_OF::table(); }
#endif

template <int N>
struct Rows {
  static constexpr int n = N;
};

#if defined(__AMX_BF16__)
#include "tiles.inc"
#endif
#include "chunked_attention_kernel.inc"
#if defined(__AMX_BF16__)
#include "expert_ffn_kernel.inc"
#include "lossless_rows.inc"
#include "tiles_kernel.inc"
#elif !defined(SPECMOE_OTHERS_OF)
#include "expert_ffn_kernel.inc"
#include "lossless_rows.inc"
#include "expert_ffn_lossless_kernel.inc"
#include "integers_kernel.inc"
#include "expert_ffn_4bit_kernel.inc"
#include "rowwise_ffn_kernel.inc"
#include "few_rows_product_kernel.inc"

double fma_peak(int64_t iterations) {
  constexpr int kChains = kLanes == 16 || kLanes == 4 ? 24 : 12;  // beyond latency x width of any core, within its registers
  vf c[kChains];
  SPECMOE_UNROLL for (int j = 0; j < kChains; ++j) c[j] = splat(static_cast<float>(j));  // unlike, or they become one
  vf a = splat(1.0f - 1e-7f), b = splat(1e-7f);
  for (int64_t i = 0; i < iterations / kChains; ++i) {
    SPECMOE_UNROLL for (int j = 0; j < kChains; ++j) c[j] = c[j] * a + b;
  }
  vf sum = {};
  SPECMOE_UNROLL for (int j = 0; j < kChains; ++j) sum += c[j];
  volatile float sink = sum_lanes(sum);
  (void)sink;
  return static_cast<double>(iterations / kChains) * kChains * kLanes * 2;
}

double read_sum(const void* data, int64_t bytes) {  // four runs side by side, as the kernels read
  constexpr int64_t kPart = 2 * kLanes * 4;
  const int64_t run = bytes / kStreams / kPart * kPart;
  const char* p = static_cast<const char*>(data);
  vi c[2 * kStreams] = {};
  for (int64_t i = 0; i < run; i += kPart) {
    SPECMOE_UNROLL for (int j = 0; j < 2 * kStreams; ++j) c[j] += load_as<vi>(p + j / 2 * run + i + j % 2 * kLanes * 4);
  }
  vi sum = {};
  SPECMOE_UNROLL for (int j = 0; j < 2 * kStreams; ++j) sum += c[j];
  return sum[0];
}

#endif

}  // namespace

const KernelTable& table() {
#if defined(SPECMOE_OTHERS_OF)
  static const KernelTable t = [] {
    KernelTable own = others();
    own.name = SPECMOE_TEXT(SPECMOE_ISA);
    own.attention_chunk = attention_chunk;
#if defined(__AMX_BF16__)
    own.ffn_way = ffn_way;
    own.ffn_hidden = ffn_hidden;
    own.ffn_output = ffn_output;
    own.ffn_partial = ffn_partial;
    own.product_multiple = product_multiple;
    own.product_row_floats = product_row_floats;
    own.product_gather = product_gather;
    own.product_range = product_range;
#endif
    return own;
  }();
#else
  static const KernelTable t = {
      SPECMOE_TEXT(SPECMOE_ISA), kLanes, attention_chunk, attention_merge, attention_finish, integers_from, ffn_way, ffn_hidden, ffn_output,
      ffn_partial, rowwise_hidden, rowwise_output, product_multiple, product_row_floats, product_gather, product_range, fma_peak, read_sum};
#endif
  return t;
}

}  // namespace SPECMOE_ISA
}  // namespace specmoe
