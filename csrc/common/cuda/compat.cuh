// SPDX-License-Identifier: BSD-3-Clause
// All that a kernel includes: CUDA under nvcc, the host simulator of tests/cuda_sim under g++.
// Kernels are launched by launch(), never by <<<>>>, so that one source compiles in both worlds.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

#ifdef MASKED_LOSS_EXT_CUDA_SIM
#include "cuda_sim.h"
#else
#include <cuda_runtime.h>
#endif

namespace masked_loss_ext {

constexpr int kWarpSize = 32;
constexpr int kMaxClusterBlocks = 8;  // what is portable
// Shared memory that is kept free for what kernels declare themselves and what CUDA takes.
constexpr int64_t kOtherSharedBytes = 3072;

// What the current device can do with a kernel: dynamic shared memory of a block, and of a block of which a
// multiprocessor is to hold two; blocks of a cluster, 1 for none.
struct BlockLimits {
  int64_t shared_bytes, half_shared_bytes;
  int cluster_blocks;
};

// Fewer than `most`, then none, where a device cannot launch as many at once, as on a slice of a GPU.
template <class F>
int largest_cluster(int most, const F& can_launch) {
  while (most > 1 && !can_launch(most)) most /= 2;
  return most;
}

#ifdef MASKED_LOSS_EXT_CUDA_SIM

using cuda_sim::launch;
using cuda_sim::launch_clusters;

template <class... Params>
BlockLimits block_limits(void (*)(Params...)) {
  const auto bytes = static_cast<int64_t>(cuda_sim::kMaxSharedBytes);
  const int most = static_cast<int>(cuda_sim::cluster_limit());
  return {bytes - kOtherSharedBytes, bytes / 2 - kOtherSharedBytes,
          largest_cluster(most, [](int blocks) { return cuda_sim::max_active_clusters(blocks) > 0; })};
}

template <class T>
T* dynamic_shared() {
  return static_cast<T*>(cuda_sim::dynamic_shared_memory());
}

#else

// What a block may use without asking; more must be allowed per kernel and per device.
constexpr size_t kDefaultSharedBytes = 48 * 1024;

inline cudaLaunchAttribute cluster_attribute(unsigned blocks) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = blocks;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  return attribute;
}

// Allows the kernel all the shared memory that there is.
inline BlockLimits ask_block_limits(const void* kernel, int device) {
  int block = 0, multiprocessor = 0;
  cudaFuncAttributes attributes = {};
  const auto failed = [](cudaError_t error) { return error != cudaSuccess; };
  if (failed(cudaDeviceGetAttribute(&block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) ||
      failed(cudaDeviceGetAttribute(&multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device)) ||
      failed(cudaFuncGetAttributes(&attributes, kernel)) ||
      failed(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(block - kOtherSharedBytes)))) {
    cudaGetLastError();  // the launch itself will say what is wrong
    const auto bytes = static_cast<int64_t>(kDefaultSharedBytes);
    return {bytes - kOtherSharedBytes, bytes - kOtherSharedBytes, 1};
  }
  BlockLimits limits = {block - kOtherSharedBytes, multiprocessor / 2 - kOtherSharedBytes, 1};
  if (attributes.ptxVersion < 90) return limits;  // machine code that knows no clusters
  limits.cluster_blocks = largest_cluster(kMaxClusterBlocks, [&](int blocks) {
    cudaLaunchAttribute attribute = cluster_attribute(static_cast<unsigned>(blocks));
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(attributes.maxThreadsPerBlock));
    config.dynamicSmemBytes = static_cast<size_t>(limits.shared_bytes);
    config.attrs = &attribute;
    config.numAttrs = 1;
    int clusters = 0;
    return !failed(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config)) && clusters > 0;
  });
  cudaGetLastError();
  return limits;
}

// Asked once per device and kernel.
template <class... Params>
BlockLimits block_limits(void (*kernel)(Params...)) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, BlockLimits> known;
  int device = 0;
  cudaGetDevice(&device);
  const auto* address = reinterpret_cast<const void*>(kernel);
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [place, is_new] = known.try_emplace({address, device});
  if (is_new) place->second = ask_block_limits(address, device);
  return place->second;
}

// Launches kernel(args...) with `cluster` neighbouring blocks in a cluster, where that is more than 1.
// Returns the launch's own error; arguments convert to the kernel's types.
template <class... Params, class... Args>
cudaError_t launch_clusters(unsigned cluster, cudaStream_t stream, dim3 grid, dim3 block,
                            size_t smem_bytes, void (*kernel)(Params...), Args&&... args) {
  if (smem_bytes > kDefaultSharedBytes) block_limits(kernel);  // which allows them
  cudaLaunchAttribute attribute = cluster_attribute(cluster);
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = smem_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
  if (error != cudaSuccess) cudaGetLastError();  // reported here; must not surface in a later launch
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
