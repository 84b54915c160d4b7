// SPDX-License-Identifier: BSD-3-Clause
// Single numbers of tensors in host memory.
#pragma once

#include "common/cpu/convert.h"
#include "common/layout_builder.h"

namespace masked_loss_ext {

// Entry i of an array of any kind.
template <class Number>
Number read_entry(const Array& array, int64_t i) {
  switch (array.kind) {
    case Kind::kFloat: return Number(static_cast<const float*>(array.data)[i]);
    case Kind::kDouble: return Number(static_cast<const double*>(array.data)[i]);
    case Kind::kHalf: return Number(widen(static_cast<const Half*>(array.data)[i]));
    case Kind::kBFloat16: return Number(widen(static_cast<const BFloat16*>(array.data)[i]));
    case Kind::kUInt8: return Number(static_cast<const uint8_t*>(array.data)[i]);
    case Kind::kInt8: return Number(static_cast<const int8_t*>(array.data)[i]);
    case Kind::kInt16: return Number(static_cast<const int16_t*>(array.data)[i]);
    case Kind::kInt32: return Number(static_cast<const int32_t*>(array.data)[i]);
    default: return Number(static_cast<const int64_t*>(array.data)[i]);
  }
}

inline int64_t read_integer(const Array& array, int64_t i) { return read_entry<int64_t>(array, i); }
inline double read_number(const Tensor& tensor) { return read_entry<double>(array_of(tensor), 0); }

// `tensor` is float32 or float64.
inline void write_number(Tensor& tensor, double value) {
  if (tensor.scalar_type() == ScalarType::Double) {
    *static_cast<double*>(tensor.mutable_data_ptr()) = value;
  } else {
    *static_cast<float*>(tensor.mutable_data_ptr()) = static_cast<float>(value);
  }
}

}  // namespace masked_loss_ext
