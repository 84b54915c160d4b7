// SPDX-License-Identifier: BSD-3-Clause
// Every include stands above the pragma: code that comes from headers keeps the baseline instruction set.
#include "cpu/masked_squared_error_cpu.h"
#include "cpu/row_cursor.h"
#include "masked_squared_error.h"

#if defined(__x86_64__)
#pragma GCC target("avx2,fma,bmi2")

namespace masked_loss_ext {
namespace {
#include "cpu/masked_squared_error.inc"
}  // namespace
extern const SquaredErrorKernels squared_error_avx2 = {forward, backward};
}  // namespace masked_loss_ext
#endif
