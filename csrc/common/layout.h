// SPDX-License-Identifier: BSD-3-Clause
// One loop nest for any strides: the dimensions of prediction, with a stride per operand (0 where an
// operand is broadcast), merged as far as all operands allow. The last one is the "column" loop, the
// others enumerate rows. Plain data, no PyTorch header: kernels take it as it is.
#pragma once

#include "common/array.h"

namespace masked_loss_ext {

enum Operand : int {
  kPrediction, kTarget, kMask, kEditMask, kWeighting,
  kLoss,           // per-token or per-element loss (forward), its gradient (backward)
  kGrad,           // grad_prediction and grad_target, both contiguous
  kGradWeighting,
  kOperands
};

constexpr int kMaxOuter = 8;  // row dimensions after merging

struct Layout {
  int outer = 0;              // slowest first
  int64_t outer_size[kMaxOuter] = {};
  int64_t outer_stride[kMaxOuter][kOperands] = {};
  int64_t rows = 1, cols = 1;
  int64_t col_stride[kOperands] = {};
};

// Offset of an operand's element `index`, counted over rows and columns in order.
MASKED_LOSS_EXT_INLINE int64_t offset_at(const Layout& layout, Operand operand, int64_t index) {
  if (layout.outer == 0) return index * layout.col_stride[operand];
  int64_t row = index / layout.cols;
  int64_t offset = (index - row * layout.cols) * layout.col_stride[operand];
  for (int d = layout.outer - 1; d >= 0; --d) {
    const int64_t quotient = d > 0 ? row / layout.outer_size[d] : 0;
    offset += (row - quotient * layout.outer_size[d]) * layout.outer_stride[d][operand];
    row = quotient;
  }
  return offset;
}

}  // namespace masked_loss_ext
