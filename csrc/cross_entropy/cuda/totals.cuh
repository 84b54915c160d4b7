// SPDX-License-Identifier: BSD-3-Clause
// What is added over rows on CUDA: losses and denominators, in a fixed order (no atomics).
#pragma once

#include "cross_entropy/cuda/launch.cuh"

namespace masked_loss_ext::cuda {

struct Totals {
  double loss, denominator;
  int64_t bad;  // rows with a label outside [0, V)
};

__device__ __forceinline__ Totals totals_of(const CrossEntropyParams& q, int64_t label, double loss) {
  Totals row = {loss, 0, label == kBadLabel};
  if (label == kNotCounted || (label == kBadLabel && q.weight.data != nullptr)) return row;
  row.denominator =
      q.logits.kind == Kind::kDouble ? class_weight<double>(q, label) : class_weight<float>(q, label);
  return row;
}

enum class Totalled { kAll, kDenominator, kLoss };  // kLoss: the denominator is in q.totals already

// Whether the backward needs their sum, which is then put into the totals.
__host__ __device__ __forceinline__ bool has_class_weights(const CrossEntropyParams& q) {
  return q.weight.data != nullptr && q.options.label_smoothing > 0 && q.totals.data != nullptr;
}

// Of all rows. A bad label shows even where the denominator is 0.
__device__ __forceinline__ void finish(const CrossEntropyParams& q, Totals all, Totalled what) {
  auto* totals = static_cast<double*>(q.totals.data);
  double denominator = 1;
  if (what == Totalled::kLoss) {
    denominator = totals[0];
  } else if (q.reduction == RowReduction::kMean) {
    denominator = q.normalizer.data != nullptr ? load<double>(q.normalizer, 0) : all.denominator;
  }
  totals[0] = denominator;
  if (!has_class_weights(q)) totals[1] = double(q.counted.classes);
  if (what == Totalled::kDenominator || q.reduction == RowReduction::kNone) return;
  double loss = denominator == 0 ? 0 : all.loss / denominator;
  if (all.bad > 0) loss = NAN;
  if (q.loss.kind == Kind::kDouble) {
    put<double>(q.loss, 0, loss);
  } else {
    put<float>(q.loss, 0, loss);
  }
}

// Every thread of the block calls it; valid in thread 0.
__device__ __forceinline__ Totals block_totals(Totals mine) {
  __shared__ double losses[kMaxWarps], denominators[kMaxWarps];
  __shared__ int64_t bad[kMaxWarps];
  return {block_sum(mine.loss, losses), block_sum(mine.denominator, denominators),
          block_sum(mine.bad, bad)};
}

// One block finishes by itself; more leave their totals, of thread 0, to cross_entropy_totals_kernel.
__device__ __forceinline__ void leave(const CrossEntropyParams& q, Totals mine, Totals* totals,
                                      unsigned blocks, Totalled what) {
  if (threadIdx.x != 0) return;
  if (blocks == 1) {
    finish(q, mine, what);
  } else {
    totals[blockIdx.x] = mine;
  }
}

// Adds totals: of blocks, or with those null of rows, by their labels and the losses that a sweep left. Each
// block takes `per_block` of them. block: kThreads.
static __global__ void __launch_bounds__(kThreads, kBlocksAtLeast)
    cross_entropy_totals_kernel(CrossEntropyParams q, Totalled what,
                                const Totals* of_blocks,   // [count] or null
                                const double* row_losses,  // [count], written where a row counts, or null
                                int64_t count, int64_t per_block,
                                Totals* totals)  // [blocks]
{
  const int64_t first = blockIdx.x * per_block, last = min(first + per_block, count);
  Totals mine = {0, 0, 0};
  for (int64_t i = first + threadIdx.x; i < last; i += blockDim.x) {
    Totals one;
    if (of_blocks != nullptr) {
      one = of_blocks[i];
    } else {
      const int64_t label = label_at(q, place_of(q.counted, i));
      one = totals_of(q, label, row_losses != nullptr && label >= 0 ? row_losses[i] : 0);
    }
    mine.loss += one.loss;
    mine.denominator += one.denominator;
    mine.bad += one.bad;
  }
  leave(q, block_totals(mine), totals, gridDim.x, what);
}

// The totals of so many blocks; one needs none.
inline int64_t totals_of_blocks(int64_t blocks) { return blocks > 1 ? blocks : 0; }

constexpr int64_t kTotalsPerBlock = 16384, kRowsPerBlock = 1024;

// Adds `count` totals of blocks, or of rows: a launch, one more where that takes more than a block.
inline void add_totals(const char* op, const CrossEntropyParams& q, Totalled what, const Totals* of_blocks,
                       const double* row_losses, int64_t count, const Tensor& like) {
  const int64_t per_block = of_blocks != nullptr ? kTotalsPerBlock : kRowsPerBlock;
  const int64_t blocks = std::max<int64_t>(ceil_div(count, per_block), 1);
  const Scratch<Totals> totals(like, totals_of_blocks(blocks));
  check_launch(op, launch(current_stream(like), dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0,
                          cross_entropy_totals_kernel, q, what, of_blocks, row_losses, count, per_block,
                          totals.data()));
  if (blocks > 1) add_totals(op, q, what, totals.data(), nullptr, blocks, like);
}

}  // namespace masked_loss_ext::cuda
