// SPDX-License-Identifier: BSD-3-Clause
// ATen's products through the dispatcher: PyTorch's own, on any device, at the speed of the vendor's.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "common/layout_builder.h"

namespace masked_loss_ext {

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

// A sum over chunks: where it is added up, and where it goes.
struct ChunkSum {
  std::optional<Tensor> into, result;
  bool is_empty = true;
};

// Halves are added up in float32, but for a sum of one chunk, which is rounded once.
template <class Device>
void begin_sum(ChunkSum& sum, const Tensor& result, bool one_chunk) {
  sum.result = result;
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < result.dim(); ++d) sizes.push_back(result.size(d));
  const bool same = one_chunk || size_of(kind_of(result)) != 2;
  sum.into = same ? result : Device::empty(result, sizes, ScalarType::Float);
}

}  // namespace masked_loss_ext
