// SPDX-License-Identifier: BSD-3-Clause
// What lies where in memory: plain data that host code hands to kernels, no PyTorch header.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define MASKED_LOSS_EXT_INLINE static __host__ __device__ __forceinline__
#else
// static: a copy of a function that was compiled for AVX-512 must not be picked by the linker for all.
#define MASKED_LOSS_EXT_INLINE static inline __attribute__((always_inline))
#endif

namespace masked_loss_ext {

enum class Kind : uint8_t { kFloat, kDouble, kHalf, kBFloat16, kUInt8, kInt8, kInt16, kInt32, kInt64 };

MASKED_LOSS_EXT_INLINE int64_t size_of(Kind kind) {
  switch (kind) {
    case Kind::kDouble: case Kind::kInt64: return 8;
    case Kind::kFloat: case Kind::kInt32: return 4;
    case Kind::kUInt8: case Kind::kInt8: return 1;
    default: return 2;
  }
}

MASKED_LOSS_EXT_INLINE bool is_integer(Kind kind) { return kind >= Kind::kUInt8; }  // or bool

struct Array {
  void* data = nullptr;  // nullptr: absent
  Kind kind = Kind::kFloat;
};

struct ByteRange {
  uintptr_t begin = 0, end = 0;  // addresses
};

}  // namespace masked_loss_ext
