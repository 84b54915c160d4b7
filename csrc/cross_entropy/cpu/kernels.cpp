// SPDX-License-Identifier: BSD-3-Clause
// Compiled once per instruction-set level, see common/cpu/capability.h.
#include "cross_entropy/cpu/kernels.h"
#include "common/cpu/capability.h"
#include "common/layout.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace masked_loss_ext {
namespace {
#include "cross_entropy/cpu/chunks.inc"
}  // namespace

template <>
const CrossEntropyKernels& kernels_at<CrossEntropyKernels, Level::MASKED_LOSS_EXT_LEVEL>() {
  static constexpr CrossEntropyKernels table = {forward, finish, read_slope, backward, count, sweep, scale};
  return table;
}

}  // namespace masked_loss_ext
