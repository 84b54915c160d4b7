// SPDX-License-Identifier: BSD-3-Clause
// Every include stands above the pragma: code that comes from headers keeps the baseline instruction set.
#include "cross_entropy_terms/cpu/kernels.h"
#include "common/layout.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace masked_loss_ext {
namespace {
#include "cross_entropy_terms/cpu/rows.inc"
}  // namespace
extern const TermsKernels terms_default = {terms_forward, terms_backward};
}  // namespace masked_loss_ext
