// SPDX-License-Identifier: BSD-3-Clause
// Single numbers of tensors in host memory.
#pragma once

#include "common/cpu/convert.h"
#include "common/layout_builder.h"

namespace masked_loss_ext {

// Entry i of an array of any kind.
template <class Number>
Number read_entry(const Array& array, int64_t i) {
  Number value = 0;
  with_type(array, i, [&](const auto* p) { value = static_cast<Number>(widen(*p)); });
  return value;
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
