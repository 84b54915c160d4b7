// SPDX-License-Identifier: BSD-3-Clause
// Sums and maxima over lanes and blocks in a fixed order: the same bits in every run.
#pragma once

#include <cstdint>

#include "common/cuda/compat.cuh"

namespace masked_loss_ext::cuda {

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kMaxWarps = 1024 / kWarpSize;

// Sum over groups of `lanes` (a power of two up to 32) neighbouring lanes; every lane gets it.
// All 32 lanes must call it.
template <class T>
__device__ __forceinline__ T group_sum(T value, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kFullWarp, value, offset);
  }
  return value;
}

// Largest value of the group, a NaN passed over; every lane gets it. All 32 lanes must call it.
template <class T>
__device__ __forceinline__ T group_max(T value, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
    value = max(value, __shfl_xor_sync(kFullWarp, value, offset));
  }
  return value;
}

// Smallest value of the group; every lane gets it. All 32 lanes must call it.
template <class T>
__device__ __forceinline__ T group_min(T value, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
    value = min(value, __shfl_xor_sync(kFullWarp, value, offset));
  }
  return value;
}

// Sum over the block, valid in thread 0. The block is a multiple of 32 threads, and every thread calls
// it. `scratch` is shared memory for one value per warp, not in use by another call.
template <class T>
__device__ __forceinline__ T block_sum(T value, T* scratch) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  value = group_sum(value, kWarpSize);
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  const int warps = blockDim.x / kWarpSize;
  if (warp == 0) value = group_sum(lane < warps ? scratch[lane] : T(0), kWarpSize);
  return value;
}

// Sums of `value` over all threads before the caller's, and of all. The block has kWarps warps; every
// thread calls it, and `scratch` [kWarps] is free again after the next barrier.
template <int kWarps>
__device__ __forceinline__ int sum_before(int value, int* scratch, int* total) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  int sum = value;
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const int other = __shfl_up_sync(kFullWarp, sum, offset);
    if (lane >= offset) sum += other;
  }
  if (lane == kWarpSize - 1) scratch[warp] = sum;
  __syncthreads();
  int before = 0;
  *total = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before += scratch[w];
    *total += scratch[w];
  }
  return before + sum - value;
}

}  // namespace masked_loss_ext::cuda
