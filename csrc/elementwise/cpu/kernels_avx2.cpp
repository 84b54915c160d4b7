// SPDX-License-Identifier: BSD-3-Clause
// Headers with functions that other files share stand above the target: these keep the baseline
// instructions. Those of formula.h are this file's own, and inline what is compiled for the target.
#include <math.h>

#include "common/cpu/row_cursor.h"

#if defined(__x86_64__)
#include "common/cpu/target_avx2.inc"

#include "elementwise/cpu/kernels.h"

namespace masked_loss_ext {
namespace {
#include "elementwise/cpu/kernels.inc"
}  // namespace
extern const SquaredErrorKernels squared_error_avx2 = {forward, backward};
}  // namespace masked_loss_ext
#include "common/cpu/target_end.inc"
#endif
