// SPDX-License-Identifier: BSD-3-Clause
#include "common/cuda/device.h"

namespace masked_loss_ext::cuda {

#ifdef MASKED_LOSS_EXT_CUDA_SIM

cudaStream_t current_stream(const Tensor&) { return cuda_sim::current_stream(); }

#else

cudaStream_t current_stream(const Tensor& tensor) {
  using Getter = AOTITorchError (*)(int32_t, void**);
  static const auto getter = torch_cuda_function<Getter>("aoti_torch_get_current_cuda_stream");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(getter(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

#endif

DeviceMemory::DeviceMemory(const Tensor& like, int64_t bytes)
    : tensor_(new Tensor(device_empty(like, {bytes}, ScalarType::Byte))),
      data_(tensor_->mutable_data_ptr()) {}

DeviceMemory::~DeviceMemory() { delete tensor_; }

}  // namespace masked_loss_ext::cuda
