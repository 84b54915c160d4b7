// SPDX-License-Identifier: BSD-3-Clause
// Every operator of the library, once: what it is called, what it takes, what it returns.
// Kernels register themselves for CPU (cpu/*.cpp) and CUDA (cuda/*.cu); the fake (shape) function and
// the derivative of each op stand in masked_loss_ext/ops/<op>.py.
#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/capability.h"

#ifndef MASKED_LOSS_EXT_VERSION
#error "MASKED_LOSS_EXT_VERSION must be defined by the build (masked_loss_ext/_build.py)"
#endif

// Token-wise weighted squared error over what `mask` keeps (formula: masked_squared_error.h).
//   prediction, target  [...]         floating, same shape, any strides; dtypes may differ
//   mask                leading dims  any dtype, on where != 0; None keeps everything
//   edit_mask           leading dims  m in [0, 1]; the weight is fg * m + bg * (1 - m); None: bg
//   weighting           broadcastable to prediction
//   reduction           "mean"        sum / selected elements    -> []
//                       "sum"         sum                        -> []
//                       "batch_mean"  sum / size(0)              -> []
//                       "token_sum"   sum / size(-1)             -> []
//                       "token"       mean over the last dim     -> prediction.shape[:-1]
//                       "none"        per element                -> prediction.shape
// Returns the loss (float32; float64 where prediction or target is) and the int64 count of selected
// elements.
STABLE_TORCH_LIBRARY(masked_loss_ext, m) {
  m.def(
      "masked_squared_error(Tensor prediction, Tensor target, Tensor? mask=None, "
      "Tensor? edit_mask=None, Tensor? weighting=None, float foreground_weight=2.0, "
      "float background_weight=1.0, str reduction=\"mean\") -> (Tensor loss, Tensor count)");
  // Gradients that are not needed come back with no elements. grad_weighting is float32 (float64)
  // and not yet summed over the dimensions along which weighting was broadcast, except that the last
  // one is 1 where weighting's is.
  m.def(
      "_masked_squared_error_backward(Tensor grad_loss, Tensor prediction, Tensor target, "
      "Tensor? mask, Tensor? edit_mask, Tensor? weighting, Tensor count, float foreground_weight, "
      "float background_weight, str reduction, bool needs_prediction, bool needs_target, "
      "bool needs_weighting) -> (Tensor grad_prediction, Tensor grad_target, Tensor "
      "grad_weighting)");
  m.def("_version() -> str");
  m.def("cpu_capability() -> str");
}

static std::string version() { return MASKED_LOSS_EXT_VERSION; }
static std::string cpu_capability() {
  return masked_loss_ext::level_name(masked_loss_ext::cpu_level());
}

STABLE_TORCH_LIBRARY_IMPL(masked_loss_ext, CompositeExplicitAutograd, m) {
  m.impl("_version", TORCH_BOX(&version));
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
}
