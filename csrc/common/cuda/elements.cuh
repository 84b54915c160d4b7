// SPDX-License-Identifier: BSD-3-Clause
// Reading and writing elements of any Kind on the device, and 16-byte packs of one type.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "common/array.h"
#include "common/cuda/compat.cuh"

namespace masked_loss_ext::cuda {

template <class T> struct Accumulate { using type = float; };
template <> struct Accumulate<double> { using type = double; };
template <class T> using accumulate_t = typename Accumulate<T>::type;

// Calls f with a typed pointer to the element at `offset`. The kind is the same for a whole launch, so
// the branch never diverges.
template <class F>
__device__ __forceinline__ void with_type(const Array& array, int64_t offset, F f) {
  const void* data = array.data;
  switch (array.kind) {
    case Kind::kFloat: f(static_cast<const float*>(data) + offset); break;
    case Kind::kDouble: f(static_cast<const double*>(data) + offset); break;
    case Kind::kHalf: f(static_cast<const c10::Half*>(data) + offset); break;
    case Kind::kBFloat16: f(static_cast<const c10::BFloat16*>(data) + offset); break;
    case Kind::kUInt8: f(static_cast<const uint8_t*>(data) + offset); break;
    case Kind::kInt8: f(static_cast<const int8_t*>(data) + offset); break;
    case Kind::kInt16: f(static_cast<const int16_t*>(data) + offset); break;
    case Kind::kInt32: f(static_cast<const int32_t*>(data) + offset); break;
    case Kind::kInt64: f(static_cast<const int64_t*>(data) + offset); break;
  }
}

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(c10::Half x) { return static_cast<float>(x); }
__device__ __forceinline__ float widen(c10::BFloat16 x) { return static_cast<float>(x); }
template <class T>
__device__ __forceinline__ T widen(T x) { return x; }

template <class A>
__device__ __forceinline__ A load(const Array& array, int64_t offset) {
  A value = 0;
  with_type(array, offset, [&](const auto* p) { value = static_cast<A>(widen(*p)); });
  return value;
}

__device__ __forceinline__ bool is_on(const Array& array, int64_t offset) {
  bool on = false;
  with_type(array, offset, [&](const auto* p) { on = widen(*p) != 0; });  // NaN counts as on
  return on;
}

// kVector elements that are moved by one instruction.
template <class T, int kVector>
struct alignas(sizeof(T) * kVector) Pack {
  T value[kVector];
};

template <class T>
constexpr int kVectorOf = 16 / sizeof(T);

}  // namespace masked_loss_ext::cuda
