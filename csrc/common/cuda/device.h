// SPDX-License-Identifier: BSD-3-Clause
// What the host side of a CUDA operator needs, on LibTorch's stable ABI alone; compiled by the C++ compiler.
// No CUDA-only symbol of libtorch is linked: the library must load in a CPU-only torch as well, so the
// shims that exist only in libtorch_cuda.so are looked up at run time. Under the simulator tensors
// are CPU tensors on simulated device memory and the operators live in their own namespace.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/HeaderOnlyArrayRef.h>

#include <stdexcept>
#include <string>

#include "common/cuda/host.h"

#ifdef MASKED_LOSS_EXT_CUDA_SIM
#include <vector>
#ifndef MASKED_LOSS_EXT_CUDA_LIBRARY  // a build that counts accesses has another name
#define MASKED_LOSS_EXT_CUDA_LIBRARY masked_loss_ext_sim
#endif
#define MASKED_LOSS_EXT_CUDA_KEY CPU
#else
#include <dlfcn.h>
// STABLE_TORCH_LIBRARY_IMPL(MASKED_LOSS_EXT_CUDA_LIBRARY, MASKED_LOSS_EXT_CUDA_KEY, m) { ... }
#define MASKED_LOSS_EXT_CUDA_LIBRARY masked_loss_ext
#define MASKED_LOSS_EXT_CUDA_KEY CUDA
#endif

namespace masked_loss_ext::cuda {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#ifdef MASKED_LOSS_EXT_CUDA_SIM

// The simulator refuses a launch outside a DeviceScope or on another stream than current_stream()'s:
// on a GPU both would run and be wrong only on machines with several devices or streams.
struct DeviceScope {
  explicit DeviceScope(const Tensor&) { cuda_sim::enter_device(); }
  ~DeviceScope() { cuda_sim::leave_device(); }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;
};

// Memory that lives until the simulator's reset(): the stable ABI of torch 2.10 takes no deleter.
inline Tensor device_empty(const Tensor& like, IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t numel = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = numel > 0 ? numel : 1;
    numel *= sizes[d];
  }
  const size_t element = torch::stable::new_empty(like, {0}, dtype).element_size();
  const size_t bytes = static_cast<size_t>(numel) * element;
  return torch::stable::from_blob(cuda_sim::device_allocate(bytes, true), sizes,
                                  IntHeaderOnlyArrayRef(strides.data(), strides.size()),
                                  like.device(), dtype);
}

#else

// Makes the tensor's device current, and gives the caller's back.
struct DeviceScope {
  explicit DeviceScope(const Tensor& tensor) : guard(tensor.get_device_index()) {}
  torch::stable::accelerator::DeviceGuard guard;
};

// A function of torch's CUDA library; look it up once.
template <class Function>
Function torch_cuda_function(const char* name) {
  // RTLD_NOLOAD: torch has mapped its CUDA library or has none; RTLD_DEFAULT would not see it, torch's
  // libraries are loaded with local symbols.
  void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_NOW);
  void* symbol = library ? dlsym(library, name) : nullptr;
  if (!symbol) throw std::runtime_error(std::string("masked_loss_ext: this PyTorch has no ") + name + " (CUDA)");
  return reinterpret_cast<Function>(symbol);
}

// An uninitialised contiguous tensor on the device of `like`.
inline Tensor device_empty(const Tensor& like, IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

#endif

// As Cpu in common/cpu/device.h.
struct Cuda {
  using Scope = DeviceScope;

  static Tensor empty(const Tensor& like, IntHeaderOnlyArrayRef sizes, ScalarType type) {
    return device_empty(like, sizes, type);
  }
};

}  // namespace masked_loss_ext::cuda
