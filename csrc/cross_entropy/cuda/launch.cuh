// SPDX-License-Identifier: BSD-3-Clause
// Host side that all kernels over rows share: their parameters, how rows are cut into parts, and the dtypes.
// Nothing here depends on the GPU, so neither do the results.
#pragma once

#include <algorithm>

#include "common/cuda/launch.cuh"
#include "common/errors.h"
#include "cross_entropy/cuda/items.cuh"

namespace masked_loss_ext::cuda {

constexpr int64_t kPackBytes = 16;
constexpr int64_t kPacksPerLane = 4;       // of a short row
constexpr int64_t kLanesMaxPacks = 256;    // 4 KB: beyond, a block per part
constexpr int64_t kSmallBlockMaxPacks = 512;
constexpr int kSmallBlock = 128;
constexpr int64_t kEnoughBlocks = 2048;    // rows are cut into parts up to that many
constexpr int64_t kPacksPerPart = 1024;    // 16 KB: what such a part holds at the least
constexpr int64_t kMaxPartsToMerge = 32;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Grid {
  unsigned blocks, threads;
};

inline int64_t pack_elements(const CrossEntropyParams& q) { return kPackBytes / size_of(q.logits.kind); }

// max_packs: of a part, 0 for any number.
inline void cut(CrossEntropyParams& q, int64_t max_packs) {
  // A shard may have no column: its rows are there all the same.
  const int64_t columns = std::max<int64_t>(q.counted.columns, 1), packs = ceil_div(columns, pack_elements(q));
  const int64_t few_rows = std::min({ceil_div(kEnoughBlocks, std::max<int64_t>(q.counted.rows, 1)),
                                     ceil_div(packs, kPacksPerPart), kMaxPartsToMerge});
  const int64_t parts = std::max(few_rows, max_packs > 0 ? ceil_div(packs, max_packs) : 1);
  q.packs_per_part = ceil_div(packs, parts);
  q.parts = ceil_div(packs, q.packs_per_part);
  if (q.packs_per_part > kLanesMaxPacks || q.parts > 1) {
    q.team = q.packs_per_part > kSmallBlockMaxPacks ? kThreads : kSmallBlock;
    return;
  }
  const int64_t wanted =
      std::min(std::max(ceil_div(packs, kPacksPerLane), std::min<int64_t>(columns, 8)),
               int64_t{kWarpSize});
  q.team = 1;
  while (q.team < wanted) q.team *= 2;
}

inline Grid grid_of(const char* op, const CrossEntropyParams& q) {
  const unsigned threads = q.team > kWarpSize ? static_cast<unsigned>(q.team) : kThreads;
  const int64_t blocks = ceil_div(q.counted.rows * q.parts, threads / static_cast<unsigned>(q.team));
  if (blocks > 0x7fffffff) fail(op, ": logits must have fewer rows, got ", q.counted.rows);
  return {static_cast<unsigned>(blocks), threads};
}

// A thread per row.
inline Grid row_grid(const char* op, int64_t rows) {
  const int64_t blocks = std::max<int64_t>(ceil_div(rows, kThreads), 1);
  if (blocks > 0x7fffffff) fail(op, ": logits must have fewer rows, got ", rows);
  return {static_cast<unsigned>(blocks), kThreads};
}

// max_packs as in cut().
inline CrossEntropyParams params_of(const RowProblem& rows, int64_t max_packs) {
  CrossEntropyParams q;
  static_cast<RowProblem&>(q) = rows;
  cut(q, max_packs);
  return q;
}

// Calls f with a value of the logits' dtype.
template <class F>
void with_logits_type(const CrossEntropyParams& q, F f) {
  switch (q.logits.kind) {
    case Kind::kDouble: return f(double{});
    case Kind::kHalf: return f(c10::Half{});
    case Kind::kBFloat16: return f(c10::BFloat16{});
    default: return f(float{});
  }
}

}  // namespace masked_loss_ext::cuda
