// SPDX-License-Identifier: BSD-3-Clause
// ATen's products through the dispatcher: PyTorch's own, on any device, at the speed of the vendor's.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace masked_loss_ext {

using torch::stable::Tensor;

inline Tensor transposed(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }

inline Tensor rows_from(Tensor matrix, int64_t first, int64_t rows) {
  return torch::stable::narrow(matrix, 0, first, rows);
}

inline Tensor columns_from(Tensor matrix, int64_t first, int64_t columns) {
  return torch::stable::narrow(matrix, 1, first, columns);
}

// out = a b
inline void product(const Tensor& a, const Tensor& b, const Tensor& out) {
  namespace detail = torch::stable::detail;
  StableIValue stack[] = {detail::from(a), detail::from(b), detail::from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack, TORCH_ABI_VERSION));
  detail::to<Tensor>(stack[0]);  // a second handle of out
}

}  // namespace masked_loss_ext
