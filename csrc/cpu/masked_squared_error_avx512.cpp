// SPDX-License-Identifier: BSD-3-Clause
// All other includes stand above the target: code of headers keeps the baseline instructions.
#include "cpu/masked_squared_error_cpu.h"
#include "cpu/row_cursor.h"
#include "masked_squared_error.h"

#if defined(__x86_64__)
#include "cpu/target_avx512.inc"

namespace masked_loss_ext {
namespace {
#include "cpu/masked_squared_error.inc"
}  // namespace
extern const SquaredErrorKernels squared_error_avx512 = {forward, backward};
}  // namespace masked_loss_ext
#include "cpu/target_end.inc"
#endif
