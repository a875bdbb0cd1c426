#include <cmath>
#include <cstring>

#include "../expert_ffn.h"
#include "../few_rows_product.h"
#include "selftest.h"

namespace specmoe {
namespace {

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

// The product, as two of parts of the matrix, of which the second is one row.
void multiply(const ProductArgs& whole, const KernelTable& kernels, Parallel& parallel) {
  const int64_t M = whole.M, groups = groups_of(M), first = whole.N - 1;
  const int64_t row = whole.w_type == DType::kI4 ? groups * kGroup / 2 : M * (whole.w_type == DType::kF32 ? 4 : whole.w_type == DType::kBF16 ? 2 : 1);
  const int64_t row_scales = whole.w_type == DType::kI4 ? 2 * groups : 4;
  Exact<float> y(whole.n * first), last(whole.n);
  ProductArgs parts[2] = {whole, whole};
  parts[0].N = first;
  parts[0].y = y.data;
  parts[1].N = 1;
  parts[1].y = last.data;
  parts[1].w = static_cast<const char*>(whole.w) + first * row;
  if (whole.scales) parts[1].scales = static_cast<const char*>(whole.scales) + first * row_scales;
  few_rows_products(parts, 2, kernels, parallel);
  for (int64_t i = 0; i < whole.n * whole.N; ++i) {
    const int64_t r = i / whole.N, column = i % whole.N;
    whole.y[i] = column < first ? y[r * first + column] : last[r];
  }
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
  HelpedParallel parallel(threads);
  multiply(product_args(n, N, M, x_type, x.data, w_type, w.data, of_rows, y.data), kernels, parallel);
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
  HelpedParallel parallel(threads);
  multiply(product_args(n, N, M, DType::kF32, x.data, DType::kI4, codes.data, scales.data, y.data), kernels, parallel);
  double worst = 0;
  for (int64_t i = 0; i < n * N; ++i) {
    double sum = 0;
    for (int64_t m = 0; m < M; ++m) {
      const int code = codes[i % N * row + m / 2] >> m % 2 * 4 & 15;
      sum += static_cast<double>(x[i / N * M + m]) * (code - 8) * of_bfloat16(scales[i % N * groups + m / kGroup]);
    }
    worst = std::fmax(worst, std::fabs(sum - static_cast<double>(y[i])));
  }
  return worst;
}

}  // namespace

int product_failures() {
  int failures = 0;
  for (const auto& isa : isa_names()) {
    const KernelTable& kernels = *isa_table(isa);
    for (int64_t n : {1, 3, 5, 30}) {
      for (int64_t M : {1, 32, 75, 300, 1024}) failures += !(product_of_codes(kernels, n, 7 * n, M, n % 2 + 1) <= 1e-3);
      for (DType x : {DType::kF32, DType::kBF16}) {
        for (DType w : {DType::kF32, DType::kBF16, DType::kI8}) {
          for (int64_t M : {13 + 9 * n, 1024 + 3 * n}) failures += !(product(kernels, n, 7 * n, M, x, w, n % 2 + 1) <= 1e-3);
        }
      }
    }
  }
  return failures;
}

}  // namespace specmoe
