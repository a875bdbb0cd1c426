#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "../chunked_attention.h"
#include "selftest.h"

namespace specmoe {
namespace {

struct Shape {
  int64_t B, T, H, K, D, S;
  int threads;
};

// Against doubles. half: queries are bfloat16.
double attention(const KernelTable& kernels, const Shape& s, DType type, bool half, bool packed) {
  const int64_t item = type == DType::kF32 ? 4 : type == DType::kBF16 ? 2 : 1;
  const int64_t S = packed ? padded(s.S) : s.S, cache = s.B * s.K * S * s.D;
  Exact<float> q(s.B * s.T * s.H * s.D), k_new(s.B * s.T * s.K * s.D), v_new(k_new.size), out(q.size);
  Exact<uint16_t> q_half(half ? q.size : 0);
  Exact<char> k(cache * item, item), v(cache * item, item);
  Exact<float> k_scale(item == 1 ? s.B * s.K * S : 0), v_scale(k_scale.size);
  Exact<int32_t> lengths(s.B), num_new(s.B);
  for (auto* x : {&q, &k_new, &v_new}) {
    for (int64_t i = 0; i < x->size; ++i) (*x)[i] = draw();
  }
  for (int64_t i = 0; i < q_half.size; ++i) {
    q_half[i] = bfloat16_bits(q[i]);
    q[i] = static_cast<float>(of_bfloat16(q_half[i]));
  }
  for (auto* x : {&k, &v}) {
    std::memset(x->data, 0, x->size);
    for (int64_t i = 0; i < cache; ++i) {
      const float f = draw();
      const uint16_t bits = bfloat16_bits(f);
      const auto code = static_cast<int8_t>(f * 30);
      std::memcpy(x->data + item * i, item == 4 ? static_cast<const void*>(&f) : item == 2 ? static_cast<const void*>(&bits) : &code, item);
    }
  }
  for (auto* x : {&k_scale, &v_scale}) {
    for (int64_t i = 0; i < x->size; ++i) (*x)[i] = 0.03f + 0.01f * draw();
  }
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
  a.q_type = half ? DType::kBF16 : DType::kF32;
  a.new_type = a.out_type = DType::kF32;
  a.cache_type = type;
  a.packed = packed;
  a.q = half ? static_cast<void*>(q_half.data) : q.data;
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
  HelpedParallel parallel(s.threads);
  chunked_attention(a, kernels, parallel);
  double worst = 0;
  for (int64_t i = 0; i < out.size; ++i) worst = std::isfinite(out[i]) ? worst : INFINITY;
  const auto number = [&](const Exact<char>& from, const Exact<float>& scale, int64_t token, int64_t i) {
    if (item == 1) return static_cast<int8_t>(from.data[i]) * static_cast<double>(scale.data[token]);
    uint32_t bits = 0;
    std::memcpy(&bits, from.data + i * item, item);
    if (item == 2) return of_bfloat16(static_cast<uint16_t>(bits));
    float f;
    std::memcpy(&f, &bits, 4);
    return static_cast<double>(f);
  };
  const auto key = [&](int64_t token, int64_t d) {  // where element d of a token's key is
    const int64_t unit = 4 / item;
    if (!packed) return token * s.D + d;
    return token / kBlock * kBlock * s.D + d / unit * kBlock * unit + token % kBlock * unit + d % unit;
  };
  for (int64_t i = 0; i < s.B * s.T * s.H; ++i) {
    const int64_t b = i / s.H / s.T, t = i / s.H % s.T, head = (b * s.K + i % s.H / (s.H / s.K)) * S;
    std::vector<double> sum(s.D, 0.0);
    double total = 0;
    for (int64_t p = 0; p <= lengths[b] + t; ++p) {
      double logit = 0;
      for (int64_t d = 0; d < s.D; ++d) logit += static_cast<double>(q[i * s.D + d]) * number(k, k_scale, head + p, key(head + p, d));
      const double e = std::exp(logit * a.scale);
      total += e;
      for (int64_t d = 0; d < s.D; ++d) sum[d] += e * number(v, v_scale, head + p, (head + p) * s.D + d);
    }
    for (int64_t d = 0; d < s.D; ++d) worst = std::fmax(worst, std::fabs(sum[d] / total - out[i * s.D + d]));
  }
  return worst;
}

}  // namespace

int attention_failures() {
  const Shape shapes[] = {{1, 1, 1, 1, 8, 9, 1},      {2, 5, 6, 2, 24, 71, 2},  {3, 7, 4, 1, 40, 130, 2}, {1, 3, 4, 2, 80, 2100, 3},
                          {16, 2, 16, 2, 128, 65, 2}, {1, 64, 4, 4, 16, 64, 2}, {2, 13, 8, 1, 72, 64, 1},
                          {1, 13, 2, 2, 40, 170, 1},  {2, 1, 8, 2, 128, 1100, 2}, {1, 5, 8, 2, 96, 150, 1}, {1, 2, 2, 1, 32, 40, 2}};
  int failures = 0;
  for (const auto& isa : isa_names()) {
    for (const Shape& s : shapes) {
      for (DType type : {DType::kF32, DType::kBF16, DType::kI8}) {
        for (bool half : {false, true}) {
          for (bool packed : {false, true}) {
            const double error = attention(*isa_table(isa), s, type, half, packed);
            if (error <= (half ? 2e-5 : 1e-5)) continue;  // tiles round probabilities to two bfloat16
            std::printf("%s attention T %d D %d S %d type %d bfloat16 queries %d packed %d: error %g\n", isa.c_str(), int(s.T), int(s.D),
                        int(s.S), int(type), half, packed, error);
            ++failures;
          }
        }
      }
    }
  }
  return failures;
}

}  // namespace specmoe
