// SPDX-License-Identifier: BSD-3-Clause
// All other includes stand above the target: code of headers keeps the baseline instructions.
#include "cpu/cross_entropy_terms_cpu.h"
#include "layout.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#if defined(__x86_64__)
#include "cpu/target_avx2.inc"

namespace masked_loss_ext {
namespace {
#include "cpu/cross_entropy_terms_backward.inc"
}  // namespace
extern const TermsKernels terms_avx2 = {forward, backward};
}  // namespace masked_loss_ext
#include "cpu/target_end.inc"
#endif
