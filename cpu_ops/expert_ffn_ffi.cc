// XLA FFI face of expert_ffn: checks, then the call.
#include "expert_rows.h"

namespace ffi = xla::ffi;

namespace specmoe {
namespace {

ffi::Error wrong(const char* what) { return wrong_argument("expert_ffn", what); }

// Of the bits of a weight; 12 are bfloat16's, without loss.
DType type_of(int64_t bits) {
  switch (bits) {
    case 32:
      return DType::kF32;
    case 16:
      return DType::kBF16;
    case 12:
      return DType::kLossless;
    default:
      return bits == 8 ? DType::kI8 : DType::kI4;
  }
}

ffi::Error run(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer blocks, ffi::Buffer<ffi::S32> slots,
               ffi::Result<ffi::Buffer<ffi::F32>> y, int64_t threads, std::string_view isa) {
  const auto xd = x.dimensions(), bd = blocks.dimensions(), sd = slots.dimensions();
  if (xd.size() != 2 || bd.size() != 4 || sd.size() != 2) return wrong("x [n, M], blocks [R, 3, F, M], slots [n, A]");
  FfnArgs a{};
  set_rows(a, x, slots, *y);
  a.R = bd[0];
  a.F = bd[2];
  if (bd[1] != 3 || bd[3] != a.M || sd[0] != a.n) return wrong("shapes of x, blocks and slots do not agree");
  if (!is_float_row(x)) return wrong("x must be float32 or bfloat16");
  const auto w = blocks.element_type();
  if (w != ffi::F32 && w != ffi::BF16 && w != ffi::U16) return wrong("blocks must be float32, bfloat16 or its bits as uint16");
  a.w_type = w == ffi::F32 ? DType::kF32 : DType::kBF16;
  a.expert_bytes = 3 * a.F * a.M * (a.w_type == DType::kF32 ? 4 : 2);
  a.blocks = blocks.untyped_data();
  return run_kernel("expert_ffn", pool, threads, isa,
                    [&](const KernelTable& table, Parallel& parallel) { expert_ffn(a, table, parallel); });
}

// blocks [R, bytes]: packed experts of `hidden` hidden units, their codes of `bits` bits.
ffi::Error run_packed(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::U8> blocks, ffi::Buffer<ffi::S32> slots,
                      ffi::Result<ffi::Buffer<ffi::F32>> y, int64_t bits, int64_t hidden, int64_t threads, std::string_view isa) {
  const auto xd = x.dimensions(), bd = blocks.dimensions(), sd = slots.dimensions();
  if (xd.size() != 2 || bd.size() != 2 || sd.size() != 2 || sd[0] != xd[0]) return wrong("x [n, M], blocks [R, bytes], slots [n, A]");
  if (!is_float_row(x)) return wrong("x must be float32 or bfloat16");
  if (bits != 12 && bits != 8 && bits != 4) return wrong("codes have 12, 8 or 4 bits");
  FfnArgs a{};
  set_rows(a, x, slots, *y);
  a.R = bd[0];
  a.F = hidden;
  a.w_type = type_of(bits);
  a.expert_bytes = packed_expert_bytes(a.w_type, a.F, a.M);
  if (bd[1] != a.expert_bytes) return wrong("a packed expert has another number of bytes than its shape takes");
  a.blocks = blocks.typed_data();
  return run_kernel("expert_ffn", pool, threads, isa,
                    [&](const KernelTable& table, Parallel& parallel) { expert_ffn(a, table, parallel); });
}

// table [R, 2]: the addresses of experts of `hidden` hidden units in the process's memory, each as two halves, the low one first
// (JAX has no 64-bit integers by default), which is how a pointer lies in memory; odd ones: as in FfnArgs. Weights of `bits` bits: 32,
// 16 (bfloat16), or packed.
ffi::Error run_table(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::U32> table, ffi::Buffer<ffi::S32> slots,
                     ffi::Result<ffi::Buffer<ffi::F32>> y, int64_t bits, int64_t hidden, int64_t threads, std::string_view isa) {
  const auto xd = x.dimensions(), td = table.dimensions(), sd = slots.dimensions();
  if (xd.size() != 2 || td.size() != 2 || td[1] != 2 || sd.size() != 2 || sd[0] != xd[0])
    return wrong("x [n, M], table [R, 2], slots [n, A]");
  if (!is_float_row(x)) return wrong("x must be float32 or bfloat16");
  if (bits != 32 && bits != 16 && bits != 12 && bits != 8 && bits != 4) return wrong("weights have 32, 16, 12, 8 or 4 bits");
  static_assert(sizeof(void*) == 8);
  FfnArgs a{};
  set_rows(a, x, slots, *y);
  a.R = td[0];
  a.F = hidden;
  a.w_type = type_of(bits);
  a.table = static_cast<const void* const*>(table.untyped_data());
  return run_kernel("expert_ffn", pool, threads, isa,
                    [&](const KernelTable& kernels, Parallel& parallel) { expert_ffn(a, kernels, parallel); });
}

}  // namespace
}  // namespace specmoe

extern "C" {
XLA_FFI_DEFINE_HANDLER_SYMBOL(specmoe_expert_ffn, specmoe::run,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("threads")
                                  .Attr<std::string_view>("isa"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(specmoe_packed_expert_ffn, specmoe::run_packed,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("bits")
                                  .Attr<int64_t>("hidden")
                                  .Attr<int64_t>("threads")
                                  .Attr<std::string_view>("isa"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(specmoe_expert_ffn_table, specmoe::run_table,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::U32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("bits")
                                  .Attr<int64_t>("hidden")
                                  .Attr<int64_t>("threads")
                                  .Attr<std::string_view>("isa"));
}
