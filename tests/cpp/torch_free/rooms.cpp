// SPDX-License-Identifier: BSD-3-Clause
#include "rooms.h"

#include <cstdio>

namespace torch_free {
namespace {

constexpr ScalarType kFloating[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Double,
                                    ScalarType::Half};

bool starts_with(const std::string& text, const std::string& start) {
  return text.compare(0, start.size(), start) == 0;
}

Tensor labels(const Tensor& mask, int64_t classes) {
  const Tensor made = integers(mask.get()->sizes, 0, classes);
  for (int64_t i = 0; i < made.numel(); ++i) {  // where they do not count, anything
    if (stand_in::get(*mask.get(), i) == 0) stand_in::set(*made.get(), i, -(1LL << 40));
  }
  return made;
}

}  // namespace

ScalarType floating(size_t turn) { return kFloating[turn % 4]; }

std::string text_of(int64_t number) {  // std::to_string's memory is unknown to MemorySanitizer
  char text[32];
  std::snprintf(text, sizeof text, "%lld", static_cast<long long>(number));
  return text;
}

Named with_defaults(const std::string& op, Named given) {
  for (const auto& argument : stand_in::operators().at(op).arguments) {
    given.add(argument.name, argument.otherwise);
  }
  return given;
}

Results backward_of(const std::string& backward, const std::string& op, const Named& given,
                    const Results& results, const std::vector<std::string>& into) {
  Named all = with_defaults(op, given);
  for (const auto& [name, tensor] : results) all.add(name, tensor);
  for (const auto& name : into) all["grad_" + name] = ones_like(results.at(name));
  Named wanted;
  for (const auto& argument : stand_in::operators().at(backward).arguments) {
    if (starts_with(argument.name, "needs_")) wanted[argument.name] = true;
    if (all.find(argument.name)) wanted[argument.name] = all[argument.name];
  }
  return stand_in::call(backward, wanted);
}

Results both_ways(const std::string& op, const std::string& backward, const Named& given,
                  const std::vector<std::string>& into) {
  Results results = stand_in::call(op, given);
  for (auto& [name, tensor] : backward_of(backward, op, given, results, into)) {
    results.add("grad " + name, tensor);
  }
  return results;
}

Named rows(const Sizes& sizes, ScalarType type, bool everything, bool inplace) {
  const Sizes leading(sizes.begin(), sizes.end() - 1);
  const Tensor mask = flags(leading, 0.7);
  const ScalarType wide = type == ScalarType::Double ? type : ScalarType::Float;
  Named given{{"logits", numbers(sizes, -4, 4, type)}, {"mask", mask}};
  given["target"] = labels(mask, sizes.back());
  if (everything) {
    given["weight"] = numbers({sizes.back()}, 0.1, 1, wide);
    given["token_weight"] = numbers(leading, 0, 1);
    given["temperature"] = numbers(leading, 0.5, 2);
    given["label_smoothing"] = 0.1;
    given["softcap"] = 8.0;
    given["z_loss"] = 0.01;
    given["focal_gamma"] = 1.5;
  }
  close_rows(std::get<Tensor>(given["logits"]), mask, inplace);
  return given;
}

}  // namespace torch_free
