// SPDX-License-Identifier: BSD-3-Clause
// Probes of block barriers and of the order of threads and blocks.
#include "common/cuda/compat.cuh"
#include "probes.h"

namespace masked_loss_ext {
namespace {

// y[i] = the place in the order of execution at which thread i ran; x is not used, y[n] counts.
__global__ void execution_order(const float*, float* y, int n) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  y[i] = atomicAdd(&y[n], 1.0f);
}

// Left neighbour through shared memory. Without the barrier it is right as long as threads run upwards.
template <bool kBarrier>
__global__ void left_neighbour(const float* x, float* y, int) {
  float* values = dynamic_shared<float>();
  const unsigned t = threadIdx.x;
  values[t] = x[t];
  if (kBarrier) __syncthreads();
  y[t] = values[t == 0 ? 0 : t - 1];
}

// Prefix sums over blocks. Blocks have no order, so the carry is wrong.
__global__ void prefix_over_blocks(const float* x, float* y, int) {
  const unsigned b = blockIdx.x;
  y[b] = x[b] + (b == 0 ? 0.0f : y[b - 1]);
}

// The same sums with every block on its own.
__global__ void prefix_per_block(const float* x, float* y, int) {
  float sum = 0.0f;
  for (unsigned b = 0; b <= blockIdx.x; ++b) sum += x[b];
  y[blockIdx.x] = sum;
}

// Two barriers, each reached by some threads: n of them take the first.
__global__ void divergent_barrier(const float* x, float* y, int n) {
  if (static_cast<int>(threadIdx.x) < n) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  y[threadIdx.x] = x[threadIdx.x];
}

// Threads from n on have left: the barrier is for the others.
__global__ void barrier_after_exit(const float* x, float* y, int n) {
  float* values = dynamic_shared<float>();
  const int t = static_cast<int>(threadIdx.x);
  if (t >= n) return;
  values[t] = x[t];
  __syncthreads();
  y[t] = values[n - 1 - t];
}

// Lane 0 waits for the block, the rest of its warp for lane 0.
__global__ void deadlock(const float* x, float* y, int) {
  if (threadIdx.x == 0) __syncthreads();
  y[threadIdx.x] = __shfl_sync(0xffffffffu, x[threadIdx.x], 0);
  __syncthreads();
}

__global__ void barrier_votes(const float*, float* y, int n) {
  const int t = static_cast<int>(threadIdx.x);
  const int any = __syncthreads_or(t == n), all = __syncthreads_and(t < n);
  const int count = __syncthreads_count(t < n);
  y[t] = static_cast<float>(count * 4 + any * 2 + all);
}

// The last block to finish sums what the blocks left: integers, so that the order does not matter.
__global__ void last_block_sums(const float* x, float* y, int n) {
  auto* counters = reinterpret_cast<unsigned*>(y);  // [0] sum, [1] blocks done, [2] result, [3] max
  __shared__ bool last;
  atomicAdd(&counters[0], static_cast<unsigned>(x[blockIdx.x * blockDim.x + threadIdx.x]));
  atomicMax(&counters[3], blockIdx.x);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicInc(&counters[1], gridDim.x - 1) == gridDim.x - 1;
  __syncthreads();
  if (last && threadIdx.x == 0) counters[2] = counters[0] + static_cast<unsigned>(n);
}

}  // namespace
}  // namespace masked_loss_ext

const std::vector<Probe>& order_probes() {
  using namespace masked_loss_ext;
  static const std::vector<Probe> probes = {
      {"execution_order", execution_order},
      {"left_neighbour", left_neighbour<true>},
      {"left_neighbour_without_barrier", left_neighbour<false>},
      {"prefix_over_blocks", prefix_over_blocks},
      {"prefix_per_block", prefix_per_block},
      {"divergent_barrier", divergent_barrier},
      {"barrier_after_exit", barrier_after_exit},
      {"deadlock", deadlock},
      {"barrier_votes", barrier_votes},
      {"last_block_sums", last_block_sums},
  };
  return probes;
}
