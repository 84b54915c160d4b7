// SPDX-License-Identifier: BSD-3-Clause
// Blocks that run at the same time and read each other's shared memory: clusters, from sm_90 on. Where
// there are none, a cluster is one block.
#pragma once

#include "common/cuda/compat.cuh"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#include <cooperative_groups.h>
#define MASKED_LOSS_EXT_CLUSTERS
#endif

namespace masked_loss_ext::cuda {

struct Cluster {
#ifdef MASKED_LOSS_EXT_CLUSTERS
  using Group = cooperative_groups::cluster_group;
  static __device__ __forceinline__ int blocks() { return static_cast<int>(Group::num_blocks()); }
  // Every thread of the cluster calls arrive() and then wait(), as often as the others.
  static __device__ __forceinline__ void arrive() {
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
  }
  static __device__ __forceinline__ void wait() {
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
  }
  // The variable in the shared memory of another block; to be read between two meetings.
  template <class T>
  static __device__ __forceinline__ T* of_block(T* shared, int block) {
    return Group::map_shared_rank(shared, block);
  }
#elif defined(MASKED_LOSS_EXT_CUDA_SIM)
  static int blocks() { return static_cast<int>(cuda_sim::cluster_blocks()); }
  static void arrive() {}
  static void wait() { cuda_sim::cluster_wait({__FILE__, __LINE__}); }
  template <class T>
  static T* of_block(T* shared, int block) {
    return static_cast<T*>(cuda_sim::shared_of_block(shared, static_cast<unsigned>(block)));
  }
#else
  static __device__ __forceinline__ int blocks() { return 1; }
  static __device__ __forceinline__ void arrive() {}
  static __device__ __forceinline__ void wait() { __syncthreads(); }
  template <class T>
  static __device__ __forceinline__ T* of_block(T* shared, int) { return shared; }
#endif
};

}  // namespace masked_loss_ext::cuda
