// SPDX-License-Identifier: BSD-3-Clause
// One loop nest for any strides: the dimensions of prediction, with a stride per operand (0 where an
// operand is broadcast), merged as far as all operands allow. The last one is the "column" loop, the
// others enumerate rows. Plain data, no PyTorch header: kernels take it as it is.
#pragma once

#include <cstdint>

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

}  // namespace masked_loss_ext
