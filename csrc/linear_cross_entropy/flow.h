// SPDX-License-Identifier: BSD-3-Clause
// Into which rows of the backward anything flows, for CPU and CUDA.
#pragma once

#include "cross_entropy/formula.h"

namespace masked_loss_ext {

// What a row's upstream gradients come to: of nothing there is no gradient.
template <class A>
MASKED_LOSS_EXT_INLINE bool receives(const RowProblem& q, int64_t row) {
  const int64_t of_loss = q.reduction == RowReduction::kNone ? row : 0;
  return entry<A>(q.grad_loss, of_loss) != 0 || entry<A>(q.grad_lse, row) != 0 ||
         entry<A>(q.grad_entropy, row) != 0 || entry<A>(q.grad_log_prob, row) != 0;
}

}  // namespace masked_loss_ext
