// SPDX-License-Identifier: BSD-3-Clause
// What elementwise/cuda/kernels.cu launches.
#pragma once

#include "common/cuda/host.h"
#include "elementwise/formula.h"

namespace masked_loss_ext::cuda {

// whole_rows: something is written once per row. Two launches: blocks leave partial sums, one block adds them.
void launch_errors(const char* op, const ErrorProblem& problem, bool whole_rows, const Tensor& like, void* loss,
                   int64_t* count);
void launch_error_gradients(const char* op, const ErrorProblem& problem, bool whole_rows, const Tensor& like,
                            const Array& grad_loss, const int64_t* count);

}  // namespace masked_loss_ext::cuda
