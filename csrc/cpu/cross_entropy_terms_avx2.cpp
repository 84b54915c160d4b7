// SPDX-License-Identifier: BSD-3-Clause
// Every include stands above the pragma: code that comes from headers keeps the baseline instruction set.
#include "cpu/cross_entropy_terms_cpu.h"
#include "layout.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#if defined(__x86_64__)
#pragma GCC target("avx2,fma,bmi2")

namespace masked_loss_ext {
namespace {
#include "cpu/cross_entropy_terms_backward.inc"
}  // namespace
extern const TermsKernels terms_avx2 = {forward, backward};
}  // namespace masked_loss_ext
#endif
