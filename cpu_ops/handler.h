// What all FFI handlers share.
#pragma once
#include <algorithm>
#include <exception>
#include <new>
#include <string>
#include <string_view>

#include "helper_threads.h"
#include "isa.h"
#include "xla/ffi/api/ffi.h"

namespace specmoe {

inline xla::ffi::Error wrong_argument(const char* op, std::string_view what) {
  return xla::ffi::Error::InvalidArgument(std::string(op) + ": " + std::string(what));
}

// Runs `kernel(table, parallel)` on the instruction set of that name, on `threads` threads; 0: as many as XLA's pool has. XLA calls handlers through C: no exception may leave them.
template <typename Kernel>
xla::ffi::Error run_kernel(const char* op, xla::ffi::ThreadPool& pool, int64_t threads, std::string_view isa, const Kernel& kernel) {
  const KernelTable* table = isa_table(isa);
  if (table == nullptr) return wrong_argument(op, "this machine or build has no kernels named " + std::string(isa));
  try {
    const int64_t have = pool.num_threads();
    HelpedParallel parallel(threads > 0 ? std::min(threads, have) : have);
    kernel(*table, parallel);
    return xla::ffi::Error::Success();
  } catch (const std::bad_alloc&) {
    return xla::ffi::Error(xla::ffi::ErrorCode::kResourceExhausted, std::string(op) + ": out of host memory");
  } catch (const std::exception& e) {
    return xla::ffi::Error::Internal(std::string(op) + ": " + e.what());
  } catch (...) {
    return xla::ffi::Error::Internal(std::string(op) + ": unknown exception");
  }
}

}  // namespace specmoe
