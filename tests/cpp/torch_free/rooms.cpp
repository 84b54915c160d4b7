// SPDX-License-Identifier: BSD-3-Clause
#include "rooms.h"

#include <cstdio>

namespace torch_free {
namespace {

constexpr ScalarType kFloating[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Double,
                                    ScalarType::Half};
constexpr const char* kElementLosses[] = {"mse", "l1", "smooth_l1", "huber", "pseudo_huber"};
constexpr const char* kReductions[] = {"mean", "sum", "batch_mean", "token_sum", "token", "none"};

ScalarType floating(size_t turn) { return kFloating[turn % 4]; }

std::string text_of(int64_t number) {  // std::to_string's memory is unknown to MemorySanitizer
  char text[32];
  std::snprintf(text, sizeof text, "%lld", static_cast<long long>(number));
  return text;
}

bool starts_with(const std::string& text, const std::string& start) {
  return text.compare(0, start.size(), start) == 0;
}

Results squared_error(const Sizes& sizes, ScalarType type, int mask_kind, bool weights, const char* loss,
                      const char* reduction) {
  const Sizes tokens(sizes.begin(), sizes.end() - 1);
  Named given{{"prediction", numbers(sizes, -2, 2, type)},
              {"target", numbers(sizes, -2, 2, type)},
              {"loss", std::string(loss)},
              {"reduction", std::string(reduction)}};
  if (mask_kind == 1) {
    const Tensor mask = flags(tokens, 0.6);
    given["mask"] = mask;
    close_rows(std::get<Tensor>(given["prediction"]), mask);
    close_rows(std::get<Tensor>(given["target"]), mask);
  }
  if (mask_kind == 2) given["mask"] = flags(sizes, 0.5);
  if (weights) {
    Sizes column = tokens;
    column.push_back(1);
    given["edit_mask"] = flags(tokens, 0.5);
    given["weighting"] = numbers(column, 0.5, 2);
  }
  if (std::string(loss) != "mse" && std::string(loss) != "l1") given["delta"] = number(0.7);
  return both_ways("masked_squared_error", "_masked_squared_error_backward", given, {"loss"});
}

}  // namespace

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

std::vector<Case> elementwise_cases(bool large) {
  std::vector<Case> cases;
  size_t turn = 0;
  for (const char* loss : kElementLosses) {
    for (const char* reduction : kReductions) {
      const ScalarType type = floating(turn);
      const int mask = static_cast<int>(turn % 3);
      const bool weights = turn % 2 == 1;
      ++turn;
      cases.push_back({"elementwise", std::string(loss) + " " + reduction, [=] {
                         return squared_error({20, 60, 67}, type, mask, weights, loss, reduction);
                       }});
    }
  }
  cases.push_back({"elementwise", "rows in pieces",
                   [] { return squared_error({3, 40000}, ScalarType::Float, 1, false, "mse", "mean"); }});
  if (large) {  // gradients of which each thread takes whole pages
    cases.push_back({"elementwise", "large", [] {
                       return squared_error({20, 1024, 256}, ScalarType::Float, 1, false, "mse", "mean");
                     }});
  }
  return cases;
}

namespace {

Tensor labels(const Tensor& mask, int64_t classes) {
  const Tensor made = integers(mask.get()->sizes, 0, classes);
  for (int64_t i = 0; i < made.numel(); ++i) {  // where they do not count, anything
    if (stand_in::get(*mask.get(), i) == 0) stand_in::set(*made.get(), i, -(1LL << 40));
  }
  return made;
}

// inplace: the logits will be written over.
Named rows(const Sizes& sizes, ScalarType type, bool everything, bool inplace = false) {
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
          cases.push_back({"cross_entropy", name + ", sweep", [=] { return swept(given(inplace), inplace); }});
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
        const std::string name = std::string(reduction) + (everything ? ", all" : "") + (chunk > 99 ? ", one" : "");
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
      const std::string op = from_hidden ? "vocab_parallel_linear_cross_entropy" : "vocab_parallel_cross_entropy";
      for (bool inplace : {false, true}) {
        if (inplace && from_hidden) continue;
        cases.push_back({"shards", op + (everything ? ", all" : "") + (inplace ? ", in place" : ""),
                         [=] { return sharded(op, two_shards(type, everything, from_hidden, inplace), inplace); }});
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

std::vector<Case> layout_cases() {
  std::vector<Case> cases;
  for (const char* mode : {"full", "causal", "causal_last", "prefix"}) {
    for (const char* dropped : {"none", "self", "attend"}) {
      const bool window = std::string(mode) == "causal";
      cases.push_back({"block_mask", std::string(mode) + " " + dropped, [=] {
        const int64_t samples = 60, segment = 37, rows = samples * 2 * segment + 11;
        Tensor offsets = empty({2 * samples + 1}, ScalarType::Long);
        for (int64_t i = 0; i <= 2 * samples; ++i) stand_in::set(*offsets.get(), i, double(i * segment));
        Named given{{"segment_offsets", offsets}, {"kept", integers({samples, 2}, 0, segment + 3)},
                    {"rows", rows}, {"mode", std::string(mode)}, {"dropped", std::string(dropped)}};
        if (std::string(mode) == "prefix") given["prefix"] = integers({samples}, 0, segment);
        if (window) given["window_left"] = int64_t(20), given["sinks"] = int64_t(2);
        Results results = stand_in::call("packed_rows", given);
        Named lists{{"kv_len", rows}, {"q_block", int64_t(32)}, {"kv_block", int64_t(64)}};
        for (const char* side : {"lo", "hi"}) {
          const Tensor one_batch(new AtenTensorOpaque(*results.at(side).get()));
          one_batch.get()->sizes.insert(one_batch.get()->sizes.begin(), 1);
          one_batch.get()->strides.insert(one_batch.get()->strides.begin(), 0);
          lists[side] = one_batch;
        }
        results.add(stand_in::call("interval_block_lists", lists));
        for (auto& [name, tensor] : stand_in::call("nested_dropout_plan", given)) {
          results.add("plan " + name, tensor);
        }
        return results;
      }});
    }
  }
  for (int64_t n : {1, 3, 4}) {
    cases.push_back({"repetition", text_of(n), [=] {
      Named given{{"tokens", integers({40, 90}, 0, 5)}, {"ngram_size", n}};
      const Tensor valid = flags({40, 90}, 0.9);
      given["valid"] = valid;
      close_rows(std::get<Tensor>(given["tokens"]), valid);
      Results results = stand_in::call("repetition_counts", given);
      results.add(stand_in::call("repetition_links", given));
      return results;
    }});
  }
  cases.push_back({"others", "copy and names", [] {
    stand_in::call("_version", {});
    stand_in::call("cpu_capability", {});
    return stand_in::call("_snapshot", {{"tensor", numbers({3, 4}, 0, 1)}});
  }});
  return cases;
}

}  // namespace torch_free
