// SPDX-License-Identifier: BSD-3-Clause
// A C++ program that loads the library of an installed package and takes a loss and its gradient.
//
//   load /path/to/masked_loss_ext/_C.abi3.so
//
// It links libtorch alone: loading registers the operators, which are then called by name. Built
// with the sources instead, see CMakeLists.txt of the repository.

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <dlfcn.h>

#include <cmath>
#include <cstdio>
#include <limits>
#include <optional>
#include <string_view>
#include <tuple>

namespace {

using Mask = const std::optional<at::Tensor>&;

// masked_squared_error(prediction, target, mask, edit_mask, weighting, foreground_weight,
//                      background_weight, reduction, loss, delta) -> (loss, count)
using SquaredError = std::tuple<at::Tensor, at::Tensor>(
    const at::Tensor&, const at::Tensor&, Mask, Mask, Mask, double, double, std::string_view,
    std::string_view, Mask);

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s /path/to/_C.abi3.so\n", argv[0]);
    return 2;
  }
  if (dlopen(argv[1], RTLD_NOW | RTLD_GLOBAL) == nullptr) {
    std::fprintf(stderr, "load: %s\n", dlerror());
    return 1;
  }
  const auto squared_error = c10::Dispatcher::singleton()
                                 .findSchemaOrThrow("masked_loss_ext::masked_squared_error", "")
                                 .typed<SquaredError>();

  // Three rows of 4, 2 and 3 tokens, padded with NaN.
  const at::Tensor lengths = at::tensor({4, 2, 3}).unsqueeze(1);
  const at::Tensor mask = at::arange(4).unsqueeze(0).lt(lengths);
  const at::Tensor target = at::arange(3 * 4 * 2, at::kFloat).view({3, 4, 2});
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const at::Tensor prediction = at::where(mask.unsqueeze(2), target + 0.5, nan);

  const auto [loss, count] =
      squared_error.call(prediction, target, mask, {}, {}, 1.0, 1.0, "mean", "mse", {});
  const double plain = (prediction - target).square().mean().item<double>();
  std::printf("mean squared error of %ld tokens: %g masked, %g with the padding counted\n",
              static_cast<long>(mask.sum().item<int64_t>()), loss.item<double>(), plain);
  return loss.item<double>() == 0.25 && std::isnan(plain) ? 0 : 1;
}
