// What the FFI handlers of expert feed-forward networks share: rows, their slots and the result.
#pragma once
#include "expert_ffn.h"
#include "handler.h"

namespace specmoe {

inline bool is_float_row(const xla::ffi::AnyBuffer& x) {
  return x.element_type() == xla::ffi::F32 || x.element_type() == xla::ffi::BF16;
}

// x [n, M], slots [n, A], y [n, A, M]; their ranks were checked.
inline void set_rows(FfnArgs& a, const xla::ffi::AnyBuffer& x, const xla::ffi::Buffer<xla::ffi::S32>& slots,
                     xla::ffi::Buffer<xla::ffi::F32>& y) {
  a.n = x.dimensions()[0];
  a.M = x.dimensions()[1];
  a.A = slots.dimensions()[1];
  a.x_type = x.element_type() == xla::ffi::F32 ? DType::kF32 : DType::kBF16;
  a.x = x.untyped_data();
  a.slots = slots.typed_data();
  a.y = y.typed_data();
}

}  // namespace specmoe
