// XLA FFI face of few_rows_product: checks, then the call.
#include "few_rows_product.h"

#include "expert_ffn.h"
#include "handler.h"

namespace ffi = xla::ffi;

namespace specmoe {
namespace {

bool known(ffi::DataType t) { return t == ffi::F32 || t == ffi::BF16; }

ffi::Error product(const char* name, ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w, DType w_type, const void* scales,
                   ffi::Result<ffi::Buffer<ffi::F32>> y, int64_t threads, std::string_view isa) {
  const auto xd = x.dimensions(), wd = w.dimensions();
  const bool fits = xd.size() == 2 && wd.size() == 2 && wd[1] == (w_type == DType::kI4 ? groups_of(xd[1]) * kGroup / 2 : xd[1]);
  if (!fits) return wrong_argument(name, "x must be [n, M] and w [N, M], two to a byte in int4");
  if (!known(x.element_type())) return wrong_argument(name, "x must be float32 or bfloat16");
  ProductArgs a{};
  a.n = xd[0];
  a.M = xd[1];
  a.N = wd[0];
  a.x_type = x.element_type() == ffi::F32 ? DType::kF32 : DType::kBF16;
  a.w_type = w_type;
  a.x = x.untyped_data();
  a.w = w.untyped_data();
  a.scales = scales;
  a.y = y->typed_data();
  return run_kernel(name, pool, threads, isa,
                    [&](const KernelTable& table, Parallel& parallel) { few_rows_product(a, table, parallel); });
}

ffi::Error run(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::Result<ffi::Buffer<ffi::F32>> y, int64_t threads,
               std::string_view isa) {
  constexpr const char* kName = "few_rows_product";
  if (!known(w.element_type())) return wrong_argument(kName, "w must be float32 or bfloat16");
  return product(kName, pool, x, w, w.element_type() == ffi::F32 ? DType::kF32 : DType::kBF16, nullptr, y, threads, isa);
}

ffi::Error run_packed(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer codes, ffi::AnyBuffer scales,
                      ffi::Result<ffi::Buffer<ffi::F32>> y, int64_t threads, std::string_view isa) {
  constexpr const char* kName = "packed_few_rows_product";
  const auto cd = codes.dimensions(), sd = scales.dimensions();
  if (cd.size() != 2 || sd.size() == 0 || sd[0] != cd[0]) return wrong_argument(kName, "codes must be [N, bytes], and scales of N rows");
  const bool is_int8 = codes.element_type() == ffi::S8 && scales.element_type() == ffi::F32 && sd.size() == 1;
  const bool is_int4 = codes.element_type() == ffi::U8 && scales.element_type() == ffi::BF16 && sd.size() == 2;
  if (!is_int8 && !(is_int4 && sd[1] * kGroup / 2 == cd[1])) {
    return wrong_argument(kName, "codes must be int8 and scales float32 [N], or uint8 and bfloat16 [N, groups]");
  }
  return product(kName, pool, x, codes, is_int8 ? DType::kI8 : DType::kI4, scales.untyped_data(), y, threads, isa);
}

}  // namespace
}  // namespace specmoe

extern "C" {
XLA_FFI_DEFINE_HANDLER_SYMBOL(specmoe_few_rows_product, specmoe::run,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("threads")
                                  .Attr<std::string_view>("isa"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(specmoe_packed_few_rows_product, specmoe::run_packed,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("threads")
                                  .Attr<std::string_view>("isa"));
}
