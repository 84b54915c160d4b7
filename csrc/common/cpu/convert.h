// SPDX-License-Identifier: BSD-3-Clause
// Element types of the CPU kernels and branch-free conversions that compilers vectorise at every
// instruction-set level (no F16C, no AVX512-BF16 needed). Only static functions: see common/array.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/array.h"

namespace masked_loss_ext {

struct Half { uint16_t bits; };
struct BFloat16 { uint16_t bits; };

template <class T> struct Accumulate { using type = float; };
template <> struct Accumulate<double> { using type = double; };
template <class T> using accumulate_t = typename Accumulate<T>::type;

MASKED_LOSS_EXT_INLINE uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}

MASKED_LOSS_EXT_INLINE float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

template <class T>
MASKED_LOSS_EXT_INLINE T widen(T x) { return x; }
MASKED_LOSS_EXT_INLINE float widen(BFloat16 x) { return float_of(uint32_t(x.bits) << 16); }

// Exponent and mantissa keep their order, so a shift and an addition re-bias the exponent; subnormal
// halves become normal floats by one exact subtraction (safe when denormals are flushed).
MASKED_LOSS_EXT_INLINE float widen(Half x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = uint32_t(x.bits & 0x7fffu) << 13;
  const uint32_t rebias = magnitude >= (31u << 23) ? (2u * 112u) << 23 : 112u << 23;
  const float subnormal = float_of(magnitude + (113u << 23)) - float_of(113u << 23);
  const uint32_t normal = magnitude + rebias;
  return float_of((magnitude < (1u << 23) ? bits_of(subnormal) : normal) | sign);
}

template <class T>
MASKED_LOSS_EXT_INLINE void narrow(T x, T* out) { *out = x; }

// Round to nearest even.
MASKED_LOSS_EXT_INLINE void narrow(float x, BFloat16* out) {
  const uint32_t u = bits_of(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const bool nan = (u & 0x7fffffffu) > 0x7f800000u;
  out->bits = static_cast<uint16_t>(nan ? 0x7fc0u : rounded);
}

MASKED_LOSS_EXT_INLINE void narrow(float x, Half* out) {
  const uint32_t sign = bits_of(x) & 0x80000000u, u = bits_of(x) ^ sign;
  const uint32_t special = u > 0x7f800000u ? 0x7e00u : 0x7c00u;           // NaN or overflow
  const uint32_t small = bits_of(float_of(u) + 0.5f) - bits_of(0.5f);     // ulp(0.5) is 2^-24
  const uint32_t normal = (u - (112u << 23) + 0xfffu + ((u >> 13) & 1u)) >> 13;
  const uint32_t h = u >= (143u << 23) ? special : u < (113u << 23) ? small : normal;
  out->bits = static_cast<uint16_t>(h | (sign >> 16));
}

MASKED_LOSS_EXT_INLINE const char* at(const Array& array, int64_t offset) {
  return static_cast<const char*>(array.data) + offset * size_of(array.kind);
}

// Calls f with a typed pointer to the element at `offset`.
template <class F>
MASKED_LOSS_EXT_INLINE void with_type(const Array& array, int64_t offset, F f) {
  const char* p = at(array, offset);
  switch (array.kind) {
    case Kind::kFloat: f(reinterpret_cast<const float*>(p)); break;
    case Kind::kDouble: f(reinterpret_cast<const double*>(p)); break;
    case Kind::kHalf: f(reinterpret_cast<const Half*>(p)); break;
    case Kind::kBFloat16: f(reinterpret_cast<const BFloat16*>(p)); break;
    case Kind::kUInt8: f(reinterpret_cast<const uint8_t*>(p)); break;
    case Kind::kInt8: f(reinterpret_cast<const int8_t*>(p)); break;
    case Kind::kInt16: f(reinterpret_cast<const int16_t*>(p)); break;
    case Kind::kInt32: f(reinterpret_cast<const int32_t*>(p)); break;
    case Kind::kInt64: f(reinterpret_cast<const int64_t*>(p)); break;
  }
}

}  // namespace masked_loss_ext
