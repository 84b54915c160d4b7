// SPDX-License-Identifier: BSD-3-Clause
// What cross_entropy_terms/cuda/kernels.cu launches.
#pragma once

#include "common/cuda/host.h"
#include "cross_entropy_terms/formula.h"

namespace masked_loss_ext::cuda {

// One launch; a second where a row has several parts, and where there are links, whose walk by one thread
// would hold its block.
void launch_terms(const char* op, const RowProblem& rows, const TermRows& terms, const Tensor& logits);
// Two launches, three where there are links.
void launch_term_gradients(const char* op, const RowProblem& rows, const TermRows& terms,
                           const Tensor& logits);

}  // namespace masked_loss_ext::cuda
