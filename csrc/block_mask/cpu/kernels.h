// SPDX-License-Identifier: BSD-3-Clause
// The loops of the block-mask operators on CPU.
#pragma once

#include "block_mask/formula.h"
#include "block_mask/call.h"

namespace masked_loss_ext {

// Writes the intervals of rows [begin, end).
void fill_packed_rows(const PackedRows& p, int64_t begin, int64_t end);

// The eight lists; `q` is null where the transposes are not wanted. With `packed`, the intervals that
// `in` reads are written first, each just before it is read.
void fill_block_lists(const IntervalRows& in, const BlockGrid& grid, const ListPointers& kv,
                      const ListPointers* q, const PackedRows* packed);

}  // namespace masked_loss_ext
