// SPDX-License-Identifier: BSD-3-Clause
// Every include stands above the pragma: code that comes from headers keeps the baseline instruction set.
#include "cross_entropy/cpu/kernels.h"
#include "common/layout.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace masked_loss_ext {
namespace {
#include "cross_entropy/cpu/rows.inc"
}  // namespace
extern const CrossEntropyKernels cross_entropy_default = {forward, finish, read_slope, backward,
                                                          count, sweep, scale};
}  // namespace masked_loss_ext
