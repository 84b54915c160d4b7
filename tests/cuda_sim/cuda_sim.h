// SPDX-License-Identifier: BSD-3-Clause
// CUDA on the host, for tests: a .cu compiled by g++ runs with one fiber per CUDA thread.
//   g++ -x c++ -std=c++17 -DMASKED_LOSS_EXT_CUDA_SIM -I csrc -I tests/cuda_sim ...   (build.py does it)
// A block's threads run one after another from one synchronisation to the next, blocks one after another,
// both in a chosen order: a missing barrier or a dependence between blocks shows as a result that changes
// with the order. Not simulated: the memory model (a fence is a no-op), two blocks at once, streams,
// rounding of the fast functions, PTX, and whatever a kernel may do only on some architectures.
#pragma once

#include <array>
#include <tuple>
#include <utility>

#include "device_math.h"
#include "intrinsics.h"
#include "runtime.h"
#include "types.h"

namespace cuda_sim {

// Arguments that are pointers have to be null or point to device memory; those within structs are not seen.
template <class... Params, size_t... Is>
std::array<PointerArgument, sizeof...(Params) + 1> pointer_arguments(
    const std::tuple<Params...>& arguments, int* count, std::index_sequence<Is...>) {
  std::array<PointerArgument, sizeof...(Params) + 1> pointers{};
  const auto add = [&](int position, const auto& argument) {
    using T = std::decay_t<decltype(argument)>;
    if constexpr (std::is_pointer_v<T>) pointers[(*count)++] = {position, argument};
  };
  (add(static_cast<int>(Is), std::get<Is>(arguments)), ...);
  (void)add;
  return pointers;
}

// Same signature as the CUDA form in cuda/compat.cuh. Throws std::runtime_error for what a kernel does wrong.
template <class... Params, class... Args>
cudaError_t launch(cudaStream_t stream, dim3 grid, dim3 block, size_t shared_bytes,
                   void (*kernel)(Params...), Args&&... args) {
  static_assert(sizeof...(Params) == sizeof...(Args), "wrong number of kernel arguments");
  static_assert((!std::is_reference_v<Params> && ...), "kernels take their parameters by value");
  static_assert((std::is_trivially_copyable_v<Params> && ...), "kernel parameters are copied as bytes");
  struct Call {
    void (*kernel)(Params...);
    std::tuple<Params...> arguments;
  } call{kernel, std::tuple<Params...>(static_cast<Params>(std::forward<Args>(args))...)};
  int count = 0;
  const auto pointers =
      pointer_arguments(call.arguments, &count, std::index_sequence_for<Params...>{});
  LaunchRequest request{stream, grid, block, shared_bytes, reinterpret_cast<const void*>(kernel),
                        pointers.data(), count, nullptr, &call};
  request.run = [](void* context) {
    auto* c = static_cast<Call*>(context);
    std::apply(c->kernel, c->arguments);
  };
  return run_launch(request);
}

}  // namespace cuda_sim
