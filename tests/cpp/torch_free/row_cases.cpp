// SPDX-License-Identifier: BSD-3-Clause
// Rows of logits: whole, from hidden states, in shards, and the terms of language models.
#include "rooms.h"

namespace torch_free {
namespace {

const std::vector<std::string> kStatistics = {"loss", "lse", "entropy", "log_prob"};

Results rows_in_place(Named given) {
  const Results forward = stand_in::call("masked_cross_entropy", given);
  const Tensor logits = std::get<Tensor>(given["logits"]);
  const std::string op = "masked_cross_entropy";
  Results results = backward_of("_masked_cross_entropy_backward_", op, given, forward, {"loss"});
  results.add("logits", logits);
  return results;
}

Results swept(Named given, bool inplace) {
  const Tensor logits = std::get<Tensor>(given["logits"]);
  const std::string op = "_masked_cross_entropy_sweep";
  Results results = stand_in::call(inplace ? op + "_" : op, given);
  const Tensor gradient = inplace ? logits : results.at("grad_logits");
  const ScalarType wide = gradient.get()->type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  stand_in::call("_masked_cross_entropy_scale_gradient_",
                 {{"grad_logits", gradient}, {"grad_loss", number(0.5, wide)}});
  results.add("gradient", gradient);
  return results;
}

}  // namespace

std::vector<Case> cross_entropy_cases(bool large) {
  std::vector<Case> cases;
  const std::string op = "masked_cross_entropy";
  size_t turn = 0;
  std::vector<Sizes> shapes = {{4, 50, 300}, {3, 1000}, {2, 3, 20011}, {7, 5}};
  if (large) shapes.push_back({2, 40000});
  for (const Sizes& sizes : shapes) {
    for (const char* reduction : {"mean", "sum", "none"}) {
      const ScalarType type = floating(turn++);
      for (bool everything : {false, true}) {
        const auto given = [=](bool inplace) {
          Named made = rows(sizes, type, everything, inplace);
          made["reduction"] = std::string(reduction);
          return made;
        };
        const std::string name = text_of(sizes.back()) + " " + reduction + (everything ? ", all" : "");
        cases.push_back({"cross_entropy", name, [=] {
                           Named with = given(false);
                           with["statistics"] = everything;
                           const auto into = everything ? kStatistics : std::vector<std::string>{"loss"};
                           return both_ways(op, "_masked_cross_entropy_backward", with, into);
                         }});
        cases.push_back({"cross_entropy", name + ", in place", [=] { return rows_in_place(given(true)); }});
        if (std::string(reduction) == "none") continue;
        for (bool inplace : {false, true}) {
          cases.push_back({"cross_entropy", name + ", sweep",
                           [=] { return swept(given(inplace), inplace); }});
        }
      }
    }
  }
  return cases;
}

namespace {

// The layer's own arguments in place of logits.
Named layer(Named given, const Sizes& leading, int64_t width, int64_t classes, ScalarType type) {
  Sizes sizes = leading;
  sizes.push_back(width);
  given["hidden"] = numbers(sizes, -2, 2, type);
  given["linear_weight"] = numbers({classes, width}, -0.5, 0.5, type);
  given["bias"] = numbers({classes}, -1, 1, type);
  close_rows(std::get<Tensor>(given["hidden"]), std::get<Tensor>(given["mask"]));
  given.remove("logits");
  return given;
}

}  // namespace

std::vector<Case> linear_cases() {
  std::vector<Case> cases;
  const std::string op = "linear_cross_entropy";
  size_t turn = 0;
  for (const char* reduction : {"mean", "none"}) {
    for (bool everything : {false, true}) {
      for (int64_t chunk : {16, 1000}) {
        const ScalarType type = floating(turn++);
        const auto given = [=] {
          Named made = layer(rows({2, 40, 130}, type, everything), {2, 40}, 9, 130, type);
          made["reduction"] = std::string(reduction);
          made["chunk_rows"] = chunk;
          return made;
        };
        const std::string chunks = chunk > 99 ? ", one" : "";
        const std::string name = std::string(reduction) + (everything ? ", all" : "") + chunks;
        cases.push_back({"linear_cross_entropy", name, [=] {
                           return both_ways(op, "_linear_cross_entropy_backward", given(), {"loss"});
                         }});
        if (std::string(reduction) == "none") continue;
        cases.push_back({"linear_cross_entropy", name + ", sweep", [=] {
                           return stand_in::call("_linear_cross_entropy_sweep", given());
                         }});
      }
    }
  }
  return cases;
}

namespace {

// Two ranks' parts of the same classes: the message of each, then results and gradients of each.
Results sharded(const std::string& op, const std::vector<Named>& shards, bool inplace) {
  std::vector<Tensor> messages;
  for (const Named& one : shards) messages.push_back(stand_in::call("_" + op + "_sums", one).at("message"));
  const int64_t size = messages[0].numel();
  const Tensor all = empty({2, size}, messages[0].get()->type);
  for (int64_t i = 0; i < 2 * size; ++i) {
    stand_in::set(*all.get(), i, stand_in::get(*messages[static_cast<size_t>(i / size)].get(), i % size));
  }
  Results results;
  for (size_t rank = 0; rank < 2; ++rank) {
    Named given = shards[rank];
    given["messages"] = all;
    Results found = stand_in::call(op, given);
    const std::string backward = "_" + op + "_backward" + (inplace ? "_" : "");
    for (auto& [name, tensor] : backward_of(backward, op, given, found, {"loss"})) {
      found.add("grad " + name, tensor);
    }
    if (inplace) found.add("logits", std::get<Tensor>(given["logits"]));
    for (auto& [name, tensor] : found) results.add(name + " " + text_of(static_cast<int64_t>(rank)), tensor);
  }
  return results;
}

std::vector<Named> two_shards(ScalarType type, bool everything, bool from_hidden, bool inplace) {
  constexpr int64_t kClasses[] = {80, 120};
  const Sizes leading = {3, 50};
  Named common = rows({3, 50, 200}, type, everything);
  common["vocab_size"] = int64_t(200);
  if (from_hidden) common = layer(common, leading, 7, 200, type);
  std::vector<Named> shards;
  for (int rank : {0, 1}) {
    Named given = common;
    given["vocab_start"] = int64_t(rank == 0 ? 0 : 80);
    if (from_hidden) {
      given["linear_weight"] = numbers({kClasses[rank], 7}, -0.5, 0.5, type);
      given["bias"] = numbers({kClasses[rank]}, -1, 1, type);
      given["chunk_rows"] = int64_t(20);
    } else {
      given["logits"] = numbers({3, 50, kClasses[rank]}, -4, 4, type);
      close_rows(std::get<Tensor>(given["logits"]), std::get<Tensor>(given["mask"]), inplace);
    }
    shards.push_back(given);
  }
  return shards;
}

}  // namespace

std::vector<Case> shard_cases() {
  std::vector<Case> cases;
  size_t turn = 0;
  for (bool everything : {false, true}) {
    for (bool from_hidden : {false, true}) {
      const ScalarType type = floating(turn++);
      const std::string op = std::string("vocab_parallel_") + (from_hidden ? "linear_" : "") + "cross_entropy";
      for (bool inplace : {false, true}) {
        if (inplace && from_hidden) continue;
        cases.push_back({"shards", op + (everything ? ", all" : "") + (inplace ? ", in place" : ""),
                         [=] {
                           const auto shards = two_shards(type, everything, from_hidden, inplace);
                           return sharded(op, shards, inplace);
                         }});
      }
    }
  }
  return cases;
}

std::vector<Case> terms_cases() {
  std::vector<Case> cases;
  for (size_t turn = 0; turn < 4; ++turn) {
    const ScalarType type = floating(turn);
    const int64_t classes = turn == 3 ? 20011 : 200;
    const bool unscaled = turn % 2 == 0;
    cases.push_back({"cross_entropy_terms", text_of(classes) + (unscaled ? "" : ", at T alone"), [=] {
      const int64_t length = classes > 1000 ? 5 : 60;
      Named given = rows({3, length, classes}, type, false);
      const Tensor mask = std::get<Tensor>(given["mask"]);
      const Results links = stand_in::call(
          "repetition_links", {{"tokens", integers({3, length}, 0, 4)}, {"ngram_size", int64_t(2)}});
      given["target"] = integers({3, length}, 0, 4);
      given["temperature"] = number(0.8);
      given["unscaled"] = unscaled;
      std::vector<std::string> into = {"scaled_log_prob", "scaled_mean_log_prob"};
      if (unscaled) {
        given["classes"] = integers({3, length, 2}, 0, classes);
        given["context_before"] = links.at("context_before");
        given["ngram_after"] = links.at("ngram_after");
        into.insert(into.end(), {"log_prob", "entropy", "class_log_prob", "unlikelihood"});
      }
      return both_ways("cross_entropy_terms", "_cross_entropy_terms_backward", given, into);
    }});
  }
  return cases;
}

}  // namespace torch_free
