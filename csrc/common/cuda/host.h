// SPDX-License-Identifier: BSD-3-Clause
// What launches need of PyTorch, without its headers: nvcc would read them several times for every source and
// architecture, which took as long as all kernels of a small room. common/cuda/device.cpp has the bodies.
#pragma once

#include <cstdint>

#ifdef MASKED_LOSS_EXT_CUDA_SIM
#include "cuda_sim.h"
#else
struct CUstream_st;
using cudaStream_t = CUstream_st*;  // as CUDA's own headers have it
#endif

namespace torch::stable {
class Tensor;  // handed on, never looked into
}

namespace masked_loss_ext::cuda {

using torch::stable::Tensor;

// torch's current stream on the tensor's device.
cudaStream_t current_stream(const Tensor& tensor);

class DeviceMemory {
 public:
  DeviceMemory(const Tensor& like, int64_t bytes);
  ~DeviceMemory();
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  void* data() const { return data_; }

 private:
  Tensor* tensor_;
  void* data_;
};

// Uninitialised room for `count` of them on the device of `like`, for as long as this lives; what was launched
// before its end may still use it, as it may a tensor of the stream.
template <class Item>
class Scratch {
 public:
  Scratch(const Tensor& like, int64_t count) : memory_(like, count * int64_t{sizeof(Item)}) {}
  Item* data() const { return static_cast<Item*>(memory_.data()); }

 private:
  DeviceMemory memory_;
};

}  // namespace masked_loss_ext::cuda
