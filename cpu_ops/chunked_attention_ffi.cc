// XLA FFI face of chunked_attention: checks, then the call.
#include "chunked_attention.h"

#include "handler.h"

namespace ffi = xla::ffi;

namespace specmoe {
namespace {

ffi::ErrorOr<DType> storage(ffi::DataType t, const char* what) {
  if (t == ffi::F32) return DType::kF32;
  if (t == ffi::BF16) return DType::kBF16;
  if (t == ffi::S8) return DType::kI8;
  return ffi::Unexpected(
      ffi::Error::InvalidArgument(std::string("chunked_attention: ") + what + " has a dtype that is not supported"));
}

ffi::Error wrong(const char* what) { return wrong_argument("chunked_attention", what); }

#define SPECMOE_ASSIGN(target, expr)               \
  {                                                \
    auto result = (expr);                          \
    if (result.has_error()) return result.error(); \
    target = result.value();                       \
  }

// Operands 5.. : mask, table, k_cache, v_cache, k_scale, v_scale; the last four are aliased to results 1..4.
ffi::Error run(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k_new, ffi::AnyBuffer v_new, ffi::Buffer<ffi::S32> lengths,
               ffi::Buffer<ffi::S32> num_new, ffi::AnyBuffer mask, ffi::Buffer<ffi::S32> table, ffi::AnyBuffer, ffi::AnyBuffer,
               ffi::AnyBuffer, ffi::AnyBuffer, ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> k_cache,
               ffi::Result<ffi::AnyBuffer> v_cache, ffi::Result<ffi::AnyBuffer> k_scale, ffi::Result<ffi::AnyBuffer> v_scale,
               float scale, float softcap, int64_t window, int64_t threads, std::string_view isa) {
  const auto qd = q.dimensions(), vd = v_cache->dimensions(), kn = k_new.dimensions();
  if (qd.size() != 4 || kn.size() != 4 || vd.size() != 4) return wrong("q, k_new and v_cache must have 4 dimensions");
  AttentionArgs a{};
  a.B = qd[0];
  a.T = qd[1];
  a.H = qd[2];
  a.D = qd[3];
  a.K = kn[2];
  a.rows = vd[0];
  a.S = vd[2];
  const auto td = table.dimensions();
  a.pages = td.size() == 2 ? td[1] : 0;
  a.table = a.pages > 0 ? table.typed_data() : nullptr;
  a.packed = k_cache->dimensions().size() == 6;
  if (a.T > kMaxNew) return wrong("at most 64 new tokens a call");
  if (a.D % 8 != 0 || a.K == 0 || a.H % a.K != 0) return wrong("D must be a multiple of 8 and H of K");
  if ((a.packed || a.pages > 0) && a.S % kBlock != 0) return wrong("a packed or paged cache needs S to be a multiple of 16");
  if (vd[1] != a.K || vd[3] != a.D || (a.pages == 0 && a.rows != a.B)) return wrong("v_cache must be [B, K, S, D]");
  SPECMOE_ASSIGN(a.q_type, storage(q.element_type(), "q"));
  SPECMOE_ASSIGN(a.new_type, storage(k_new.element_type(), "k_new"));
  SPECMOE_ASSIGN(a.out_type, storage(out->element_type(), "out"));
  SPECMOE_ASSIGN(a.cache_type, storage(k_cache->element_type(), "k_cache"));
  a.q = q.untyped_data();
  a.k_new = k_new.untyped_data();
  a.v_new = v_new.untyped_data();
  a.lengths = lengths.typed_data();
  a.num_new = num_new.typed_data();
  a.mask = mask.element_count() == 0 ? nullptr : static_cast<const uint8_t*>(mask.untyped_data());
  a.mask_per_request = mask.dimensions().size() == 3;
  a.k_cache = k_cache->untyped_data();
  a.v_cache = v_cache->untyped_data();
  a.k_scale = static_cast<float*>(k_scale->untyped_data());
  a.v_scale = static_cast<float*>(v_scale->untyped_data());
  a.out = out->untyped_data();
  a.scale = scale;
  a.softcap = softcap;
  a.window = window;
  return run_kernel("chunked_attention", pool, threads, isa,
                    [&](const KernelTable& table, Parallel& parallel) { chunked_attention(a, table, parallel); });
}

}  // namespace
}  // namespace specmoe

extern "C" {
XLA_FFI_DEFINE_HANDLER_SYMBOL(specmoe_chunked_attention, specmoe::run,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("scale")
                                  .Attr<float>("softcap")
                                  .Attr<int64_t>("window")
                                  .Attr<int64_t>("threads")
                                  .Attr<std::string_view>("isa"));
}
