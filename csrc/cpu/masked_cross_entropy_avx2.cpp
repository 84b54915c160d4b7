// SPDX-License-Identifier: BSD-3-Clause
// All other includes stand above the target: code of headers keeps the baseline instructions.
#include "cpu/masked_cross_entropy_cpu.h"
#include "layout.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#if defined(__x86_64__)
#include "cpu/target_avx2.inc"

namespace masked_loss_ext {
namespace {
#include "cpu/masked_cross_entropy_both.inc"
}  // namespace
extern const CrossEntropyKernels cross_entropy_avx2 = {forward, finish, read_slope, backward,
                                                       count,   both, scale};
}  // namespace masked_loss_ext
#include "cpu/target_end.inc"
#endif
