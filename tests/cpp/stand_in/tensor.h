// SPDX-License-Identifier: BSD-3-Clause
// A stand-in for libtorch_cpu.so: the part of LibTorch's stable ABI that the library asks for, in plain C++.
// A sanitizer that wants every line instrumented (threads, uninitialised memory) cannot have PyTorch; with
// this under its name the library runs as it is shipped.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

using torch::headeronly::ScalarType;
using Sizes = std::vector<int64_t>;

struct AtenTensorOpaque {  // what a handle points to
  std::shared_ptr<void> storage;
  int64_t offset = 0;  // in elements
  Sizes sizes, strides;
  ScalarType type = ScalarType::Float;

  int64_t numel() const;
  bool is_contiguous() const;
  char* data() const;
};

namespace stand_in {

size_t element_size(ScalarType type);
Sizes contiguous_strides(const Sizes& sizes);
AtenTensorOpaque* new_tensor(const Sizes& sizes, const Sizes& strides, ScalarType type);

// Of any dtype that is met here, as numbers.
double get(const AtenTensorOpaque& tensor, int64_t element);
void set(const AtenTensorOpaque& tensor, int64_t element, double value);
// The elements of a contiguous tensor, in order, from a list that is begun again at its end.
void fill(const AtenTensorOpaque& tensor, const std::vector<double>& values, size_t first);
// f(where each of the tensors has the element), for all elements; sizes are the first one's.
void for_each_element(const std::vector<const AtenTensorOpaque*>& tensors,
                      const std::function<void(const Sizes&)>& f);

}  // namespace stand_in
