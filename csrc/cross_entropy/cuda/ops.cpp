// SPDX-License-Identifier: BSD-3-Clause
// masked_cross_entropy on CUDA. Nothing here waits for the device.
#include "cross_entropy/cuda/sharded.h"

namespace masked_loss_ext::cuda {
namespace {

struct Rows : ShardedRows {
  static void forward(const char* op, const RowProblem& rows, const Tensor& like) {
    forward_rows(op, rows, like, nullptr);
  }

  static void backward(const char* op, const RowProblem& rows, const Tensor& like) {
    backward_rows(op, rows, like);
  }

  // Three launches, up to two more where there are many rows: the denominator, which labels, mask and class
  // weights tell, the rows, the loss.
  static void sweep(const char* op, const RowProblem& rows, const Tensor& like) {
    const Scratch<double> row_losses(like, rows.counted.rows);
    count_rows(op, rows, like);
    sweep_rows(op, rows, like, row_losses.data());
    add_rows(op, rows, like, row_losses.data(), true);
  }

  static void scale(const char* op, const RowProblem& rows, const Tensor& like) { scale_rows(op, rows, like); }
};

}  // namespace
}  // namespace masked_loss_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(MASKED_LOSS_EXT_CUDA_LIBRARY, MASKED_LOSS_EXT_CUDA_KEY, m) {
  using masked_loss_ext::cuda::Rows;
  masked_loss_ext::register_row_forward<Rows>(m);
  masked_loss_ext::register_row_backward<Rows>(m);
  masked_loss_ext::register_row_sweep<Rows>(m);
  masked_loss_ext::register_vocab_parallel_forward<Rows>(m);
  masked_loss_ext::register_vocab_parallel_backward<Rows>(m);
}
