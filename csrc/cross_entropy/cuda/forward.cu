// SPDX-License-Identifier: BSD-3-Clause
// masked_cross_entropy on CUDA, forward: launches. Nothing here waits for the device.
#include "cross_entropy/cuda/rows.cuh"
#include "cross_entropy/cuda/sums.cuh"

namespace masked_loss_ext::cuda {
namespace {

// One launch where one block has all rows; one more that adds the totals of several, and one where rows are
// cut into parts. With row_losses they are left there, and nothing is added.
void run_forward(const char* op, const RowProblem& problem, const Tensor& like, double* row_losses) {
  const CrossEntropyParams q = params_of(problem, 0);
  const bool is_cut = q.parts > 1;
  const Grid grid = grid_of(op, q), per_row = row_grid(op, q.counted.rows);
  const unsigned reading = is_cut ? grid.blocks : std::max(grid.blocks, 1u);
  const unsigned finishing = is_cut ? per_row.blocks : reading;
  constexpr int64_t kPartDoubles = sizeof(RowPart) / sizeof(double);
  const int64_t part_count = is_cut ? q.counted.rows * q.parts : 0;
  const Tensor parts_buffer = device_empty(like, {part_count * kPartDoubles}, ScalarType::Double);
  const Tensor buffer = totals_buffer(row_losses == nullptr ? finishing : 1, like);
  auto* parts = static_cast<RowPart*>(parts_buffer.mutable_data_ptr());
  auto* totals = static_cast<Totals*>(buffer.mutable_data_ptr());
  const cudaStream_t stream = current_stream(like);
  const bool full = q.statistics || q.options.label_smoothing > 0 || q.options.softcap > 0;
  const unsigned blocks = reading + has_class_weights(q);
  with_logits_type(q, [&](auto value) {
    using T = decltype(value);
    const auto kernel = full ? cross_entropy_sums_kernel<T, true> : cross_entropy_sums_kernel<T, false>;
    if (blocks > 0) {
      check_launch(op, launch(stream, dim3(blocks), dim3(grid.threads), 0, kernel, q, reading, parts,
                              row_losses, totals));
    }
    if (is_cut) {
      check_launch(op, launch(stream, dim3(per_row.blocks), dim3(per_row.threads), 0,
                              cross_entropy_rows_kernel<accumulate_t<T>>, q, parts, row_losses, totals));
    }
  });
  if (row_losses == nullptr && finishing > 1) {
    add_totals(op, q, Totalled::kAll, totals, nullptr, finishing, like);
  }
}

struct Forward : Cuda {
  static void forward(const char* op, const RowProblem& problem, const Tensor& like) {
    run_forward(op, problem, like, nullptr);
  }
};

}  // namespace

void forward_rows(const char* op, const RowProblem& rows, const Tensor& like, double* row_losses) {
  run_forward(op, rows, like, row_losses);
}

}  // namespace masked_loss_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(MASKED_LOSS_EXT_CUDA_LIBRARY, MASKED_LOSS_EXT_CUDA_KEY, m) {
  masked_loss_ext::register_row_forward<masked_loss_ext::cuda::Forward>(m);
}
