// SPDX-License-Identifier: BSD-3-Clause
// masked_cross_entropy on CUDA, forward: launches. Nothing here waits for the device.
#include "cross_entropy/cuda/rows.h"
#include "cross_entropy/cuda/vocab_parallel.cuh"

namespace masked_loss_ext::cuda {
namespace {

bool is_full(const CrossEntropyParams& q) {
  return q.statistics || q.options.label_smoothing > 0 || q.options.softcap > 0;
}

// The sums over the rows, by `blocks` blocks, and one more where class weights are added up. With parts they
// are left there, with row_losses the losses.
void launch_sums(const char* op, const CrossEntropyParams& q, unsigned blocks, unsigned threads,
                 RowPart* parts, double* row_losses, Totals* totals, const Tensor& like) {
  const unsigned all = blocks + has_class_weights(q);
  if (all == 0) return;
  with_logits_type(q, [&](auto value) {
    using T = decltype(value);
    const auto kernel =
        is_full(q) ? cross_entropy_sums_kernel<T, true> : cross_entropy_sums_kernel<T, false>;
    check_launch(op, launch(current_stream(like), dim3(all), dim3(threads), 0, kernel, q, blocks, parts,
                            row_losses, totals));
  });
}

// The results of rows whose parts are known, a thread per row.
template <class Parts>
void launch_rows(const char* op, const CrossEntropyParams& q, const Parts& parts, double* row_losses,
                 Totals* totals, const Tensor& like) {
  const Grid grid = row_grid(op, q.counted.rows);
  const auto run = [&](auto kernel) {
    check_launch(op, launch(current_stream(like), dim3(grid.blocks), dim3(grid.threads), 0, kernel, q, parts,
                            row_losses, totals));
  };
  if (q.logits.kind == Kind::kDouble) return run(cross_entropy_rows_kernel<double, Parts>);
  run(cross_entropy_rows_kernel<float, Parts>);
}

}  // namespace

// One launch where one block has all rows; one more that adds the totals of several, and one where rows are
// cut into parts. With row_losses they are left there, and nothing is added.
void forward_rows(const char* op, const RowProblem& rows, const Tensor& like, double* row_losses) {
  const CrossEntropyParams q = params_of(rows, 0);
  const bool is_cut = q.parts > 1;
  const Grid grid = grid_of(op, q);
  const unsigned reading = is_cut ? grid.blocks : std::max(grid.blocks, 1u);
  const unsigned finishing = is_cut ? row_grid(op, q.counted.rows).blocks : reading;
  const Scratch<RowPart> parts(like, is_cut ? q.counted.rows * q.parts : 0);
  const Scratch<Totals> totals(like, totals_of_blocks(row_losses == nullptr ? finishing : 1));
  launch_sums(op, q, reading, grid.threads, is_cut ? parts.data() : nullptr, row_losses, totals.data(), like);
  if (is_cut) launch_rows(op, q, Pieces{parts.data()}, row_losses, totals.data(), like);
  if (row_losses == nullptr && finishing > 1) {
    add_totals(op, q, Totalled::kAll, totals.data(), nullptr, finishing, like);
  }
}

// Two launches.
void shard_rows(const char* op, const RowProblem& rows, ShardFormat format, double* message,
                const Tensor& like) {
  if (rows.counted.rows == 0) return;
  const CrossEntropyParams q = params_of(rows, 0);
  const Grid grid = grid_of(op, q), per_row = row_grid(op, q.counted.rows);
  const Scratch<RowPart> parts(like, q.counted.rows * q.parts);
  launch_sums(op, q, grid.blocks, grid.threads, parts.data(), nullptr, nullptr, like);
  check_launch(op, launch(current_stream(like), dim3(per_row.blocks), dim3(per_row.threads), 0,
                          cross_entropy_pack_kernel, q, format, parts.data(), message));
}

void head_shard(const char* op, const RowProblem& rows, ShardHeader header, double* place,
                const Tensor& like) {
  check_launch(op, launch(current_stream(like), dim3(1), dim3(1), 0, cross_entropy_header_kernel,
                          params_of(rows, 0), header, place));
}

// A launch, one more where there are many rows, and one where class weights are added up.
void unite_shards(const char* op, const RowProblem& rows, const Shards& shards, const Tensor& like) {
  const CrossEntropyParams q = params_of(rows, 0);
  const unsigned blocks = row_grid(op, q.counted.rows).blocks;
  const Scratch<Totals> totals(like, totals_of_blocks(blocks));
  launch_sums(op, q, 0, kThreads, nullptr, nullptr, totals.data(), like);
  launch_rows(op, q, ShardParts{shards}, nullptr, totals.data(), like);
  if (blocks > 1) add_totals(op, q, Totalled::kAll, totals.data(), nullptr, blocks, like);
}

}  // namespace masked_loss_ext::cuda
