// SPDX-License-Identifier: BSD-3-Clause
// Every include stands above the pragma: code that comes from headers keeps the baseline instruction set.
#include "elementwise/cpu/kernels.h"
#include "common/cpu/row_cursor.h"
#include "elementwise/formula.h"

namespace masked_loss_ext {
namespace {
#include "elementwise/cpu/kernels.inc"
}  // namespace
extern const SquaredErrorKernels squared_error_default = {forward, backward};
}  // namespace masked_loss_ext
