// SPDX-License-Identifier: BSD-3-Clause
// All that a kernel includes: CUDA under nvcc, the host simulator of tests/cuda_sim under g++.
// Kernels are launched by launch(), never by <<<>>>, so that one source compiles in both worlds.
#pragma once

#include <cstddef>
#include <utility>

#ifdef MASKED_LOSS_EXT_CUDA_SIM
#include "cuda_sim.h"
#else
#include <cuda_runtime.h>
#endif

namespace masked_loss_ext {

constexpr int kWarpSize = 32;

#ifdef MASKED_LOSS_EXT_CUDA_SIM

using cuda_sim::launch;
using cuda_sim::launch_clusters;

template <class T>
T* dynamic_shared() {
  return static_cast<T*>(cuda_sim::dynamic_shared_memory());
}

#else

// What a block may use without asking; more must be allowed per kernel and per device.
constexpr size_t kDefaultSharedBytes = 48 * 1024;

// Launches kernel(args...) with `cluster` neighbouring blocks in a cluster, where that is more than 1.
// Returns the launch's own error; arguments convert to the kernel's types.
template <class... Params, class... Args>
cudaError_t launch_clusters(unsigned cluster, cudaStream_t stream, dim3 grid, dim3 block,
                            size_t smem_bytes, void (*kernel)(Params...), Args&&... args) {
  if (smem_bytes > kDefaultSharedBytes) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(smem_bytes));
    if (error != cudaSuccess) {
      cudaGetLastError();  // reported here; must not surface in a later launch
      return error;
    }
  }
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = smem_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

template <class... Params, class... Args>
cudaError_t launch(cudaStream_t stream, dim3 grid, dim3 block, size_t smem_bytes,
                   void (*kernel)(Params...), Args&&... args) {
  return launch_clusters(1, stream, grid, block, smem_bytes, kernel, std::forward<Args>(args)...);
}

// The block's dynamic shared memory, 16-byte aligned; its size is the launch's smem_bytes.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char masked_loss_ext_dynamic_shared[];
  return reinterpret_cast<T*>(masked_loss_ext_dynamic_shared);
}

#endif

}  // namespace masked_loss_ext
