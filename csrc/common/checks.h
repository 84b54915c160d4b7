// SPDX-License-Identifier: BSD-3-Clause
// What operators refuse, in the words of common/errors.h.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <string>
#include <type_traits>

#include "common/errors.h"

namespace masked_loss_ext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// NaN lies in no range.
template <class Number>
void check_range(const char* op, const char* name, Number value, std::common_type_t<Number> least,
                 std::common_type_t<Number> most) {
  if (value >= least && value <= most) return;
  fail(op, ": ", name, " must be in [", least, ", ", most, "], got ", value);
}

inline void check_finite(const char* op, const char* name, double value, bool may_be_negative = true) {
  if (std::isfinite(value) && (may_be_negative || value >= 0)) return;
  fail(op, ": ", name, " must be finite", may_be_negative ? "" : " and not negative", ", got ", value);
}

// For sizes, lengths, indices and windows, so that sums of a few of them cannot overflow.
constexpr int64_t kLargestLength = int64_t{1} << 48;

inline void check_length(const char* op, const char* name, int64_t value, int64_t least = 0,
                         int64_t most = kLargestLength) {
  check_range(op, name, value, least, most);
}

inline std::string shape_text(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    text += (d ? ", " : "") + std::to_string(tensor.size(d));
  }
  return text + "]";
}

inline bool is_floating(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
         type == ScalarType::BFloat16;
}

// PyTorch's headers refuse a dtype that their stable ABI does not list with a path of this build.
inline ScalarType type_of(const char* op, const char* name, const Tensor& tensor) {
  if (!tensor.defined()) fail(op, ": ", name, " must be a tensor, got None");
  try {
    return tensor.scalar_type();
  } catch (const std::exception&) {
    fail(op, ": ", name, " must be of a dtype that PyTorch computes with, got another");
  }
}

inline void check_floating(const char* op, const char* name, const Tensor& tensor) {
  const ScalarType type = type_of(op, name, tensor);
  if (is_floating(type)) return;
  fail(op, ": ", name, " must be float16, bfloat16, float32 or float64, got ",
       torch::headeronly::toString(type));
}

// bool, integer or floating: what a mask may be made of.
inline void check_mask_type(const char* op, const char* name, const Tensor& tensor) {
  const ScalarType type = type_of(op, name, tensor);
  switch (type) {
    case ScalarType::Bool: case ScalarType::Byte: case ScalarType::Char: case ScalarType::Short:
    case ScalarType::Int: case ScalarType::Long: return;
    default:
      if (is_floating(type)) return;
      fail(op, ": ", name, " must be bool, integer or floating, got ",
           torch::headeronly::toString(type));
  }
}

inline void check_same_device(const char* op, const char* name, const Tensor& tensor,
                              const Tensor& like, const char* like_name = "prediction") {
  const auto device = tensor.device(), expected = like.device();
  if (device.type() == expected.type() && device.index() == expected.index()) return;
  fail(op, ": ", name, " must be on the device of ", like_name, " (they differ in type or index)");
}

// Whether the sizes of `tensor` are those of `like` from dimension `first` on, or 1 where that stands for any.
inline bool sizes_fit(const Tensor& tensor, const Tensor& like, int64_t first = 0, bool one_is_any = false) {
  bool fit = first >= 0 && tensor.dim() + first <= like.dim();
  for (int64_t d = 0; fit && d < tensor.dim(); ++d) {
    fit = tensor.size(d) == like.size(d + first) || (one_is_any && tensor.size(d) == 1);
  }
  return fit;
}

inline void check_same_shape(const char* op, const char* name, const Tensor& tensor,
                             const Tensor& like, const char* like_name = "prediction") {
  if (tensor.dim() == like.dim() && sizes_fit(tensor, like)) return;
  fail(op, ": ", name, " must have the shape of ", like_name, " ", shape_text(like), ", got ",
       shape_text(tensor));
}

inline void check_integer(const char* op, const char* name, const Tensor& tensor, const char* why) {
  const ScalarType type = type_of(op, name, tensor);
  switch (type) {
    case ScalarType::Byte: case ScalarType::Char: case ScalarType::Short: case ScalarType::Int:
    case ScalarType::Long: return;
    default: fail(op, ": ", name, " must be uint8, int8, int16, int32 or int64", why, ", got ",
                  torch::headeronly::toString(type));
  }
}

inline void check_leading_shape(const char* op, const char* name, const Tensor& tensor,
                                const Tensor& prediction, bool one_is_any = false) {
  if (sizes_fit(tensor, prediction, 0, one_is_any)) return;
  fail(op, ": ", name, " must have the leading dimensions of prediction ", shape_text(prediction),
       ", got ", shape_text(tensor), one_is_any ? " (a size of 1 stands for any)" : "");
}

inline void check_leading_broadcastable(const char* op, const char* name, const Tensor& tensor,
                                        const Tensor& prediction) {
  check_leading_shape(op, name, tensor, prediction, true);
}

inline void check_broadcastable(const char* op, const char* name, const Tensor& tensor,
                                const Tensor& prediction) {
  if (sizes_fit(tensor, prediction, prediction.dim() - tensor.dim(), true)) return;
  fail(op, ": ", name, " must be broadcastable to prediction ", shape_text(prediction), ", got ",
       shape_text(tensor));
}

}  // namespace masked_loss_ext
