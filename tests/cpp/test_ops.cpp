// SPDX-License-Identifier: BSD-3-Clause
// Calls an operator from C++, as a program without Python would, on numbers worked out by hand.

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <cmath>
#include <cstdio>
#include <limits>
#include <optional>
#include <string_view>
#include <tuple>

namespace {

using Optional = const std::optional<at::Tensor>&;
using SquaredError = std::tuple<at::Tensor, at::Tensor>(
    const at::Tensor& prediction,  // [B, T, C]
    const at::Tensor& target,      // [B, T, C]
    Optional mask,                 // [B, T]
    Optional edit_mask,
    Optional weighting,
    double foreground_weight,
    double background_weight,
    std::string_view reduction,
    std::string_view loss,
    Optional delta);

int failures = 0;

void expect(const char* what, double got, double wanted) {
  const bool same = std::abs(got - wanted) <= 1e-6 * std::abs(wanted);
  std::printf("%-4s %s: got %.7g, wanted %.7g\n", same ? "ok" : "FAIL", what, got, wanted);
  failures += !same;
}

}  // namespace

int main() {
  const auto op = c10::Dispatcher::singleton()
                      .findSchemaOrThrow("masked_loss_ext::masked_squared_error", "")
                      .typed<SquaredError>();
  // Two rows of two tokens of two channels. The mask keeps the first token of row 0 and the
  // second of row 1; the second token of row 0 holds NaN, which must not matter.
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const at::Tensor prediction = at::tensor({1.f, 2.f, nan, nan, 5.f, 6.f, 7.f, 8.f}).view({2, 2, 2});
  const at::Tensor target = at::tensor({0.f, 0.f, 3.f, 3.f, 9.f, 9.f, 4.f, 4.f}).view({2, 2, 2});
  const at::Tensor mask = at::tensor({1, 0, 0, 1}).view({2, 2}).to(at::kBool);

  const auto [loss, count] = op.call(prediction, target, mask, {}, {}, 2.0, 1.0, "mean", "mse", {});
  // (1 + 4 + 9 + 16) over the 4 elements of the 2 kept tokens
  expect("mean over what the mask keeps", loss.item<double>(), 7.5);

  const auto [distance, kept] = op.call(prediction, target, mask, {}, {}, 2.0, 1.0, "mean", "l1", {});
  expect("mean distance", distance.item<double>(), 2.5);  // (1 + 2 + 3 + 4) / 4

  const auto [nothing, none] =
      op.call(prediction, target, at::zeros_like(mask), {}, {}, 2.0, 1.0, "mean", "mse", {});
  expect("mean over nothing", nothing.item<double>(), 0.0);
  return failures == 0 ? 0 : 1;
}
