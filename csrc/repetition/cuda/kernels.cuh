// SPDX-License-Identifier: BSD-3-Clause
// repetition_counts and repetition_links on CUDA: one block per row. Threads fill the table of a row
// together, in any order; the smallest position of a key ends up in its slot, so names, and all that is
// made from them, are the same in every run.
#pragma once

#include "common/cuda/elements.cuh"
#include "common/cuda/reduce.cuh"
#include "repetition/formula.h"

namespace masked_loss_ext::cuda {

constexpr int kRepetitionThreads = 256;
constexpr int kRepetitionWarps = kRepetitionThreads / kWarpSize;
constexpr int kRepetitionBlocks = 4;  // per multiprocessor; for more, the compiler spills registers

__device__ __forceinline__ void fill(int32_t* data, int64_t count, int32_t value) {
  for (int64_t i = threadIdx.x; i < count; i += kRepetitionThreads) data[i] = value;
}

// Where the block's scratch lies: in shared memory where that was launched, else in `global`.
__device__ __forceinline__ RowScratch block_scratch(uint8_t* global, int length, bool contexts) {
  if (!global) return scratch_at(dynamic_shared<uint8_t>(), length);
  return scratch_at(global + blockIdx.x * scratch_bytes(length, contexts), length);
}

// The slot that holds the key of i, and i or a smaller position.
__device__ __forceinline__ int32_t claim_slot(const RowScratch& s, int i, uint64_t last_slot) {
  const uint64_t key = s.keys[i];
  uint64_t slot = first_slot(key, last_slot);
  for (;; slot = (slot + 1) & last_slot) {
    // A slot that is taken keeps its key, so a position that is no longer the smallest decides as well.
    const int32_t holder = atomicCAS(s.slots + slot, kEmptySlot, i);
    if (holder == kEmptySlot) break;
    if (s.keys[holder] != key) continue;
    if (i < holder) atomicMin(s.slots + slot, i);
    break;
  }
  return static_cast<int32_t>(slot);
}

// Replaces names, of which those that exist are not kNoName, by those of the keys. Every thread calls it;
// what was written before it is seen, and what it writes is seen after it.
__device__ __forceinline__ void name_keys(const RowScratch& s, int length) {
  const int64_t slots = slots_for(length);
  fill(s.slots, slots, kEmptySlot);
  __syncthreads();
  for (int i = threadIdx.x; i < length; i += kRepetitionThreads) {
    if (s.names[i] != kNoName) s.names[i] = claim_slot(s, i, slots - 1);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < length; i += kRepetitionThreads) {
    if (s.names[i] != kNoName) s.names[i] = s.slots[s.names[i]];
  }
  __syncthreads();
}

__device__ __forceinline__ void name_tokens(const TokenRows& in, int64_t row, const RowScratch& s) {
  const int64_t token = row * in.token_stride[0], valid = row * in.valid_stride[0];
  for (int i = threadIdx.x; i < in.length; i += kRepetitionThreads) {
    const bool on = !in.valid.data || is_on(in.valid, valid + i * in.valid_stride[1]);
    s.names[i] = on ? 0 : kNoName;
    if (on) s.keys[i] = static_cast<uint64_t>(load<int64_t>(in.tokens, token + i * in.token_stride[1]));
  }
  name_keys(s, in.length);
}

// From the names of windows of `part` tokens to those of `window`.
__device__ __forceinline__ void name_windows(const RowScratch& s, int length, int64_t part,
                                             int64_t window) {
  while (part < window) {
    const int64_t joined = joined_length(part, window, length);
    // Names are read by other threads than the one that overwrites them: first all keys, then the names.
    // No key has all bits set: its first half would be kNoName.
    for (int i = threadIdx.x; i < length; i += kRepetitionThreads) {
      uint64_t key = 0;
      const bool exists = joined_key(s.names, length, i, part, joined, &key);
      s.keys[i] = exists ? key : ~uint64_t(0);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < length; i += kRepetitionThreads) {
      s.names[i] = s.keys[i] == ~uint64_t(0) ? kNoName : 0;
    }
    name_keys(s, length);
    part = joined;
  }
}

// Length of the longest run. Each tile of positions knows from ballots where the run that
// each is in began; `began` is that of the last position so far.
__device__ __forceinline__ int32_t longest_run(const int32_t* names, int length, int32_t* scratch) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  int32_t began = 0, longest = 0;
  for (int first = 0; first < length; first += kRepetitionThreads) {
    const int32_t t = first + static_cast<int32_t>(threadIdx.x);
    const int32_t warp_first = t - lane;
    const bool starts = t >= length || !continues_run(names, t);
    const unsigned starting = __ballot_sync(kFullWarp, starts);
    if (lane == 0) scratch[warp] = starting ? warp_first + 31 - __clz(starting) : -1;
    __syncthreads();
    int32_t start = began;
    for (int w = 0; w < kRepetitionWarps; ++w) {
      if (w < warp && scratch[w] >= 0) start = scratch[w];
      if (scratch[w] >= 0) began = scratch[w];
    }
    const unsigned up_to_here = starting & (0xffffffffu >> (31 - lane));
    if (up_to_here) start = warp_first + 31 - __clz(up_to_here);
    if (t < length && names[t] != kNoName) longest = max(longest, t - start + 1);
    __syncthreads();  // scratch is written for the next tile
  }
  longest = group_max(longest, kWarpSize);
  if (lane == 0) scratch[warp] = longest;
  __syncthreads();
  for (int w = 0; w < kRepetitionWarps; ++w) longest = max(longest, scratch[w]);
  return longest;
}

// Counts windows from their names, with the slots as counters.
__device__ __forceinline__ void count_windows(const RowScratch& s, int length, int64_t row,
                                              const CountPointers& out,
                                              int64_t (*scratch)[kRepetitionWarps]) {
  fill(s.slots, length, 0);
  __syncthreads();
  int64_t pairs = 0, windows = 0, distinct = 0;
  for (int i = threadIdx.x; i < length; i += kRepetitionThreads) {
    if (s.names[i] == kNoName) continue;
    atomicAdd(s.slots + s.names[i], 1);
    ++windows;
    distinct += s.names[i] == i;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < length; i += kRepetitionThreads) {
    const int64_t count = s.slots[i];
    pairs += count * (count - 1) / 2;
  }
  pairs = block_sum(pairs, scratch[0]);
  windows = block_sum(windows, scratch[1]);
  distinct = block_sum(distinct, scratch[2]);
  if (threadIdx.x == 0) {
    out.pairs[row] = pairs;
    out.windows[row] = windows;
    out.distinct[row] = distinct;
  }
  __syncthreads();  // the scratch and the slots serve the next row
}

// grid: [rows] or less, in steps; block: kRepetitionThreads.
__global__ void __launch_bounds__(kRepetitionThreads, kRepetitionBlocks)
    repetition_counts_kernel(TokenRows in, uint8_t* scratch, CountPointers out)
{
  __shared__ int32_t run_scratch[kRepetitionWarps];
  __shared__ int64_t sum_scratch[3][kRepetitionWarps];
  const RowScratch s = block_scratch(scratch, in.length, false);
  for (int64_t row = blockIdx.x; row < in.rows; row += gridDim.x) {
    name_tokens(in, row, s);
    const int32_t longest = longest_run(s.names, in.length, run_scratch);
    if (threadIdx.x == 0) out.longest_run[row] = longest;
    // Windows longer than the row: joining any two tokens beyond it leaves no name.
    name_windows(s, in.length, 1, in.ngram);
    count_windows(s, in.length, row, out, sum_scratch);
  }
}

// Calls f(u, i) for every full window i and the latest full window u before it with the same group: a
// window of the same tile of threads for which passed_over(u, i) does not hold, or the latest that the
// slots know from the tiles before.
template <class Passed, class F>
__device__ __forceinline__ void for_each_earlier(const RowScratch& s, int length,
                                                 const int32_t* group, int32_t* tile,
                                                 const Passed& passed_over, const F& f) {
  fill(s.slots, length, kEmptySlot);
  for (int first = 0; first < length; first += kRepetitionThreads) {
    const int i = first + static_cast<int>(threadIdx.x);
    const int32_t own = i < length && s.names[i] != kNoName ? group[i] : kNoName;
    tile[threadIdx.x] = own;
    __syncthreads();
    int32_t earlier = kEmptySlot;
    if (own != kNoName && own < i) {  // else nothing before has its name
      int j = static_cast<int>(threadIdx.x) - 1;
      while (j >= 0 && (tile[j] != own || passed_over(first + j, i))) --j;
      earlier = j >= 0 ? first + j : s.slots[own];
    }
    if (earlier != kEmptySlot) f(earlier, i);
    __syncthreads();
    if (own != kNoName) atomicMax(s.slots + own, i);
    __syncthreads();
  }
}

// grid: [rows] or less, in steps; block: kRepetitionThreads.
__global__ void __launch_bounds__(kRepetitionThreads, kRepetitionBlocks)
    repetition_links_kernel(TokenRows in, uint8_t* scratch, LinkPointers out)
{
  __shared__ int32_t tile[kRepetitionThreads];
  const RowScratch s = block_scratch(scratch, in.length, true);
  const int64_t last = in.ngram - 1;  // of a window, from its first
  for (int64_t row = blockIdx.x; row < in.rows; row += gridDim.x) {
    int32_t* context_before = out.context_before + row * in.length;
    int32_t* ngram_after = out.ngram_after + row * in.length;
    fill(context_before, in.length, -1);
    fill(ngram_after, in.length, static_cast<int32_t>(in.length));
    name_tokens(in, row, s);
    name_windows(s, in.length, 1, last);
    for (int i = threadIdx.x; i < in.length; i += kRepetitionThreads) {
      s.contexts[i] = last > 0 ? s.names[i] : 0;
    }
    __syncthreads();
    name_windows(s, in.length, last > 0 ? last : 1, in.ngram);
    // What differs from a window differs from all that are equal to it: in tiles before, links are known.
    const auto same = [&](int64_t earlier, int64_t i) { return s.names[earlier] == s.names[i]; };
    for_each_earlier(s, in.length, s.contexts, tile, same, [&](int64_t earlier, int64_t i) {
      context_before[i + last] = same(earlier, i) ? context_before[earlier + last]
                                                  : static_cast<int32_t>(earlier + last);
    });
    const auto none = [](int64_t, int64_t) { return false; };
    for_each_earlier(s, in.length, s.names, tile, none, [&](int64_t earlier, int64_t i) {
      ngram_after[earlier + last] = static_cast<int32_t>(i + last);
    });
  }
}

}  // namespace masked_loss_ext::cuda
