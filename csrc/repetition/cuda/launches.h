// SPDX-License-Identifier: BSD-3-Clause
// What repetition/cuda/kernels.cu launches.
#pragma once

#include "common/cuda/host.h"
#include "repetition/formula.h"

namespace masked_loss_ext::cuda {

void launch_counts(const char* op, const TokenRows& in, const CountPointers& out, const Tensor& tokens);
void launch_links(const char* op, const TokenRows& in, const LinkPointers& out, const Tensor& tokens);

}  // namespace masked_loss_ext::cuda
