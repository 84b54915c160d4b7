// SPDX-License-Identifier: BSD-3-Clause
// Threads for work of uneven cost.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace masked_loss_ext {

// Runs f(chunk) for every chunk on PyTorch's threads. Each takes the next chunk when it is free: masked
// rows cost almost nothing, so equal shares would not be equal work. f must not throw (parallel_for
// would lose the text) and must write to a place of its own per chunk.
template <class F>
void for_each_chunk(int64_t chunks, const F& f) {
  std::atomic<int64_t> next{0};
  auto work = [&](int64_t, int64_t) {
    for (int64_t chunk = next++; chunk < chunks; chunk = next++) f(chunk);
  };
  if (chunks <= 1) return work(0, 1);
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), chunks);
  torch::stable::parallel_for(0, threads, 1, work);
}

}  // namespace masked_loss_ext
