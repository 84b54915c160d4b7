// SPDX-License-Identifier: BSD-3-Clause
// Every include stands above the pragma: code that comes from headers keeps the baseline instruction set.
#include "cpu/masked_squared_error_cpu.h"
#include "cpu/row_cursor.h"
#include "masked_squared_error.h"

namespace masked_loss_ext {
namespace {
#include "cpu/masked_squared_error.inc"
}  // namespace
extern const SquaredErrorKernels squared_error_default = {forward, backward};
}  // namespace masked_loss_ext
