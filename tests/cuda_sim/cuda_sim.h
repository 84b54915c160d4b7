// SPDX-License-Identifier: BSD-3-Clause
// CUDA on the host, for tests: a .cu compiled by g++ runs with one fiber per CUDA thread.
//   g++ -x c++ -std=c++17 -DMASKED_LOSS_EXT_CUDA_SIM -I csrc -I tests/cuda_sim ...   (build.py does it)
// A block's threads run one after another from one synchronisation to the next, blocks one after another,
// both in a chosen order: a missing barrier or a dependence between blocks shows as a result that changes
// with the order. Not simulated: the memory model (a fence is a no-op), two blocks at once, streams,
// rounding of the fast functions, PTX, and whatever a kernel may do only on some architectures.
#pragma once

#include <array>
#include <cstring>
#include <tuple>
#include <utility>

#include "device_math.h"
#include "intrinsics.h"
#include "runtime.h"
#include "types.h"

namespace cuda_sim {

// How many pointers an argument is or may hold.
template <class T>
constexpr size_t num_pointers() {
  if (std::is_pointer_v<T>) return 1;
  return std::is_class_v<T> && alignof(T) >= alignof(void*) ? sizeof(T) / sizeof(void*) : 0;
}

template <class T>
void add_pointers(T argument, int position, PointerArgument*& next) {
  if constexpr (std::is_class_v<T>) __builtin_clear_padding(&argument);  // where the stack may have left some
  for (size_t i = 0; i < num_pointers<T>(); ++i) {
    const void* word;
    std::memcpy(&word, reinterpret_cast<const char*>(&argument) + i * sizeof word, sizeof word);
    *next++ = {position, word, std::is_class_v<T>};
  }
}

template <class... Params, size_t... Is>
auto pointer_arguments(const std::tuple<Params...>& arguments, std::index_sequence<Is...>) {
  std::array<PointerArgument, (num_pointers<Params>() + ... + 0)> pointers{};
  PointerArgument* next = pointers.data();
  (add_pointers(std::get<Is>(arguments), static_cast<int>(Is), next), ...);
  (void)next;
  return pointers;
}

// Same signatures as the CUDA forms in cuda/compat.cuh. Throws std::runtime_error for what a kernel does wrong.
template <class... Params, class... Args>
cudaError_t launch_clusters(unsigned cluster, cudaStream_t stream, dim3 grid, dim3 block,
                            size_t shared_bytes, void (*kernel)(Params...), Args&&... args) {
  static_assert(sizeof...(Params) == sizeof...(Args), "wrong number of kernel arguments");
  static_assert((!std::is_reference_v<Params> && ...), "kernels take their parameters by value");
  static_assert((std::is_trivially_copyable_v<Params> && ...), "kernel parameters are copied as bytes");
  struct Call {
    void (*kernel)(Params...);
    std::tuple<Params...> arguments;
  } call{kernel, std::tuple<Params...>(static_cast<Params>(std::forward<Args>(args))...)};
  const auto pointers = pointer_arguments(call.arguments, std::index_sequence_for<Params...>{});
  LaunchRequest request{stream, grid, block, shared_bytes, cluster,
                        reinterpret_cast<const void*>(kernel),
                        pointers.data(), static_cast<int>(pointers.size()), nullptr, &call};
  request.run = [](void* context) {
    auto* c = static_cast<Call*>(context);
    std::apply(c->kernel, c->arguments);
  };
  return run_launch(request);
}

template <class... Params, class... Args>
cudaError_t launch(cudaStream_t stream, dim3 grid, dim3 block, size_t shared_bytes,
                   void (*kernel)(Params...), Args&&... args) {
  return launch_clusters(1, stream, grid, block, shared_bytes, kernel, std::forward<Args>(args)...);
}

}  // namespace cuda_sim
