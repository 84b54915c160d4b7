// SPDX-License-Identifier: BSD-3-Clause
// Compiled once per instruction-set level, see common/cpu/capability.h.
#include "cross_entropy_terms/cpu/kernels.h"
#include "common/cpu/capability.h"
#include "common/layout.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace masked_loss_ext {
namespace {
#include "cross_entropy_terms/cpu/rows.inc"
}  // namespace

template <>
const TermsKernels& kernels_at<TermsKernels, Level::MASKED_LOSS_EXT_LEVEL>() {
  static constexpr TermsKernels table = {terms_forward, terms_backward};
  return table;
}

}  // namespace masked_loss_ext
