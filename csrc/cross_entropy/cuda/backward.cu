// SPDX-License-Identifier: BSD-3-Clause
// masked_cross_entropy on CUDA, backward: launches. Nothing here waits for the device.
#include "cross_entropy/cuda/gradient.cuh"
#include "cross_entropy/cuda/launch.cuh"
#include "cross_entropy/cuda/rows.h"

namespace masked_loss_ext::cuda {

constexpr int64_t kMaxPacks = 2048;  // of a part, 32 KB: blocks that only write zeros end early

// Two launches, one where grad_logits is not needed.
void backward_rows(const char* op, const RowProblem& problem, const Tensor& like) {
  const CrossEntropyParams q = params_of(problem, kMaxPacks);
  const Grid grid = grid_of(op, q), per_row = row_grid(op, q.counted.rows);
  const Scratch<RowGradient<double>> buffer(like, q.counted.rows);  // or of floats, which are smaller
  const cudaStream_t stream = current_stream(like);
  const bool full =
      q.grad_entropy.data != nullptr || q.options.label_smoothing > 0 || q.options.softcap > 0;
  with_logits_type(q, [&](auto value) {
    using T = decltype(value);
    using A = accumulate_t<T>;
    auto* gradients = reinterpret_cast<RowGradient<A>*>(buffer.data());
    check_launch(op, launch(stream, dim3(per_row.blocks), dim3(per_row.threads), 0,
                            cross_entropy_row_gradients_kernel<A>, q, gradients));
    if (q.grad_logits.data == nullptr) return;
    const auto kernel =
        full ? cross_entropy_gradient_kernel<T, true> : cross_entropy_gradient_kernel<T, false>;
    check_launch(op, launch(stream, dim3(grid.blocks), dim3(grid.threads), 0, kernel, q, gradients,
                            static_cast<T*>(q.grad_logits.data)));
  });
}

}  // namespace masked_loss_ext::cuda
