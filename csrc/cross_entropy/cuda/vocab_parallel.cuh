// SPDX-License-Identifier: BSD-3-Clause
// A shard of the vocabulary on CUDA: what its rows come to, into the message, and the results of the rows of
// which all shards have told.
#pragma once

#include "cross_entropy/cuda/sums.cuh"
#include "cross_entropy/shards.h"

namespace masked_loss_ext::cuda {

// Each row at its place; of one that does not count 0. A thread per row. block: kThreads.
static __global__ void __launch_bounds__(kThreads, kBlocksAtLeast)
    cross_entropy_pack_kernel(CrossEntropyParams q, ShardFormat format,
                              const RowPart* parts,  // [rows, q.parts]
                              double* message)       // [rows of all, numbers]
{
  const int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= q.counted.rows) return;
  const int64_t place = place_of(q.counted, row), label = label_at(q, place);
  if (place < 0) return;
  RowPart part;
  if (label >= 0 || label == kNoLabel) part = merge_parts(parts + row * q.parts, q.parts);
  pack(format, part, message + place * numbers_of(format));
}

// One thread.
static __global__ void cross_entropy_header_kernel(CrossEntropyParams q, ShardHeader header, double* place) {
  if (q.temperature.data != nullptr && !q.temperature_per_row) {
    header.temperature = load<double>(q.temperature, 0);
  }
  if (q.normalizer.data != nullptr) header.normalizer = load<double>(q.normalizer, 0);
  memcpy(place, &header, sizeof header);
}

// What the shards have told of a row, NaN where they do not fit: nobody waits for the device to say so.
struct ShardParts {
  Shards shards;

  __device__ __forceinline__ RowPart merged(const CrossEntropyParams& q, int64_t row, int64_t place) const {
    const double scale = scale_of<double>(q, place);
    RowPart whole;
    for (int64_t i = 0; i < shards.count; ++i) {
      merge(whole, unpack(shards.format, row_of(shards, i, row), scale));
    }
    if (first_misfit(shards) >= 0) {
      whole.highest = whole.label = whole.sums.max = whole.sums.sum = whole.sums.distance = NAN;
    }
    return whole;
  }
};

}  // namespace masked_loss_ext::cuda
