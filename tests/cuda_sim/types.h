// SPDX-License-Identifier: BSD-3-Clause
// CUDA's vocabulary for a host compiler: qualifiers, dim3, vector types, errors, streams.
// No CUDA toolkit is needed, and __CUDACC__ stays undefined: torch's headers test it.
#pragma once

#include <cstddef>
#include <cstdint>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
// Blocks run one after another, so one copy serves all. Thread-local, because that marks the array in the
// library's symbol table (a local object in the TLS segment), which is how the runtime finds it to poison
// it; a section attribute would do neither in templates nor in inline functions.
#define __shared__ static thread_local

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// Alignments as in CUDA: a misaligned vector access is an error there, and is trapped here.
#define CUDA_SIM_VECTOR2(name, T, align) \
  struct alignas(align) name {           \
    T x, y;                              \
  };                                     \
  inline name make_##name(T x, T y) { return {x, y}; }
#define CUDA_SIM_VECTOR3(name, T)  \
  struct name {                    \
    T x, y, z;                     \
  };                               \
  inline name make_##name(T x, T y, T z) { return {x, y, z}; }
#define CUDA_SIM_VECTOR4(name, T, align) \
  struct alignas(align) name {           \
    T x, y, z, w;                        \
  };                                     \
  inline name make_##name(T x, T y, T z, T w) { return {x, y, z, w}; }

CUDA_SIM_VECTOR2(char2, signed char, 2)
CUDA_SIM_VECTOR2(uchar2, unsigned char, 2)
CUDA_SIM_VECTOR2(short2, short, 4)
CUDA_SIM_VECTOR2(ushort2, unsigned short, 4)
CUDA_SIM_VECTOR2(int2, int, 8)
CUDA_SIM_VECTOR2(uint2, unsigned, 8)
CUDA_SIM_VECTOR2(float2, float, 8)
CUDA_SIM_VECTOR2(longlong2, long long, 16)
CUDA_SIM_VECTOR2(ulonglong2, unsigned long long, 16)
CUDA_SIM_VECTOR2(double2, double, 16)
CUDA_SIM_VECTOR3(int3, int)
CUDA_SIM_VECTOR3(float3, float)
CUDA_SIM_VECTOR4(char4, signed char, 4)
CUDA_SIM_VECTOR4(uchar4, unsigned char, 4)
CUDA_SIM_VECTOR4(short4, short, 8)
CUDA_SIM_VECTOR4(ushort4, unsigned short, 8)
CUDA_SIM_VECTOR4(int4, int, 16)
CUDA_SIM_VECTOR4(uint4, unsigned, 16)
CUDA_SIM_VECTOR4(float4, float, 16)

#undef CUDA_SIM_VECTOR2
#undef CUDA_SIM_VECTOR3
#undef CUDA_SIM_VECTOR4

inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }

using cudaStream_t = struct CUstream_st*;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorStreamCaptureUnsupported = 900,
};
enum cudaMemcpyKind { cudaMemcpyDeviceToHost = 2 };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone = 0, cudaStreamCaptureStatusActive = 1 };

const char* cudaGetErrorString(cudaError_t error);

// What a stream does besides launches (stream.cpp). A copy to the host is there after a synchronisation,
// which is refused while the stream is captured.
cudaError_t cudaMemsetAsync(void* data, int byte, size_t bytes, cudaStream_t stream);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status);
