// SPDX-License-Identifier: BSD-3-Clause
// Probes of device and shared memory.
#include "common/cuda/compat.cuh"
#include "probes.h"

namespace masked_loss_ext {
namespace {

constexpr int kThreads = 64;

__device__ int global_thread() { return static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); }

__global__ void copy(const float* __restrict__ x, float* __restrict__ y, int n) {
  const int i = global_thread();
  if (i < n) y[i] = x[i];
}

// wrong: <= n
__global__ void copy_reads_beyond(const float* x, float* y, int n) {
  const int i = global_thread();
  if (i <= n) y[i < n ? i : 0] = x[i];
}

__global__ void copy_writes_beyond(const float* x, float* y, int n) {
  const int i = global_thread();
  if (i <= n) y[i] = x[i < n ? i : 0];
}

__global__ void copy_writes_before(const float* x, float* y, int n) {
  const int i = global_thread();
  if (i < n) y[i - 1] = x[i];
}

// wrong: the row's stride taken for its length
__global__ void transpose_wrong_index(const float* x, float* y, int n) {
  const int i = global_thread(), row = i / n, column = i % n;
  y[column * n + row] = x[row * n + row];
}

__global__ void transpose(const float* x, float* y, int n) {
  const int i = global_thread(), row = i / n, column = i % n;
  y[column * n + row] = x[row * n + column];
}

__global__ void write_to_input(const float* x, float* y, int) {
  const_cast<float*>(x)[threadIdx.x] = y[threadIdx.x];
}

// n is the offset in elements: vector loads need multiples of 4
__global__ void load_float4(const float* x, float* y, int n) {
  const float4 v = *reinterpret_cast<const float4*>(x + n);
  y[threadIdx.x] = v.x + v.y + v.z + v.w;
}

__global__ void overflowing_index(const float* x, float* y, int n) {
  const int square = n * n;  // up to 46340 an int holds it
  y[threadIdx.x] = x[square / 0x7fffffff];
}

// A block reads what it wrote, or with n the block that writes: only that one.
template <int kTag>
__device__ float* static_array() {  // as in a helper that is a template, instantiated twice
  __shared__ float values[kThreads];
  return values;
}

__global__ void static_shared(const float* x, float* y, int n) {
  float* a = static_array<0>();
  float* b = static_array<1>();
  const unsigned t = threadIdx.x;
  if (n < 0 || blockIdx.x == static_cast<unsigned>(n)) {
    a[t] = x[t];
    b[t] = 2 * x[t];
  }
  __syncthreads();
  y[global_thread()] = a[t] + b[t];
}

__global__ void dynamic_shared_use(const float* x, float* y, int n) {
  float* a = dynamic_shared<float>();
  const unsigned t = threadIdx.x;
  if (n < 0 || blockIdx.x == static_cast<unsigned>(n)) a[t] = x[t];
  __syncthreads();
  y[global_thread()] = a[t];
}

// wrong where n is not below the array's size
__global__ void static_shared_index(const float* x, float* y, int n) {
  __shared__ float values[kThreads];
  values[threadIdx.x + n] = x[0];
  __syncthreads();
  y[threadIdx.x] = values[threadIdx.x];
}

__global__ void dynamic_shared_index(const float* x, float* y, int n) {
  float* values = dynamic_shared<float>();
  values[threadIdx.x + n] = x[0];
  __syncthreads();
  y[threadIdx.x] = x[0];
}

__device__ float recurse(const float* x, int n) {
  volatile float frame[256];
  frame[n % 256] = x[0];
  const float deeper = n > 0 ? recurse(x, n - 1) : 0.0f;
  return deeper * 0.0f + frame[n % 256];
}

__global__ void deep_recursion(const float* x, float* y, int n) { y[0] = recurse(x, n); }

__global__ void trap(const float*, float*, int n) {
  if (static_cast<int>(threadIdx.x) == n) __trap();
}

// Every index and every extent, folded into one number that names the thread.
__global__ void indices(const float*, float* y, int) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const unsigned i = block * blockDim.x * blockDim.y * blockDim.z + thread;
  y[i] = static_cast<float>(i);
}

}  // namespace
}  // namespace masked_loss_ext

const std::vector<Probe>& memory_probes() {
  using namespace masked_loss_ext;
  static const std::vector<Probe> probes = {
      {"copy", copy},
      {"copy_reads_beyond", copy_reads_beyond},
      {"copy_writes_beyond", copy_writes_beyond},
      {"copy_writes_before", copy_writes_before},
      {"transpose", transpose},
      {"transpose_wrong_index", transpose_wrong_index},
      {"write_to_input", write_to_input},
      {"load_float4", load_float4},
      {"overflowing_index", overflowing_index},
      {"static_shared", static_shared},
      {"dynamic_shared", dynamic_shared_use},
      {"static_shared_index", static_shared_index},
      {"dynamic_shared_index", dynamic_shared_index},
      {"deep_recursion", deep_recursion},
      {"trap", trap},
      {"indices", indices},
  };
  return probes;
}
