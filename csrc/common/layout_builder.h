// SPDX-License-Identifier: BSD-3-Clause
// From tensors to the plain data of common/array.h and common/layout.h. Host only.
#pragma once

#include <optional>
#include <vector>

#include "common/array.h"
#include "common/checks.h"
#include "common/layout.h"

namespace masked_loss_ext {

constexpr int kTorchDims = 64;  // what PyTorch allows

inline Kind kind_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double: return Kind::kDouble;
    case ScalarType::Half: return Kind::kHalf;
    case ScalarType::BFloat16: return Kind::kBFloat16;
    case ScalarType::Bool:
    case ScalarType::Byte: return Kind::kUInt8;
    case ScalarType::Char: return Kind::kInt8;
    case ScalarType::Short: return Kind::kInt16;
    case ScalarType::Int: return Kind::kInt32;
    case ScalarType::Long: return Kind::kInt64;
    default: return Kind::kFloat;
  }
}

inline Array array_of(const Tensor& tensor) {
  return {const_cast<void*>(tensor.const_data_ptr()), kind_of(tensor)};
}

inline Array array_of(const std::optional<Tensor>& tensor) {
  return tensor ? array_of(*tensor) : Array{};
}

// Collects strides, then merges.
class LayoutBuilder {
 public:
  static constexpr int kMostMerged = kMaxOuter + 1;  // dimensions that a layout holds

  explicit LayoutBuilder(const Tensor& prediction) : dims_(static_cast<int>(prediction.dim())) {
    for (int d = 0; d < dims_; ++d) size_[d] = prediction.size(d);
  }

  explicit LayoutBuilder(const std::vector<int64_t>& sizes) : dims_(static_cast<int>(sizes.size())) {
    for (int d = 0; d < dims_; ++d) size_[d] = sizes[d];
  }

  // The tensor's dimension i is dimension i + first of the nest; size-1 dimensions broadcast, and
  // dimensions beyond the nest are left out.
  void add(Operand operand, const Tensor& tensor, int first = 0) {
    if (tensor.numel() == 0) return;  // its strides may be anything, and nobody follows them
    for (int d = 0; d < tensor.dim() && d + first < dims_; ++d) {
      stride_[d + first][operand] = tensor.size(d) == 1 ? 0 : tensor.stride(d);
    }
  }

  Layout build(const char* op) const {
    Layout layout;
    const int kept = merge(layout);
    if (kept > kMostMerged) {
      fail(op, ": prediction must merge into at most ", kMostMerged,
           " dimensions with these strides, got ", kept);
    }
    return layout;
  }

  // How many dimensions are left after merging. `layout` is filled where it can hold them.
  int merge(Layout& layout) const {
    int keep[kTorchDims], kept = 0;
    int64_t size[kTorchDims];
    for (int d = 0; d < dims_; ++d) {
      if (size_[d] == 1) continue;
      if (kept > 0 && mergeable(keep[kept - 1], d)) {
        size[kept - 1] *= size_[d];
        keep[kept - 1] = d;
      } else {
        size[kept] = size_[d];
        keep[kept++] = d;
      }
    }
    if (kept > 0 && kept <= kMostMerged) fill(layout, keep, size, kept);
    return kept;
  }

 private:
  // Walking dimension d and then `outer` is one walk along d, for every operand.
  bool mergeable(int outer, int d) const {
    for (int o = 0; o < kOperands; ++o) {
      if (stride_[outer][o] != stride_[d][o] * size_[d]) return false;
    }
    return true;
  }

  void fill(Layout& layout, const int* keep, const int64_t* size, int kept) const {
    layout.outer = kept - 1;
    for (int i = 0; i < kept - 1; ++i) {
      layout.outer_size[i] = size[i];
      layout.rows *= size[i];
      for (int o = 0; o < kOperands; ++o) layout.outer_stride[i][o] = stride_[keep[i]][o];
    }
    layout.cols = size[kept - 1];
    for (int o = 0; o < kOperands; ++o) layout.col_stride[o] = stride_[keep[kept - 1]][o];
  }

  int dims_;
  int64_t size_[kTorchDims] = {};
  int64_t stride_[kTorchDims][kOperands] = {};
};

}  // namespace masked_loss_ext
