// XLA FFI face of rowwise_ffn: checks, then the call.
#include "rowwise_ffn.h"

#include "expert_rows.h"

namespace ffi = xla::ffi;

namespace specmoe {
namespace {

ffi::Error wrong(const char* what) { return wrong_argument("rowwise_expert_ffn", what); }

// blocks: [R, bytes] uint8; or [R, 2] uint32, the addresses of experts anywhere in the process's memory, as in expert_ffn_ffi.cc.
ffi::Error run(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer blocks, ffi::Buffer<ffi::S32> slots,
               ffi::Result<ffi::Buffer<ffi::F32>> y, int64_t format, int64_t hidden, int64_t group, int64_t block_rows,
               int64_t half_scales, int64_t zeros, int64_t biased, int64_t clamped, double alpha, double limit, int64_t threads,
               std::string_view isa) {
  const auto xd = x.dimensions(), bd = blocks.dimensions(), sd = slots.dimensions();
  if (xd.size() != 2 || bd.size() != 2 || sd.size() != 2 || sd[0] != xd[0]) return wrong("x [n, M], blocks [R, bytes], slots [n, A]");
  if (!is_float_row(x)) return wrong("x must be float32 or bfloat16");
  if (format < 0 || format >= static_cast<int64_t>(RowFormat::kCount)) return wrong("no such format");
  RowwiseArgs a{};
  set_rows(a, x, slots, *y);
  a.R = bd[0];
  a.F = hidden;
  a.format = static_cast<RowFormat>(format);
  const int64_t unit = a.format == RowFormat::kNvfp4 ? 16 : kColumnUnit;
  if (a.M % kColumnUnit != 0 || a.F % kColumnUnit != 0) return wrong("model and hidden dimension must be multiples of 32");
  if (group <= 0 || group % unit != 0 || block_rows <= 0) return wrong("no such group");
  a.group = group;
  a.block_rows = block_rows;
  a.half_scales = half_scales != 0;
  a.zeros = zeros != 0;
  a.biased = biased != 0;
  a.clamped = clamped != 0;
  a.alpha = static_cast<float>(alpha);
  a.limit = static_cast<float>(limit);
  a.expert_bytes = rowwise_expert_bytes(a);
  if (blocks.element_type() == ffi::U32) {
    if (bd[1] != 2) return wrong("table [R, 2]");
    static_assert(sizeof(void*) == 8);
    a.table = static_cast<const void* const*>(blocks.untyped_data());
  } else {
    if (blocks.element_type() != ffi::U8) return wrong("blocks must be uint8, or addresses as uint32");
    if (bd[1] != a.expert_bytes) return wrong("a packed expert has another number of bytes than its shape takes");
    a.blocks = blocks.untyped_data();
  }
  return run_kernel("rowwise_expert_ffn", pool, threads, isa,
                    [&](const KernelTable& table, Parallel& parallel) { rowwise_ffn(a, table, parallel); });
}

}  // namespace
}  // namespace specmoe

extern "C" {
XLA_FFI_DEFINE_HANDLER_SYMBOL(specmoe_rowwise_expert_ffn, specmoe::run,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("format")
                                  .Attr<int64_t>("hidden")
                                  .Attr<int64_t>("group")
                                  .Attr<int64_t>("block_rows")
                                  .Attr<int64_t>("half_scales")
                                  .Attr<int64_t>("zeros")
                                  .Attr<int64_t>("biased")
                                  .Attr<int64_t>("clamped")
                                  .Attr<double>("alpha")
                                  .Attr<double>("limit")
                                  .Attr<int64_t>("threads")
                                  .Attr<std::string_view>("isa"));
}
