// SPDX-License-Identifier: BSD-3-Clause
// One level for every machine.
#include "common/cpu/capability.h"
#include "cross_entropy/cpu/kernels.h"
#include "cross_entropy_terms/cpu/kernels.h"
#include "elementwise/cpu/kernels.h"

namespace masked_loss_ext {

#define ONE_LEVEL(Kernels)                                                                         \
  template <> const Kernels& kernels_at<Kernels, Level::kDefault>();                               \
  template <> const Kernels& kernels_at<Kernels, Level::kAvx2>() {                                 \
    return kernels_at<Kernels, Level::kDefault>();                                                 \
  }                                                                                                \
  template <> const Kernels& kernels_at<Kernels, Level::kAvx512>() {                               \
    return kernels_at<Kernels, Level::kDefault>();                                                 \
  }
ONE_LEVEL(SquaredErrorKernels)
ONE_LEVEL(CrossEntropyKernels)
ONE_LEVEL(TermsKernels)
#undef ONE_LEVEL

}  // namespace masked_loss_ext
