// XLA FFI face of few_rows_product: checks, then the call.
#include "few_rows_product.h"

#include "handler.h"

namespace ffi = xla::ffi;

namespace specmoe {
namespace {

ffi::Error wrong(const char* what) { return wrong_argument("few_rows_product", what); }

bool known(ffi::DataType t) { return t == ffi::F32 || t == ffi::BF16; }

ffi::Error run(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::Result<ffi::Buffer<ffi::F32>> y, int64_t threads,
               std::string_view isa) {
  const auto xd = x.dimensions(), wd = w.dimensions();
  if (xd.size() != 2 || wd.size() != 2 || xd[1] != wd[1]) return wrong("x must be [n, M] and w [N, M]");
  if (!known(x.element_type()) || !known(w.element_type())) return wrong("x and w must be float32 or bfloat16");
  ProductArgs a{};
  a.n = xd[0];
  a.M = xd[1];
  a.N = wd[0];
  a.x_type = x.element_type() == ffi::F32 ? DType::kF32 : DType::kBF16;
  a.w_type = w.element_type() == ffi::F32 ? DType::kF32 : DType::kBF16;
  a.x = x.untyped_data();
  a.w = w.untyped_data();
  a.y = y->typed_data();
  return run_kernel("few_rows_product", pool, threads, isa,
                    [&](const KernelTable& table, Parallel& parallel) { few_rows_product(a, table, parallel); });
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
}
