// SPDX-License-Identifier: BSD-3-Clause
// What block_mask/cuda/kernels.cu launches.
#pragma once

#include "block_mask/formula.h"
#include "common/cuda/host.h"

namespace masked_loss_ext::cuda {

void launch_packed_rows(const char* op, const PackedRows& p, const Tensor& like);
// Two launches: classes (and with `packed` the rows that they are of), then all lists.
void launch_block_lists(const char* op, const IntervalRows& in, const BlockGrid& grid, const ListPointers& kv,
                        const ListPointers* q, const PackedRows* packed, const Tensor& like);

}  // namespace masked_loss_ext::cuda
