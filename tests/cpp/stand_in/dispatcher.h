// SPDX-License-Identifier: BSD-3-Clause
// What the library has registered, for a program to call: by name, with arguments by name, the others from
// the schema's defaults.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <string>
#include <variant>
#include <vector>

#include "by_name.h"
#include "tensor.h"

namespace stand_in {

using Tensor = torch::stable::Tensor;
using Value = std::variant<std::monostate, Tensor, double, int64_t, bool, std::string>;
using Named = ByName<Value>;

struct Argument {
  std::string type, name;
  Value otherwise;
};

struct Operator {
  std::vector<Argument> arguments;
  std::vector<std::string> results;  // names; "" where the schema gives none
  bool returns_text = false;
  void (*function)(StableIValue*, uint64_t, uint64_t) = nullptr;
  int64_t calls = 0;
};

ByName<Operator>& operators();
// The tensors that come back, under their names (a single one without: ""); of a text nothing does.
ByName<Tensor> call(const std::string& name, const Named& given);

Sizes taken_list(StableIValue value);  // an argument that is a list of integers

void set_num_threads(uint32_t threads);

}  // namespace stand_in
