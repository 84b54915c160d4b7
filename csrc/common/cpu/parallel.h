// SPDX-License-Identifier: BSD-3-Clause
// Threads for work of uneven cost.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "common/cpu/memory.h"

namespace masked_loss_ext {

// Runs f(chunk) for every chunk in [0, count), each on the next of PyTorch's threads that is free: masked
// rows cost almost nothing, so equal shares would not be equal work. f must not throw (parallel_for would
// lose the text).
template <class F>
void for_each_chunk(int64_t count, const F& f) {
  std::atomic<int64_t> next{0};
  auto work = [&](int64_t, int64_t) {
    for (int64_t chunk = next++; chunk < count; chunk = next++) f(chunk);
  };
  if (count <= 1) return work(0, 1);
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
  torch::stable::parallel_for(0, threads, 1, work);
}

// The same for chunks that fill `bytes` each of a large fresh output. Two threads that touch a huge page
// for the first time at once both clear 2 MB, and one throws its page away. So a thread takes all chunks
// of a page, where that leaves enough pieces to balance, and what is taken at a time lies far apart: a
// chunk may reach into the next page.
template <class F>
void for_each_chunk_of_output(int64_t chunks, const void* output, int64_t bytes, const F& f) {
  constexpr int64_t kPiecesPerThread = 4;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t page = static_cast<int64_t>(kHugePage);
  const int64_t shift = static_cast<int64_t>(reinterpret_cast<uintptr_t>(output) % kHugePage);
  const int64_t pages = (shift + chunks * bytes + page - 1) / page;
  if (threads == 1 || pages < kPiecesPerThread * threads) return for_each_chunk(chunks, f);
  // Chunks that begin in pages [0, i).
  auto before = [&](int64_t i) {
    const int64_t offset = std::max<int64_t>(i * page - shift, 0);
    return std::min((offset + bytes - 1) / bytes, chunks);
  };
  const int64_t share = (pages + threads - 1) / threads;
  for_each_chunk(share * threads, [&](int64_t turn) {
    const int64_t i = turn % threads * share + turn / threads;
    for (int64_t chunk = before(i); chunk < before(i + 1); ++chunk) f(chunk);
  });
}

}  // namespace masked_loss_ext
