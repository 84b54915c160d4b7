// SPDX-License-Identifier: BSD-3-Clause
// Probes of warp functions and device mathematics.
#include "common/cuda/compat.cuh"
#include "probes.h"

namespace masked_loss_ext {
namespace {

constexpr unsigned kAll = 0xffffffffu;

// The lanes of the caller's warp that the block has.
__device__ unsigned present_lanes() {
  const unsigned rest = blockDim.x - (threadIdx.x & ~31u);
  return rest >= 32 ? kAll : (1u << rest) - 1;
}

__global__ void shuffle_index(const float* x, float* y, int n) {
  y[threadIdx.x] = __shfl_sync(present_lanes(), x[threadIdx.x], 1, n);
}
__global__ void shuffle_up(const float* x, float* y, int n) {
  y[threadIdx.x] = __shfl_up_sync(present_lanes(), x[threadIdx.x], 1, n);
}
__global__ void shuffle_down(const float* x, float* y, int n) {
  y[threadIdx.x] = __shfl_down_sync(present_lanes(), x[threadIdx.x], 1, n);
}
__global__ void shuffle_xor(const float* x, float* y, int n) {
  y[threadIdx.x] = __shfl_xor_sync(present_lanes(), x[threadIdx.x], n / 2, n);
}
// Reads across the segment: earlier ones answer, later ones do not.
__global__ void shuffle_xor_beyond(const float* x, float* y, int n) {
  y[threadIdx.x] = __shfl_xor_sync(kAll, x[threadIdx.x], n, n);
}

// Sums groups of n lanes, each group by its own mask and on its own.
__global__ void sum_by_groups(const float* x, float* y, int n) {
  const unsigned lane = threadIdx.x & 31u, group = lane / static_cast<unsigned>(n);
  const unsigned mask = (n == 32 ? kAll : (1u << n) - 1) << (group * static_cast<unsigned>(n));
  double v = x[threadIdx.x];
  for (unsigned round = 0; round <= group; ++round)  // groups differ in how often they meet
    for (int o = n / 2; o > 0; o /= 2) {
      const double other = __shfl_xor_sync(mask, v, o, n);
      v = round == 0 ? v + other : v;
    }
  y[threadIdx.x] = static_cast<float>(v);
}

template <bool kSync>
__global__ void exchange_in_warp(const float* x, float* y, int) {
  float* values = dynamic_shared<float>();
  values[threadIdx.x] = x[threadIdx.x];
  if (kSync) __syncwarp();
  y[threadIdx.x] = values[threadIdx.x ^ 1u];
}

// wrong where lanes have left
__global__ void full_mask_after_exit(const float* x, float* y, int n) {
  if (static_cast<int>(threadIdx.x) >= n) return;
  y[threadIdx.x] = __shfl_sync(kAll, x[threadIdx.x], 0);
}

__global__ void shuffle_from_outside_mask(const float* x, float* y, int n) {
  if (static_cast<int>(threadIdx.x) < 16) y[threadIdx.x] = __shfl_sync(0xffffu, x[threadIdx.x], n);
}

__global__ void caller_outside_mask(const float* x, float* y, int n) {
  y[threadIdx.x] = __shfl_sync(static_cast<unsigned>(n), x[threadIdx.x], 0);
}

__global__ void masks_that_overlap(const float* x, float* y, int) {
  y[threadIdx.x] = __shfl_sync(threadIdx.x == 0 ? 3u : kAll, x[threadIdx.x], 1);
}

__global__ void different_calls(const float* x, float* y, int n) {
  if (static_cast<int>(threadIdx.x) < n) {
    y[threadIdx.x] = __shfl_sync(kAll, x[threadIdx.x], 0);
  } else {
    y[threadIdx.x] = __shfl_sync(kAll, x[threadIdx.x], 0);
  }
}

__global__ void votes(const float*, float* y, int n) {
  const int t = static_cast<int>(threadIdx.x);
  const unsigned ballot = __ballot_sync(kAll, t < n);
  const int any = __any_sync(kAll, t == n), all = __all_sync(kAll, t < n);
  y[t] = static_cast<float>(__popc(ballot) * 4 + any * 2 + all);
  if (__popc(__activemask()) > 32 || !(__activemask() >> (t & 31) & 1u)) y[t] = -1.0f;
}

// What a loss does in a warp and in a block: n floats per thread, n a multiple of 4.
__global__ void sum_of_squares(const float* __restrict__ x, float* __restrict__ y, int n) {
  __shared__ float partial[32];
  const auto* vectors = reinterpret_cast<const float4*>(x);
  float sum = 0.0f;
  for (int k = static_cast<int>(threadIdx.x); k < n / 4 * static_cast<int>(blockDim.x);
       k += static_cast<int>(blockDim.x)) {
    const float4 v = __ldg(vectors + static_cast<int>(blockIdx.x) * (n / 4) * blockDim.x + k);
    sum = fmaf(v.x, v.x, fmaf(v.y, v.y, fmaf(v.z, v.z, fmaf(v.w, v.w, sum))));
  }
  for (int o = 16; o > 0; o /= 2) sum += __shfl_xor_sync(kAll, sum, o);
  if ((threadIdx.x & 31u) == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x < 32) {
    sum = threadIdx.x < blockDim.x / 32 ? partial[threadIdx.x] : 0.0f;
    for (int o = 16; o > 0; o /= 2) sum += __shfl_down_sync(kAll, sum, static_cast<unsigned>(o));
    if (threadIdx.x == 0) y[blockIdx.x] = sum;
  }
}

__global__ void mathematics(const float* x, float* y, int) {
  const float v = x[0];
  const float values[] = {
      __expf(v), __logf(v), __fdividef(v, 4.0f), __frcp_rn(v), rsqrtf(v), __saturatef(v), fminf(v, 1.0f),
      static_cast<float>(__popc(0xf0u)), static_cast<float>(__ffs(8)), static_cast<float>(__clz(1)),
      static_cast<float>(min(3, 2)), __int_as_float(__float_as_int(v)), static_cast<float>(__brev(1u) >> 31)};
  for (int k = 0; k < 13; ++k) y[k] = values[k];
}

}  // namespace
}  // namespace masked_loss_ext

const std::vector<Probe>& warp_probes() {
  using namespace masked_loss_ext;
  static const std::vector<Probe> probes = {
      {"shuffle_index", shuffle_index},
      {"shuffle_up", shuffle_up},
      {"shuffle_down", shuffle_down},
      {"shuffle_xor", shuffle_xor},
      {"shuffle_xor_beyond", shuffle_xor_beyond},
      {"sum_by_groups", sum_by_groups},
      {"exchange_in_warp", exchange_in_warp<true>},
      {"exchange_in_warp_without_sync", exchange_in_warp<false>},
      {"full_mask_after_exit", full_mask_after_exit},
      {"shuffle_from_outside_mask", shuffle_from_outside_mask},
      {"caller_outside_mask", caller_outside_mask},
      {"masks_that_overlap", masks_that_overlap},
      {"different_calls", different_calls},
      {"votes", votes},
      {"sum_of_squares", sum_of_squares},
      {"mathematics", mathematics},
  };
  return probes;
}
