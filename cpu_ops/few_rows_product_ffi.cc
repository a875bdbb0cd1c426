// XLA FFI faces of few_rows_products: checks, then the call. Both take x, the matrices, and as many results: one product a matrix.
#include <array>
#include <optional>

#include "expert_ffn.h"
#include "few_rows_product.h"
#include "handler.h"

namespace ffi = xla::ffi;

namespace specmoe {
namespace {

constexpr size_t kMostMatrices = 8;  // a fixed number, since allocating may throw

struct Matrix {
  ffi::AnyBuffer w;
  DType type;
  const void* scales;
};

bool known(ffi::DataType t) { return t == ffi::F32 || t == ffi::BF16; }
DType dtype_of(ffi::DataType t) { return t == ffi::F32 ? DType::kF32 : DType::kBF16; }

// The matrix that begins at argument i; null for types that no kernel has.
std::optional<Matrix> plain_matrix(ffi::RemainingArgs args, size_t i) {
  const auto w = args.get<ffi::AnyBuffer>(i);
  if (!w.has_value() || w->dimensions().size() != 2 || !known(w->element_type())) return std::nullopt;
  return Matrix{*w, dtype_of(w->element_type()), nullptr};
}

std::optional<Matrix> packed_matrix(ffi::RemainingArgs args, size_t i) {
  const auto codes = args.get<ffi::AnyBuffer>(i), scales = args.get<ffi::AnyBuffer>(i + 1);
  if (!codes.has_value() || !scales.has_value()) return std::nullopt;
  const auto cd = codes->dimensions(), sd = scales->dimensions();
  if (cd.size() != 2 || sd.size() == 0 || sd[0] != cd[0]) return std::nullopt;
  const bool is_int8 = codes->element_type() == ffi::S8 && scales->element_type() == ffi::F32 && sd.size() == 1;
  const bool is_int4 = codes->element_type() == ffi::U8 && scales->element_type() == ffi::BF16 && sd.size() == 2;
  if (!is_int8 && !(is_int4 && sd[1] * kGroup / 2 == cd[1])) return std::nullopt;
  return Matrix{*codes, is_int8 ? DType::kI8 : DType::kI4, scales->untyped_data()};
}

// `matrix_at` makes a matrix of `arguments` arguments.
template <typename MatrixAt>
ffi::Error run(const char* name, const char* matrices, ffi::ThreadPool& pool, ffi::AnyBuffer x, ffi::RemainingArgs args,
               ffi::RemainingRets results, size_t arguments, const MatrixAt& matrix_at, int64_t threads, std::string_view isa) {
  const auto xd = x.dimensions();
  if (xd.size() != 2 || !known(x.element_type())) return wrong_argument(name, "x must be [n, M], float32 or bfloat16");
  const size_t count = results.size();
  if (count == 0 || args.size() != arguments * count) return wrong_argument(name, "as many results as matrices");
  if (count > kMostMatrices) return wrong_argument(name, "more than eight matrices");
  std::array<ProductArgs, kMostMatrices> products{};
  for (size_t i = 0; i < count; ++i) {
    const auto matrix = matrix_at(args, i * arguments);
    auto y = results.get<ffi::Buffer<ffi::F32>>(i);
    if (!matrix || !y.has_value()) return wrong_argument(name, matrices);
    const auto wd = matrix->w.dimensions();
    if (wd[1] != (matrix->type == DType::kI4 ? groups_of(xd[1]) * kGroup / 2 : xd[1])) {
      return wrong_argument(name, "x must be [n, M] and w [N, M], two to a byte in int4");
    }
    if (i > 0 && matrix->type != products[0].w_type) return wrong_argument(name, "matrices of one type");
    ProductArgs& a = products[i];
    a.n = xd[0];
    a.M = xd[1];
    a.N = wd[0];
    a.x_type = dtype_of(x.element_type());
    a.w_type = matrix->type;
    a.x = x.untyped_data();
    a.w = matrix->w.untyped_data();
    a.scales = matrix->scales;
    a.y = (*y)->typed_data();
  }
  return run_kernel(name, pool, threads, isa,
                    [&](const KernelTable& table, Parallel& parallel) { few_rows_products(products.data(), count, table, parallel); });
}

ffi::Error run_plain(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::RemainingArgs args, ffi::RemainingRets results, int64_t threads,
                     std::string_view isa) {
  return run("few_rows_products", "each w must be [N, M], float32 or bfloat16", pool, x, args, results, 1, plain_matrix, threads, isa);
}

ffi::Error run_packed(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::RemainingArgs args, ffi::RemainingRets results, int64_t threads,
                      std::string_view isa) {
  return run("packed_few_rows_products", "codes must be int8 and scales float32 [N], or uint8 and bfloat16 [N, groups]", pool, x, args,
             results, 2, packed_matrix, threads, isa);
}

}  // namespace
}  // namespace specmoe

extern "C" {
XLA_FFI_DEFINE_HANDLER_SYMBOL(specmoe_few_rows_products, specmoe::run_plain,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int64_t>("threads")
                                  .Attr<std::string_view>("isa"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(specmoe_packed_few_rows_products, specmoe::run_packed,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int64_t>("threads")
                                  .Attr<std::string_view>("isa"));
}
