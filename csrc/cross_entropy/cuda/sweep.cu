// SPDX-License-Identifier: BSD-3-Clause
// The loss of masked_cross_entropy and its gradient in one sweep, on CUDA: launches. Nothing here waits for
// the device. How many blocks share a row depends on the GPU's shared memory, and with it the last bits.
#include "cross_entropy/cuda/rows.h"
#include "cross_entropy/cuda/sweep.cuh"

namespace masked_loss_ext::cuda {
namespace {

constexpr int64_t kScaleMaxPacks = 2048;  // of a part
constexpr unsigned kScaleBlocks = 1024;

struct SweepCut {
  bool kept;
  int64_t shared_bytes;
};

// A row to a team of lanes, a block, or a cluster of blocks of which a multiprocessor holds two, so that one
// reads while the other writes; a block that fills a multiprocessor has all its threads. Where nothing can
// keep the row, to a block that reads it twice.
SweepCut cut_sweep(CrossEntropyParams& q, const BlockLimits& limits) {
  const int64_t packs = ceil_div(q.counted.columns, pack_elements(q));
  if (packs <= kLanesMaxPacks) {
    return {true, kThreads / q.team * slot_bytes(q.packs_per_part, true)};
  }
  const auto bytes = [&](int64_t blocks) { return slot_bytes(ceil_div(packs, blocks), true); };
  int blocks = 1;
  while (blocks < limits.cluster_blocks && bytes(blocks) > limits.half_shared_bytes) blocks *= 2;
  const bool kept = bytes(blocks) <= limits.shared_bytes;
  if (!kept) blocks = 1;
  q.packs_per_part = ceil_div(packs, blocks);
  q.parts = blocks;  // of which the last may have a little less
  q.team = q.packs_per_part > kSmallBlockMaxPacks ? kThreads : kSmallBlock;
  if (kept && bytes(blocks) > limits.half_shared_bytes) q.team = kMostThreads;
  return {kept, slot_bytes(q.packs_per_part, kept)};
}

template <class T, bool kFull>
void launch_sweep(const char* op, CrossEntropyParams q, double* row_losses, cudaStream_t stream) {
  const auto keeping = cross_entropy_sweep_kernel<T, kFull, true>;
  const SweepCut cut = cut_sweep(q, block_limits(keeping));
  const auto kernel = cut.kept ? keeping : cross_entropy_sweep_kernel<T, kFull, false>;
  const Grid grid = grid_of(op, q);
  check_launch(op, launch_clusters(static_cast<unsigned>(q.parts), stream, dim3(grid.blocks),
                                   dim3(grid.threads), static_cast<size_t>(cut.shared_bytes), kernel, q,
                                   row_losses, static_cast<T*>(q.grad_logits.data)));
}

}  // namespace

void scale_rows(const char* op, const RowProblem& rows, const Tensor& like) {
  const CrossEntropyParams q = params_of(rows, kScaleMaxPacks);
  const Grid grid = grid_of(op, q);
  with_logits_type(q, [&](auto value) {
    using T = decltype(value);
    check_launch(op, launch(current_stream(like), dim3(std::min(grid.blocks, kScaleBlocks)),
                            dim3(grid.threads), 0, cross_entropy_scale_kernel<T>, q,
                            static_cast<T*>(q.grad_logits.data),
                            static_cast<const accumulate_t<T>*>(q.grad_loss.data)));
  });
}

void count_rows(const char* op, const RowProblem& rows, const Tensor& like) {
  const CrossEntropyParams q = params_of(rows, 0);
  add_totals(op, q, Totalled::kDenominator, nullptr, nullptr, q.counted.rows, like);
}

void sweep_rows(const char* op, const RowProblem& rows, const Tensor& like, double* row_losses) {
  const CrossEntropyParams q = params_of(rows, 0);
  if (q.counted.rows == 0) return;
  const cudaStream_t stream = current_stream(like);
  const bool full = q.options.label_smoothing > 0 || q.options.softcap > 0;
  with_logits_type(q, [&](auto value) {
    using T = decltype(value);
    full ? launch_sweep<T, true>(op, q, row_losses, stream)
         : launch_sweep<T, false>(op, q, row_losses, stream);
  });
}

void add_rows(const char* op, const RowProblem& rows, const Tensor& like, const double* row_losses,
              bool counted) {
  const CrossEntropyParams q = params_of(rows, 0);
  add_totals(op, q, counted ? Totalled::kLoss : Totalled::kAll, nullptr, row_losses, q.counted.rows, like);
}

}  // namespace masked_loss_ext::cuda
