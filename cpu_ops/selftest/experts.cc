#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "../expert_ffn.h"
#include "../rowwise_ffn.h"
#include "selftest.h"

namespace specmoe {
namespace {

// Of float32 rows; their weights are still to be named.
FfnArgs ffn_args(int64_t n, int64_t A, int64_t M, int64_t F, int64_t R, const float* x = nullptr, const int32_t* slots = nullptr,
                 float* y = nullptr) {
  FfnArgs a{};
  a.n = n;
  a.A = A;
  a.M = M;
  a.F = F;
  a.R = R;
  a.x_type = DType::kF32;
  a.x = x;
  a.slots = slots;
  a.y = y;
  return a;
}

double ffn(const KernelTable& kernels, int64_t n, int64_t M, int64_t F, bool bf16, int threads) {
  const int64_t R = 3, A = 2;
  Exact<float> x(n * M), w(bf16 ? 0 : R * 3 * F * M), y(n * A * M);
  Exact<uint16_t> h(bf16 ? R * 3 * F * M : 0);
  Exact<int32_t> slots(n * A);
  for (auto* p : {&x, &w}) {
    for (int64_t i = 0; i < p->size; ++i) (*p)[i] = draw();
  }
  for (int64_t i = 0; i < h.size; ++i) h[i] = 0x3f80;
  for (int64_t i = 0; i < n * A; ++i) slots[i] = static_cast<int32_t>(i % 4) - 1;
  FfnArgs a = ffn_args(n, A, M, F, R, x.data, slots.data, y.data);
  a.w_type = bf16 ? DType::kBF16 : DType::kF32;
  a.expert_bytes = 3 * F * M * (bf16 ? 2 : 4);
  a.blocks = bf16 ? static_cast<void*>(h.data) : w.data;
  HelpedParallel parallel(threads);
  expert_ffn(a, kernels, parallel);
  for (int64_t i = 0; i < y.size; ++i) {
    if (!std::isfinite(y[i])) return INFINITY;
  }
  Exact<float> again(n * A * M);  // by the addresses of the experts
  const void* table[R];
  for (int64_t r = 0; r < R; ++r) table[r] = static_cast<const char*>(a.blocks) + r * a.expert_bytes;
  a.blocks = nullptr;
  a.table = table;
  a.y = again.data;
  expert_ffn(a, kernels, parallel);
  for (int64_t i = 0; i < y.size; ++i) {
    if (y[i] != again[i]) return INFINITY;
  }
  return 0;
}

// Random rows through experts whose weights are all `weight`, so that every output is the same number for its row. Fills in x, y and
// one slot a row, calls `compute`, and gives the largest difference, relative beyond 1.
template <typename Compute>
double worst_of_alike(FfnArgs& a, double weight, const Compute& compute) {
  Exact<float> x(a.n * a.M), y(a.n * a.M);
  Exact<int32_t> slots(a.n);
  for (int64_t i = 0; i < x.size; ++i) x[i] = draw();
  for (int64_t i = 0; i < a.n; ++i) slots[i] = static_cast<int32_t>(i % a.R);
  a.A = 1;
  a.x_type = DType::kF32;
  a.x = x.data;
  a.slots = slots.data;
  a.y = y.data;
  compute();
  double worst = 0;
  for (int64_t i = 0; i < a.n; ++i) {
    double sum = 0;
    for (int64_t m = 0; m < a.M; ++m) sum += static_cast<double>(x[i * a.M + m]);
    const double gate = sum * weight, want = gate / (1 + std::exp(-gate)) * gate * weight * static_cast<double>(a.F);
    for (int64_t m = 0; m < a.M; ++m) worst = std::fmax(worst, std::fabs(y[i * a.M + m] - want) / (1 + std::fabs(want)));
  }
  return worst;
}

// Experts whose codes are all the same.
double packed_ffn(const KernelTable& kernels, int64_t n, int64_t M, int64_t F, DType type, int threads) {
  const int64_t R = 2, bytes = packed_expert_bytes(type, F, M), codes = code_bytes(type, F, M);
  const float code = 3, scale = 0.25f / static_cast<float>(M);  // exact in bfloat16 where M is a power of two
  Exact<uint8_t> blocks(R * bytes);
  for (int64_t r = 0; r < R; ++r) {
    uint8_t* expert = blocks.data + r * bytes;
    std::memset(expert, type == DType::kI8 ? 3 : 0xbb, codes);
    for (int64_t i = codes; i < bytes; i += type == DType::kI8 ? 4 : 2) {
      uint32_t bits;
      std::memcpy(&bits, &scale, 4);
      bits >>= type == DType::kI8 ? 0 : 16;
      std::memcpy(expert + i, &bits, type == DType::kI8 ? 4 : 2);
    }
  }
  FfnArgs a = ffn_args(n, 1, M, F, R);
  a.w_type = type;
  a.expert_bytes = bytes;
  a.blocks = blocks.data;
  return worst_of_alike(a, static_cast<double>(code) * static_cast<double>(scale), [&] {
    HelpedParallel parallel(threads);
    expert_ffn(a, kernels, parallel);
  });
}

// bfloat16 experts in 12 bits: to the bits of the kernel of bfloat16, with weights of every size and some zeros, in one array and by
// addresses, odd ones too.
double lossless_ffn(const KernelTable& kernels, int64_t n, int64_t M, int64_t F, DType x_type, int threads) {
  const int64_t R = 2, A = 2, rows = 3 * F, size = rows * M, ld = groups_of(M) * kGroup;
  const int64_t room = exceptions(F, M), bytes = packed_expert_bytes(DType::kLossless, F, M);
  Exact<float> x(n * M), y(n * A * M), again(n * A * M);
  Exact<int32_t> slots(n * A);
  Exact<uint16_t> plain(R * size);
  Exact<uint8_t> packed(R * bytes, 2), apart(bytes, 2);
  for (int64_t i = 0; i < x.size; ++i) x[i] = draw();
  for (int64_t i = 0; i < slots.size; ++i) slots[i] = static_cast<int32_t>(i % (R + 1)) - 1;
  std::memset(packed.data, 0, packed.size);
  for (int64_t r = 0; r < R; ++r) {
    uint8_t *kept = packed.data + r * bytes, *halves = kept + rows * ld, *places = halves + rows * ld / 2, *values = places + 4 * room;
    int64_t used = 0;
    for (int64_t row = 0; row < rows; ++row) {
      uint16_t* w = plain.data + r * size + row * M;
      int largest = 15;
      for (int64_t m = 0; m < M; ++m) {
        w[m] = bfloat16_bits(draw() * ((row * M + m) % 2003 == 5 ? 1e-9f : 0.1f));
        if ((row * M + m) % 3001 == 3) w[m] = 0;
        largest = std::max(largest, w[m] >> 7 & 255);
      }
      values[2 * room + row] = static_cast<uint8_t>(largest);
      for (int64_t m = 0; m < M; ++m) {
        const int below = largest - (w[m] >> 7 & 255), place = static_cast<int>(row * M + m);
        const int64_t group = row * ld + m / 32 * 32, four = m % 32 / 4, at = 4 * (four % 2 * 4 + four / 2) + m % 4;
        kept[group + at] = static_cast<uint8_t>((w[m] >> 8 & 128) | (w[m] & 127));
        halves[group / 2 + at % 16] |= static_cast<uint8_t>(std::min(below, 15) << at / 16 * 4);
        if (below <= 15) continue;
        if (used == room) return INFINITY;
        std::memcpy(places + 4 * used, &place, 4);
        std::memcpy(values + 2 * used++, &w[m], 2);
      }
    }
    const int none = static_cast<int>(size);
    for (; used < room; ++used) std::memcpy(places + 4 * used, &none, 4);
  }
  FfnArgs a = ffn_args(n, A, M, F, R, x.data, slots.data, y.data);
  Exact<uint16_t> half(n * M);
  for (int64_t i = 0; i < half.size; ++i) half[i] = bfloat16_bits(x[i]);
  if (x_type == DType::kBF16) a.x = half.data;
  a.x_type = x_type;
  HelpedParallel parallel(threads);
  a.w_type = DType::kBF16;
  a.expert_bytes = 2 * size;
  a.blocks = plain.data;
  expert_ffn(a, kernels, parallel);
  a.w_type = DType::kLossless;
  a.expert_bytes = bytes;
  a.blocks = packed.data;
  a.y = again.data;
  const auto differs = [&] {
    std::memset(again.data, 255, again.size * sizeof(float));
    expert_ffn(a, kernels, parallel);
    return std::memcmp(y.data, again.data, y.size * sizeof(float)) != 0;
  };
  if (differs()) return INFINITY;
  std::memcpy(apart.data, packed.data + bytes, bytes);
  const void* table[R] = {packed.data, apart.data + 1};  // the second in pages that may be away
  a.table = table;
  return differs() ? INFINITY : 0;
}

// Rows and one expert in bfloat16 against sums in double: the largest difference, relative beyond 1. Infinite where a row by itself has other
// bits.
double bfloat16_ffn(const KernelTable& kernels, int64_t n, int64_t M, int64_t F, int threads) {
  Exact<uint16_t> x(n * M), w(3 * F * M);
  Exact<float> y(n * M), alone(M);
  Exact<int32_t> slots(n);
  for (int64_t i = 0; i < x.size; ++i) x[i] = bfloat16_bits(draw());
  for (int64_t i = 0; i < w.size; ++i) w[i] = bfloat16_bits(draw() / std::sqrt(static_cast<float>(i < 2 * F * M ? M : F)));
  std::memset(slots.data, 0, n * sizeof(int32_t));
  FfnArgs a = ffn_args(n, 1, M, F, 1, nullptr, slots.data, y.data);
  a.x = x.data;
  a.x_type = a.w_type = DType::kBF16;
  a.expert_bytes = 3 * F * M * 2;
  a.blocks = w.data;
  HelpedParallel parallel(threads);
  expert_ffn(a, kernels, parallel);
  double worst = 0;
  std::vector<double> hidden(F);
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t f = 0; f < F; ++f) {
      double gate = 0, up = 0;
      for (int64_t m = 0; m < M; ++m) {
        gate += of_bfloat16(x[r * M + m]) * of_bfloat16(w[f * M + m]);
        up += of_bfloat16(x[r * M + m]) * of_bfloat16(w[(F + f) * M + m]);
      }
      hidden[f] = gate / (1 + std::exp(-gate)) * up;
    }
    for (int64_t m = 0; m < M; ++m) {
      double want = 0;
      for (int64_t f = 0; f < F; ++f) want += hidden[f] * of_bfloat16(w[(2 * F + f) * M + m]);
      worst = std::fmax(worst, std::fabs(y[r * M + m] - want) / (1 + std::fabs(want)));
    }
    a.n = 1;
    a.x = x.data + r * M;
    a.y = alone.data;
    expert_ffn(a, kernels, parallel);
    if (std::memcmp(alone.data, y.data + r * M, M * sizeof(float)) != 0) return INFINITY;
  }
  return worst;
}

// One matrix of a format whose every weight is 3 times the scale, a power of two.
void fill_matrix(const RowwiseArgs& a, int64_t rows, int64_t columns, float scale, uint8_t* to) {
  const uint8_t codes[] = {0x44, 0x55, 0xbb, 0x55};
  const int64_t code_bytes = matrix_code_bytes(a, rows, columns), bytes = matrix_bytes(a, rows, columns);
  std::memset(to, codes[static_cast<int>(a.format)], code_bytes);
  uint32_t bits;
  std::memcpy(&bits, &scale, 4);
  const uint16_t half = static_cast<uint16_t>(bits >> 16);
  if (a.format == RowFormat::kMxfp4) std::memset(to + code_bytes, static_cast<int>(bits >> 23), bytes - code_bytes);
  if (a.format == RowFormat::kNvfp4) std::memset(to + code_bytes, 0x38, bytes - code_bytes - 4);
  for (int64_t i = code_bytes; a.format == RowFormat::kInt4 && i < bytes; i += 2) std::memcpy(to + i, &half, 2);
  for (int64_t i = a.format == RowFormat::kNvfp4 ? bytes - 4 : code_bytes; i < bytes; i += 4) {
    if (a.format == RowFormat::kFp8 || a.format == RowFormat::kNvfp4) std::memcpy(to + i, &scale, 4);
  }
}

// As packed_ffn, of matrices that are packed row by row.
double rowwise(const KernelTable& kernels, int64_t n, int64_t M, int64_t F, RowFormat format, bool biased, int threads) {
  const int64_t R = 2;
  const float code = 3, scale = 0.25f / static_cast<float>(M);
  RowwiseArgs a{};
  a.n = n;
  a.M = M;
  a.F = F;
  a.R = R;
  a.format = format;
  a.group = format == RowFormat::kNvfp4 ? 16 : 32;
  a.block_rows = 24;
  a.biased = biased;
  a.expert_bytes = rowwise_expert_bytes(a);
  Exact<uint8_t> blocks(R * a.expert_bytes, 2);
  std::memset(blocks.data, 0, R * a.expert_bytes);  // biases of 0
  for (int64_t r = 0; r < R; ++r) {
    uint8_t* expert = blocks.data + r * a.expert_bytes;
    const int64_t inner = matrix_bytes(a, F, M);
    fill_matrix(a, F, M, scale, expert);
    fill_matrix(a, F, M, scale, expert + inner);
    fill_matrix(a, M, F, scale, expert + 2 * inner);
  }
  a.blocks = blocks.data;
  const void* table[R];
  for (int64_t r = 0; r < R; ++r) table[r] = blocks.data + r * a.expert_bytes;
  const auto worst = [&] {
    return worst_of_alike(a, static_cast<double>(code) * static_cast<double>(scale), [&] {
      HelpedParallel parallel(threads);
      rowwise_ffn(a, kernels, parallel);
    });
  };
  const double in_one_array = worst();
  a.blocks = nullptr;  // by the addresses of the experts
  a.table = table;
  return std::max(in_one_array, worst());
}

}  // namespace

int expert_failures() {
  int failures = 0;
  for (const auto& isa : isa_names()) {
    const KernelTable& kernels = *isa_table(isa);
    for (int64_t n : {1, 2, 9, 40}) {
      for (bool bf16 : {false, true}) failures += ffn(kernels, n, 3 + 16 * n, 5 + 8 * n, bf16, n % 2 + 1) != 0;
    }
    for (int64_t n : {1, 3, 5, 30}) {
      for (DType type : {DType::kI8, DType::kI4}) {
        const double most = type == DType::kI4 ? 4e-4 : 1e-4;  // the integers of 16 bits of a sum that is near zero
        for (int64_t M : {1, 8, 64, 256}) failures += !(packed_ffn(kernels, n, M, 5 + 80 * n, type, n % 2 + 1) <= most);
      }
      for (int64_t M : {1, 13, 64, 300, 1100}) {
        for (DType x : {DType::kF32, DType::kBF16}) failures += lossless_ffn(kernels, n, M, 5 + 11 * n, x, n % 2 + 1) != 0;
        for (int64_t rows : {n, 2 * n + 13}) failures += !(bfloat16_ffn(kernels, rows, M, 5 + 16 * n, n % 2 + 1) <= 2e-5);
      }
      for (int format = 0; format < static_cast<int>(RowFormat::kCount); ++format) {
        for (int64_t M : {32, 128}) failures += !(rowwise(kernels, n, M, 32 * (1 + n % 3), RowFormat(format), M == 32, n % 2 + 1) <= 1e-4);
      }
    }
  }
  return failures;
}

}  // namespace specmoe
