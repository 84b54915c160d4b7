// SPDX-License-Identifier: BSD-3-Clause
#include "rooms.h"

namespace torch_free {

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
    stand_in::call("_half_products", {});
    return stand_in::call("_snapshot", {{"tensor", numbers({3, 4}, 0, 1)}});
  }});
  return cases;
}

}  // namespace torch_free
