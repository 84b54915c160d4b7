// SPDX-License-Identifier: BSD-3-Clause
#include "common/cpu/row_cursor.h"
#include "elementwise/cpu/kernels.h"

namespace masked_loss_ext {
namespace {
#include "elementwise/cpu/kernels.inc"
}  // namespace
extern const SquaredErrorKernels squared_error_default = {forward, backward};
}  // namespace masked_loss_ext
