// SPDX-License-Identifier: BSD-3-Clause
#include "rooms.h"

namespace torch_free {
namespace {

constexpr const char* kElementLosses[] = {"mse", "l1", "smooth_l1", "huber", "pseudo_huber"};
constexpr const char* kReductions[] = {"mean", "sum", "batch_mean", "token_sum", "token", "none"};

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

}  // namespace torch_free
