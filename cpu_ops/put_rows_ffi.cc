// XLA FFI face of a copy into some rows of an array that stays where it is: a cache, of which XLA would make a copy in bfloat16.
#include <cstring>

#include "handler.h"

namespace ffi = xla::ffi;

namespace specmoe {
namespace {

using Places = ffi::Buffer<ffi::S32, 1>;  // a name without a comma, for the macro

constexpr int64_t kTaskBytes = 1 << 18;

// out: the array itself, whose rows are `out_rows` times `row_bytes`.
void put_rows(char* out, int64_t out_rows, int64_t row_bytes, const char* rows, const int32_t* at, int64_t count, Parallel& parallel) {
  const int64_t pieces = std::max<int64_t>(1, row_bytes / kTaskBytes);  // of a row
  const int64_t together = std::max<int64_t>(1, kTaskBytes / std::max<int64_t>(1, row_bytes));  // rows of a task
  auto copy = [&](int64_t task) {
    const int64_t first = task / pieces * together, last = std::min(count, first + together), piece = task % pieces;
    const int64_t begin = row_bytes * piece / pieces, end = row_bytes * (piece + 1) / pieces;
    for (int64_t i = first; i < last; ++i) {
      if (at[i] < 0 || at[i] >= out_rows) continue;
      std::memcpy(out + at[i] * row_bytes + begin, rows + i * row_bytes + begin, end - begin);
    }
  };
  parallel.for_each((count + together - 1) / together * pieces, copy);
}

ffi::Error run(ffi::ThreadPool pool, ffi::AnyBuffer array, ffi::AnyBuffer rows, Places at, ffi::Result<ffi::AnyBuffer> out,
               int64_t threads, std::string_view isa) {
  const char* name = "put_rows";
  const auto held = array.dimensions(), given = rows.dimensions();
  if (held.size() == 0 || held.size() != given.size() || rows.element_type() != array.element_type() ||
      !std::equal(held.begin() + 1, held.end(), given.begin() + 1) || given[0] != at.dimensions()[0]) {
    return wrong_argument(name, "array [N, ...] and rows [n, ...] of one type, at [n] int32");
  }
  if (out->untyped_data() != array.untyped_data()) return wrong_argument(name, "the result must be the array's own memory");
  if (array.element_count() == 0 || rows.element_count() == 0) return ffi::Error::Success();
  const int64_t row_bytes = static_cast<int64_t>(array.size_bytes()) / held[0];
  return run_kernel(name, pool, threads, isa, [&](const KernelTable&, Parallel& parallel) {
    put_rows(static_cast<char*>(out->untyped_data()), held[0], row_bytes, static_cast<const char*>(rows.untyped_data()), at.typed_data(),
             given[0], parallel);
  });
}

}  // namespace
}  // namespace specmoe

extern "C" {
XLA_FFI_DEFINE_HANDLER_SYMBOL(specmoe_put_rows, specmoe::run,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<specmoe::Places>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("threads")
                                  .Attr<std::string_view>("isa"));
}
