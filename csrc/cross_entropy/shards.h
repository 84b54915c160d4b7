// SPDX-License-Identifier: BSD-3-Clause
// What shards of a vocabulary tell each other of their rows, for CPU and CUDA: one message a shard, of
// float64 numbers, [rows, numbers_of()] and who it is from. Merged in the order of the shards, it is all that the
// results of a row are made of (RowPart).
#pragma once

#include <string.h>

#include "cross_entropy/formula.h"

namespace masked_loss_ext {

// Which numbers of a row are sent.
struct ShardFormat {
  bool statistics = false, smoothing = false;
};

// highest, label, ties, sum; distance, argmax; weighted, weights
MASKED_LOSS_EXT_INLINE int64_t numbers_of(ShardFormat format) {
  return 4 + 2 * format.statistics + 2 * format.smoothing;
}

// Who a message is from: its columns, and what must be the same for all.
struct ShardHeader {
  double first, columns;
  double classes, keywords, temperature, normalizer;
};

constexpr int64_t kHeaderNumbers = sizeof(ShardHeader) / sizeof(double);

MASKED_LOSS_EXT_INLINE void pack(ShardFormat format, const RowPart& part, double* out) {
  *out++ = part.highest;
  *out++ = part.label;
  *out++ = part.sums.ties;
  *out++ = part.sums.sum;
  if (format.statistics) {
    *out++ = part.sums.distance;
    memcpy(out++, &part.argmax, sizeof(int64_t));  // its bits: that of a NaN is no number of 53
  }
  if (format.smoothing) {
    *out++ = part.sums.weighted;
    *out++ = part.weights;
  }
}

// scale: of the row.
MASKED_LOSS_EXT_INLINE RowPart unpack(ShardFormat format, const double* in, double scale) {
  RowPart part;
  part.highest = *in++;
  part.label = *in++;
  part.sums.max = part.highest * scale;
  part.sums.ties = *in++;
  part.sums.sum = *in++;
  if (format.statistics) {
    part.sums.distance = *in++;
    memcpy(&part.argmax, in++, sizeof(int64_t));
  }
  if (format.smoothing) {
    part.sums.weighted = *in++;
    part.weights = *in++;
  }
  return part;
}

// The messages of all shards.
struct Shards {
  ShardFormat format;
  const double* messages = nullptr;  // [count, stride]
  int64_t count = 0, rows = 0;
};

MASKED_LOSS_EXT_INLINE int64_t stride_of(const Shards& s) {
  return s.rows * numbers_of(s.format) + kHeaderNumbers;
}

MASKED_LOSS_EXT_INLINE const double* row_of(const Shards& s, int64_t shard, int64_t row) {
  return s.messages + shard * stride_of(s) + row * numbers_of(s.format);
}

MASKED_LOSS_EXT_INLINE ShardHeader header_of(const Shards& s, int64_t shard) {
  ShardHeader h;
  memcpy(&h, row_of(s, shard, s.rows), sizeof h);
  return h;
}

MASKED_LOSS_EXT_INLINE bool same_call(const ShardHeader& a, const ShardHeader& b) {
  return a.classes == b.classes && a.keywords == b.keywords && a.temperature == b.temperature &&
         a.normalizer == b.normalizer;
}

// The first that does not begin where those before it end, or was called otherwise than the first; `count`
// where they do not add up to all classes; -1 for none.
MASKED_LOSS_EXT_INLINE int64_t first_misfit(const Shards& shards) {
  double end = 0;
  for (int64_t i = 0; i < shards.count; ++i) {
    const ShardHeader h = header_of(shards, i);
    if (h.first != end || !same_call(h, header_of(shards, 0))) return i;
    end += h.columns;
  }
  return end == header_of(shards, 0).classes ? -1 : shards.count;
}

}  // namespace masked_loss_ext
