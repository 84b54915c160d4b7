// SPDX-License-Identifier: BSD-3-Clause
// Tensors of numbers that are the same in every run, and memory that must not be read.
#pragma once

#include <cstring>
#include <random>

#include "../stand_in/dispatcher.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif
#if defined(__has_feature)
#if __has_feature(memory_sanitizer)
#include <sanitizer/msan_interface.h>
#define TORCH_FREE_MEMORY_SANITIZER
#endif
#endif

namespace torch_free {

using stand_in::Named;
using stand_in::Tensor;
using Results = stand_in::ByName<Tensor>;

inline std::mt19937& generator() {
  static std::mt19937 one;
  return one;
}

inline Tensor empty(const Sizes& sizes, ScalarType type = ScalarType::Float) {
  return Tensor(stand_in::new_tensor(sizes, stand_in::contiguous_strides(sizes), type));
}

// Uniform in [low, high): of the same few numbers, begun anywhere, as making them takes longest.
inline Tensor numbers(const Sizes& sizes, double low, double high, ScalarType type = ScalarType::Float) {
  static const std::vector<double> shares = [] {
    std::mt19937 one;
    std::vector<double> made(4099);
    for (double& share : made) share = one() / 4294967296.0;
    return made;
  }();
  Tensor made = empty(sizes, type);
  std::vector<double> scaled = shares;
  for (double& share : scaled) share = low + (high - low) * share;
  stand_in::fill(*made.get(), scaled, generator()() % scaled.size());
  return made;
}

inline Tensor ones_like(const Tensor& tensor) {
  return numbers(tensor.get()->sizes, 1, 1, tensor.get()->type);
}

inline Tensor number(double value, ScalarType type = ScalarType::Float) {
  return numbers({}, value, value, type);
}

// Whole numbers in [low, high).
inline Tensor integers(const Sizes& sizes, int64_t low, int64_t high, ScalarType type = ScalarType::Long) {
  return numbers(sizes, static_cast<double>(low), static_cast<double>(high), type);
}

inline Tensor flags(const Sizes& sizes, double share) {
  const Tensor chosen = numbers(sizes, share - 1, share, ScalarType::Double);
  Tensor made = empty(sizes, ScalarType::Bool);
  for (int64_t i = 0; i < made.numel(); ++i) {
    stand_in::set(*made.get(), i, i == 0 || stand_in::get(*chosen.get(), i) > 0 ? 1 : 0);
  }
  return made;
}

// Who reads it is reported by AddressSanitizer, who lets it decide or come out by MemorySanitizer; elsewhere
// it is NaN, as it is to AddressSanitizer where it will be written over.
inline void close(char* data, size_t bytes, bool written) {
  std::memset(data, 0xff, bytes);
#if defined(__SANITIZE_ADDRESS__)
  if (!written) __asan_poison_memory_region(data, bytes);
#elif defined(TORCH_FREE_MEMORY_SANITIZER)
  __msan_allocated_memory(data, bytes);
#endif
  (void)written;
}

// Closes the rows of a contiguous tensor that the mask, of its leading sizes, leaves out.
inline void close_rows(const Tensor& tensor, const Tensor& mask, bool written = false) {
  const size_t row = tensor.element_size() * static_cast<size_t>(tensor.numel() / mask.numel());
  for (int64_t i = 0; i < mask.numel(); ++i) {
    if (stand_in::get(*mask.get(), i) == 0) {
      close(tensor.get()->data() + static_cast<size_t>(i) * row, row, written);
    }
  }
}

}  // namespace torch_free
