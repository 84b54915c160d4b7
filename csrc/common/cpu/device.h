// SPDX-License-Identifier: BSD-3-Clause
// What an operator that is written once for all devices needs to know of this one; cuda/device.h has
// the same of CUDA.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <vector>

namespace masked_loss_ext {

// An uninitialised contiguous tensor. torch::stable::new_empty() asks the dispatcher through a boxed
// call, which takes longer than a small loss; this shim goes to the allocator.
inline torch::stable::Tensor empty_tensor(const torch::stable::Tensor& like,
                                          const std::vector<int64_t>& sizes,
                                          torch::headeronly::ScalarType type) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::vector<int64_t> strides(sizes.size());
  int64_t step = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = step;
    step *= sizes[d] > 0 ? sizes[d] : 1;
  }
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), to<int32_t>(from(type)),
      to<int32_t>(from(like.device().type())), like.device().index(), &handle));
  return torch::stable::Tensor(handle);
}

struct Cpu {
  struct Scope {  // in which the tensor's device is the current one
    explicit Scope(const torch::stable::Tensor&) {}
  };

  static torch::stable::Tensor empty(const torch::stable::Tensor& like,
                                     const std::vector<int64_t>& sizes,
                                     torch::headeronly::ScalarType type) {
    return empty_tensor(like, sizes, type);
  }
};

}  // namespace masked_loss_ext
