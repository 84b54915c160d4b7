// SPDX-License-Identifier: BSD-3-Clause
// Every operator of every room, forward and backward, as functions that make their inputs anew.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "inputs.h"

namespace torch_free {

struct Case {
  std::string room, name;
  std::function<Results()> run;
};

std::vector<Case> elementwise_cases(bool large);
std::vector<Case> cross_entropy_cases(bool large);
std::vector<Case> linear_cases();
std::vector<Case> shard_cases();
std::vector<Case> terms_cases();
std::vector<Case> layout_cases();  // block masks, repetition, and what remains

ScalarType floating(size_t turn);  // one after another
std::string text_of(int64_t number);

// Arguments of rows of logits whose excluded rows are closed; inplace: they will be written over.
Named rows(const Sizes& sizes, ScalarType type, bool everything, bool inplace = false);

// What `given` becomes with the defaults of an operator's schema.
Named with_defaults(const std::string& op, Named given);
// Results of the forward, and of its backward ("grad ...") for an incoming gradient of ones into each of
// `into` (results of the forward by name).
Results both_ways(const std::string& op, const std::string& backward, const Named& given,
                  const std::vector<std::string>& into);
Results backward_of(const std::string& backward, const std::string& op, const Named& given,
                    const Results& results, const std::vector<std::string>& into);

}  // namespace torch_free
