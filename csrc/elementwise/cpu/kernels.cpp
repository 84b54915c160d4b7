// SPDX-License-Identifier: BSD-3-Clause
// Compiled once per instruction-set level, see common/cpu/capability.h.
#include "elementwise/cpu/kernels.h"
#include "common/cpu/capability.h"
#include "common/cpu/row_cursor.h"
#include "elementwise/formula.h"

namespace masked_loss_ext {
namespace {
#include "elementwise/cpu/kernels.inc"
}  // namespace

template <>
const SquaredErrorKernels& kernels_at<SquaredErrorKernels, Level::MASKED_LOSS_EXT_LEVEL>() {
  static constexpr SquaredErrorKernels table = {forward, backward};
  return table;
}

}  // namespace masked_loss_ext
