// SPDX-License-Identifier: BSD-3-Clause
// All other includes stand above the target: code of headers keeps the baseline instructions.
#include "elementwise/cpu/kernels.h"
#include "common/cpu/row_cursor.h"
#include "elementwise/formula.h"

#if defined(__x86_64__)
#include "common/cpu/target_avx512.inc"

namespace masked_loss_ext {
namespace {
#include "elementwise/cpu/kernels.inc"
}  // namespace
extern const SquaredErrorKernels squared_error_avx512 = {forward, backward};
}  // namespace masked_loss_ext
#include "common/cpu/target_end.inc"
#endif
