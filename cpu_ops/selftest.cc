// Small odd shapes on exactly sized, misaligned heap buffers, on every instruction set of the machine:
//   cmake -S cpu_ops -B build/sanitize -DSPECMOE_SANITIZE=ON && cmake --build build/sanitize && ctest --test-dir build/sanitize
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <random>
#include <thread>
#include <vector>

#include "chunked_attention.h"
#include "expert_ffn.h"
#include "few_rows_product.h"
#include "rowwise_ffn.h"
#include "scratch.h"

namespace specmoe {
namespace {

struct Threads final : Parallel {
  int count;
  explicit Threads(int n) : count(n) {}
  int threads() const override { return count; }
  void run(int64_t n, void (*fn)(void*, int64_t), void* ctx) override {
    std::atomic<int64_t> next{0};
    const auto loop = [&] {
      for (int64_t i; (i = next.fetch_add(1)) < n;) fn(ctx, i);
    };
    std::vector<std::thread> helpers;
    for (int i = 1; i < count; ++i) helpers.emplace_back(loop);
    loop();
    for (auto& t : helpers) t.join();
  }
};

// n items that start `item` bytes behind a 64-byte boundary and end where the allocation ends.
template <typename T>
struct Exact {
  std::unique_ptr<char[]> raw;
  T* data;
  int64_t size;
  explicit Exact(int64_t n, int64_t item = sizeof(T)) : raw(new char[n * sizeof(T) + 64 + item]), size(n) {
    data = reinterpret_cast<T*>(raw.get() + 64 + item);
  }
  T& operator[](int64_t i) { return data[i]; }
};

std::mt19937 rng(1);
float draw() { return std::normal_distribution<float>()(rng); }

struct Shape {
  int64_t B, T, H, K, D, S;
  int threads;
};

// Float32 rows against doubles; the other layouts and types only have to stay in bounds and finite.
double attention(const KernelTable& kernels, const Shape& s, DType type, bool packed) {
  const int64_t item = type == DType::kF32 ? 4 : type == DType::kBF16 ? 2 : 1;
  const int64_t S = packed ? padded(s.S) : s.S, cache = s.B * s.K * S * s.D;
  Exact<float> q(s.B * s.T * s.H * s.D), k_new(s.B * s.T * s.K * s.D), v_new(k_new.size), out(q.size);
  Exact<char> k(cache * item, item), v(cache * item, item);
  Exact<float> k_scale(item == 1 ? s.B * s.K * S : 0), v_scale(k_scale.size);
  Exact<int32_t> lengths(s.B), num_new(s.B);
  for (auto* x : {&q, &k_new, &v_new}) {
    for (int64_t i = 0; i < x->size; ++i) (*x)[i] = draw();
  }
  for (auto* x : {&k, &v}) {
    std::memset(x->data, 0, x->size);
    for (int64_t i = 0; item == 4 && i < cache; ++i) {
      const float f = draw();
      std::memcpy(x->data + 4 * i, &f, 4);
    }
  }
  for (int64_t i = 0; i < k_scale.size; ++i) k_scale[i] = v_scale[i] = 0.01f;
  for (int64_t b = 0; b < s.B; ++b) {
    lengths[b] = b == 0 ? s.S - s.T : b % (s.S - s.T + 1);
    num_new[b] = s.T;
  }
  AttentionArgs a{};
  a.B = s.B;
  a.T = s.T;
  a.H = s.H;
  a.K = s.K;
  a.D = s.D;
  a.S = S;
  a.rows = s.B;
  a.q_type = a.new_type = a.out_type = DType::kF32;
  a.cache_type = type;
  a.packed = packed;
  a.q = q.data;
  a.k_new = k_new.data;
  a.v_new = v_new.data;
  a.lengths = lengths.data;
  a.num_new = num_new.data;
  a.k_cache = k.data;
  a.v_cache = v.data;
  a.k_scale = k_scale.data;
  a.v_scale = v_scale.data;
  a.out = out.data;
  a.scale = 1 / std::sqrt(static_cast<float>(s.D));
  Threads parallel(s.threads);
  chunked_attention(a, kernels, parallel);
  double worst = 0;
  for (int64_t i = 0; i < out.size; ++i) worst = std::isfinite(out[i]) ? worst : INFINITY;
  if (type != DType::kF32 || packed) return worst;
  const float *kf = reinterpret_cast<float*>(k.data), *vf = reinterpret_cast<float*>(v.data);
  for (int64_t i = 0; i < s.B * s.T * s.H; ++i) {
    const int64_t b = i / s.H / s.T, t = i / s.H % s.T, head = (b * s.K + i % s.H / (s.H / s.K)) * S;
    std::vector<double> sum(s.D, 0.0);
    double total = 0;
    for (int64_t p = 0; p <= lengths[b] + t; ++p) {
      double logit = 0;
      for (int64_t d = 0; d < s.D; ++d) logit += static_cast<double>(q[i * s.D + d]) * kf[(head + p) * s.D + d];
      const double e = std::exp(logit * a.scale);
      total += e;
      for (int64_t d = 0; d < s.D; ++d) sum[d] += e * vf[(head + p) * s.D + d];
    }
    for (int64_t d = 0; d < s.D; ++d) worst = std::fmax(worst, std::fabs(sum[d] / total - out[i * s.D + d]));
  }
  return worst;
}

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
  Threads parallel(threads);
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
    Threads parallel(threads);
    expert_ffn(a, kernels, parallel);
  });
}

uint16_t bfloat16_bits(float f) {  // towards zero
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return static_cast<uint16_t>(bits >> 16);
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
  Threads parallel(threads);
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
  Threads parallel(threads);
  expert_ffn(a, kernels, parallel);
  const auto value = [](uint16_t bits) {
    const uint32_t whole = static_cast<uint32_t>(bits) << 16;
    float f;
    std::memcpy(&f, &whole, 4);
    return static_cast<double>(f);
  };
  double worst = 0;
  std::vector<double> hidden(F);
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t f = 0; f < F; ++f) {
      double gate = 0, up = 0;
      for (int64_t m = 0; m < M; ++m) {
        gate += value(x[r * M + m]) * value(w[f * M + m]);
        up += value(x[r * M + m]) * value(w[(F + f) * M + m]);
      }
      hidden[f] = gate / (1 + std::exp(-gate)) * up;
    }
    for (int64_t m = 0; m < M; ++m) {
      double want = 0;
      for (int64_t f = 0; f < F; ++f) want += hidden[f] * value(w[(2 * F + f) * M + m]);
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
      Threads parallel(threads);
      rowwise_ffn(a, kernels, parallel);
    });
  };
  const double in_one_array = worst();
  a.blocks = nullptr;  // by the addresses of the experts
  a.table = table;
  return std::max(in_one_array, worst());
}

ProductArgs product_args(int64_t n, int64_t N, int64_t M, DType x_type, const void* x, DType w_type, const void* w, const void* scales,
                         float* y) {
  ProductArgs a{};
  a.n = n;
  a.M = M;
  a.N = N;
  a.x_type = x_type;
  a.w_type = w_type;
  a.x = x;
  a.w = w;
  a.scales = scales;
  a.y = y;
  return a;
}

double product(const KernelTable& kernels, int64_t n, int64_t N, int64_t M, DType x_type, DType w_type, int threads) {
  const auto item = [](DType type) -> int64_t { return type == DType::kF32 ? 4 : type == DType::kBF16 ? 2 : 1; };
  const auto fill = [&](Exact<char>& to, DType type) {
    for (int64_t i = 0; i < to.size; i += item(type)) {
      const float f = draw();
      uint32_t bits;
      std::memcpy(&bits, &f, 4);
      bits = type == DType::kF32 ? bits : type == DType::kBF16 ? bits >> 16 : static_cast<uint32_t>(static_cast<int32_t>(100 * f));
      std::memcpy(to.data + i, &bits, item(type));
    }
  };
  const auto value = [&](const Exact<char>& from, DType type, int64_t i) {
    if (type == DType::kI8) return static_cast<double>(static_cast<int8_t>(from.data[i]));
    uint32_t bits = 0;
    std::memcpy(&bits, from.data + i * item(type), item(type));
    bits <<= type == DType::kF32 ? 0 : 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return static_cast<double>(f);
  };
  Exact<char> x(n * M * item(x_type), item(x_type)), w(N * M * item(w_type), item(w_type));
  Exact<float> y(n * N), scales(N);
  fill(x, x_type);
  fill(w, w_type);
  for (int64_t i = 0; i < N; ++i) scales.data[i] = draw() / 100;
  const float* of_rows = w_type == DType::kI8 ? scales.data : nullptr;
  const ProductArgs a = product_args(n, N, M, x_type, x.data, w_type, w.data, of_rows, y.data);
  Threads parallel(threads);
  few_rows_product(a, kernels, parallel);
  double worst = 0;
  for (int64_t i = 0; i < n * N; ++i) {
    double sum = 0;
    for (int64_t m = 0; m < M; ++m) sum += value(x, x_type, i / N * M + m) * value(w, w_type, i % N * M + m);
    if (w_type == DType::kI8) sum *= scales[i % N];
    worst = std::fmax(worst, std::fabs(sum - y[i]));
  }
  return worst;
}

// A matrix of 4-bit codes, each group with a scale of its own.
double product_of_codes(const KernelTable& kernels, int64_t n, int64_t N, int64_t M, int threads) {
  const int64_t groups = groups_of(M), row = groups * kGroup / 2;
  Exact<float> x(n * M), y(n * N);
  Exact<uint8_t> codes(N * row);
  Exact<uint16_t> scales(N * groups);
  for (int64_t i = 0; i < x.size; ++i) x[i] = draw();
  for (int64_t i = 0; i < codes.size; ++i) codes[i] = static_cast<uint8_t>(rng());
  for (int64_t i = 0; i < scales.size; ++i) scales[i] = bfloat16_bits(draw() / 100);
  const ProductArgs a = product_args(n, N, M, DType::kF32, x.data, DType::kI4, codes.data, scales.data, y.data);
  Threads parallel(threads);
  few_rows_product(a, kernels, parallel);
  double worst = 0;
  for (int64_t i = 0; i < n * N; ++i) {
    double sum = 0;
    for (int64_t m = 0; m < M; ++m) {
      const uint32_t bits = static_cast<uint32_t>(scales[i % N * groups + m / kGroup]) << 16;
      float scale;
      std::memcpy(&scale, &bits, 4);
      const int code = codes[i % N * row + m / 2] >> m % 2 * 4 & 15;
      sum += static_cast<double>(x[i / N * M + m]) * (code - 8) * static_cast<double>(scale);
    }
    worst = std::fmax(worst, std::fabs(sum - static_cast<double>(y[i])));
  }
  return worst;
}

// A call that fails says so, leaves no thread waiting, and the next one works.
int failing() {
  struct : Parallel {
    int threads() const override { return 1; }
    void run(int64_t, void (*)(void*, int64_t), void*) override { throw std::bad_alloc(); }
  } none;
  const KernelTable& kernels = *isa_table("auto");
  float x[4] = {1, 1, 1, 1}, w[3 * 4 * 4] = {}, y[4];
  int32_t slot = 0;
  FfnArgs a{};
  a.n = 1;
  a.A = 1;
  a.M = 4;
  a.F = 4;
  a.R = 1;
  a.expert_bytes = sizeof w;
  a.x = x;
  a.blocks = w;
  a.slots = &slot;
  a.y = y;
  try {
    expert_ffn(a, kernels, none);
    return 1;
  } catch (const std::bad_alloc&) {
  }
  try {
    thread_scratch(Scratch::kFfnCall, int64_t{1} << 60);
    return 1;
  } catch (const std::bad_alloc&) {
  }
  Threads parallel(1);
  expert_ffn(a, kernels, parallel);
  return y[0] != 0;
}

}  // namespace
}  // namespace specmoe

int main() {
  using namespace specmoe;
  const Shape shapes[] = {{1, 1, 1, 1, 8, 9, 1},      {2, 5, 6, 2, 24, 71, 2},  {3, 7, 4, 1, 40, 130, 2}, {1, 3, 4, 2, 80, 2100, 3},
                          {16, 2, 16, 2, 128, 65, 2}, {1, 64, 4, 4, 16, 64, 2}, {2, 13, 8, 1, 72, 64, 1},
                          {1, 13, 2, 2, 40, 170, 1}};
  int failures = 0;
  for (const auto& isa : isa_names()) {
    const KernelTable& kernels = *isa_table(isa);
    for (const Shape& s : shapes) {
      for (DType type : {DType::kF32, DType::kBF16, DType::kI8}) {
        for (bool packed : {false, true}) {
          const double error = attention(kernels, s, type, packed);
          if (error <= 1e-5) continue;
          std::printf("%s attention T %d D %d S %d type %d packed %d: error %g\n", isa.c_str(), int(s.T), int(s.D), int(s.S),
                      int(type), packed, error);
          ++failures;
        }
      }
    }
    for (int64_t n : {1, 2, 9, 40}) {
      for (bool bf16 : {false, true}) failures += ffn(kernels, n, 3 + 16 * n, 5 + 8 * n, bf16, n % 2 + 1) != 0;
    }
  }
  for (const auto& isa : isa_names()) {
    const KernelTable& kernels = *isa_table(isa);
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
      for (int64_t M : {1, 32, 75, 300, 1024}) failures += !(product_of_codes(kernels, n, 7 * n, M, n % 2 + 1) <= 1e-3);
      for (DType x : {DType::kF32, DType::kBF16}) {
        for (DType w : {DType::kF32, DType::kBF16, DType::kI8}) {
          for (int64_t M : {13 + 9 * n, 1024 + 3 * n}) failures += !(product(kernels, n, 7 * n, M, x, w, n % 2 + 1) <= 1e-3);
        }
      }
    }
  }
  failures += failing();
  std::printf("%d failures\n", failures);
  return failures != 0;
}
