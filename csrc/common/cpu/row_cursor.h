// SPDX-License-Identifier: BSD-3-Clause
// Walks the rows of a Layout: where each operand's row begins, without a division per row.
#pragma once

#include "common/cpu/convert.h"
#include "common/layout.h"

namespace masked_loss_ext {

struct RowCursor {
  int64_t index[kMaxOuter];
  int64_t offset[kOperands];
};

MASKED_LOSS_EXT_INLINE void seek(RowCursor& cursor, const Layout& layout, int64_t row) {
  for (int o = 0; o < kOperands; ++o) cursor.offset[o] = 0;
  for (int d = layout.outer - 1; d >= 0; --d) {
    cursor.index[d] = row % layout.outer_size[d];
    row /= layout.outer_size[d];
    for (int o = 0; o < kOperands; ++o) {
      cursor.offset[o] += cursor.index[d] * layout.outer_stride[d][o];
    }
  }
}

MASKED_LOSS_EXT_INLINE void next(RowCursor& cursor, const Layout& layout) {
  for (int d = layout.outer - 1; d >= 0; --d) {
    for (int o = 0; o < kOperands; ++o) cursor.offset[o] += layout.outer_stride[d][o];
    if (++cursor.index[d] < layout.outer_size[d]) return;
    cursor.index[d] = 0;
    for (int o = 0; o < kOperands; ++o) {
      cursor.offset[o] -= layout.outer_size[d] * layout.outer_stride[d][o];
    }
  }
}

}  // namespace masked_loss_ext
