// SPDX-License-Identifier: BSD-3-Clause
// All other includes stand above the target: code of headers keeps the baseline instructions.
#include "cross_entropy/cpu/kernels.h"
#include "common/layout.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#if defined(__x86_64__)
#include "common/cpu/target_avx512.inc"

namespace masked_loss_ext {
namespace {
#include "cross_entropy/cpu/rows.inc"
}  // namespace
extern const CrossEntropyKernels cross_entropy_avx512 = {forward, finish, read_slope, backward,
                                                         count, sweep, scale};
}  // namespace masked_loss_ext
#include "common/cpu/target_end.inc"
#endif
