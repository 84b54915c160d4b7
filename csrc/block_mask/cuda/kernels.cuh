// SPDX-License-Identifier: BSD-3-Clause
// The block-mask operators on CUDA: row intervals, one thread per row; a class byte per pair of blocks,
// one block per q-block, from difference arrays in shared memory; and the lists, one warp per row of
// them, which read the bytes along rows and along columns. Integers are added atomically, in any order
// the same sum.
#pragma once

#include "block_mask/formula.h"
#include "common/cuda/reduce.cuh"

namespace masked_loss_ext::cuda {

constexpr int kBlockMaskThreads = 256;
constexpr int kWarpsPerBlock = kBlockMaskThreads / kWarpSize;
constexpr int kColumnsPerThread = 8;
constexpr int kTileColumns = kBlockMaskThreads * kColumnsPerThread;  // 16 KB of differences

// The intervals of row t of packed samples; returns how many.
__device__ __forceinline__ int packed_row(const PackedRows& p, int64_t t, Interval* out) {
  const int64_t segment = segment_of_row(p, t);
  if (segment < 0 || segment >= p.samples * p.segments) return 0;
  const Sample sample = load_sample(p, segment / p.segments);
  return attended_by(p, sample, t, t < visible_end(p, segment), out);
}

// grid: any; block: any. One thread per row, in steps of the grid.
__global__ void __launch_bounds__(kBlockMaskThreads) packed_rows_kernel(PackedRows p) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t t = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; t < p.rows; t += step) {
    Interval intervals[kMaxIntervals];
    store_row(p, t, intervals, packed_row(p, t, intervals));
  }
}

// Adds one row's interval to the differences of the kv-blocks [first, first + kTileColumns).
__device__ __forceinline__ void add_clipped(int* differences, int begin, int end, int64_t first) {
  const int64_t from = larger(begin - first, 0), to = smaller(end - first, kTileColumns);
  if (from >= to) return;
  atomicAdd(&differences[from], 1);
  if (to < kTileColumns) atomicAdd(&differences[to], -1);
}

// The rows are those of `in`, or packed ones (packed.lo is not null), which are written on the way.
__device__ __forceinline__ void add_rows(const IntervalRows& in, const PackedRows& packed,
                                         const BlockGrid& grid, BlockSize kv_block,
                                         int64_t row_of_blocks, int64_t first, int* touched,
                                         int* covered) {
  const int64_t b = row_of_blocks / grid.q_blocks, q_block = row_of_blocks % grid.q_blocks;
  const int64_t end = smaller(in.rows, (q_block + 1) * grid.q_block);
  for (int64_t q = q_block * grid.q_block + threadIdx.x; q < end; q += kBlockMaskThreads) {
    Interval intervals[kMaxIntervals];
    int count;
    if (packed.lo == nullptr) {
      count = load_row(in, b, q, intervals);
    } else {
      count = packed_row(packed, q, intervals);
      if (first == 0) store_row(packed, q, intervals, count);
    }
    for (int i = 0; i < count; ++i) {
      const BlockRange range = blocks_of(intervals[i], kv_block);
      add_clipped(touched, range.touched_begin, range.touched_end, first);
      add_clipped(covered, range.covered_begin, range.covered_end, first);
    }
  }
}

// grid: [batch * q_blocks] or less, in steps; block: kBlockMaskThreads. Writes the classes of one q-block,
// a tile of kv-blocks at a time, however many there are.
__global__ void __launch_bounds__(kBlockMaskThreads, 4)  // ptxas left to itself spills for sm_120
    block_classes_kernel(IntervalRows in, PackedRows packed, BlockGrid grid,
                         uint8_t* classes)  // [batch, q_blocks, kv_blocks]
{
  __shared__ int touched[kTileColumns];
  __shared__ int covered[kTileColumns];
  __shared__ int touched_sums[kWarpsPerBlock];
  __shared__ int covered_sums[kWarpsPerBlock];
  const BlockSize kv_block = block_size(grid.kv_block);
  const int64_t rows_of_blocks = in.batch * grid.q_blocks;
  for (int64_t i = blockIdx.x; i < rows_of_blocks; i += gridDim.x) {
    for (int64_t first = 0; first < grid.kv_blocks; first += kTileColumns) {
      for (int j = threadIdx.x; j < kTileColumns; j += kBlockMaskThreads) touched[j] = covered[j] = 0;
      __syncthreads();
      add_rows(in, packed, grid, kv_block, i, first, touched, covered);
      __syncthreads();
      const int begin = threadIdx.x * kColumnsPerThread;
      int touching = 0, covering = 0, total;
      for (int j = begin; j < begin + kColumnsPerThread; ++j) {
        touching += touched[j];
        covering += covered[j];
      }
      touching = sum_before<kWarpsPerBlock>(touching, touched_sums, &total);
      covering = sum_before<kWarpsPerBlock>(covering, covered_sums, &total);
      for (int j = begin; j < begin + kColumnsPerThread && first + j < grid.kv_blocks; ++j) {
        touching += touched[j];
        covering += covered[j];
        classes[i * grid.kv_blocks + first + j] =
            covering == grid.q_block ? kFullBlock : touching > 0 ? kPartialBlock : kEmptyBlock;
      }
      __syncthreads();  // the differences are cleared for the next tile
    }
  }
}

// Writes one list of `n` entries: those of a class ascending, then all others ascending. `rank` of the
// class comes before the 32 entries that begin at `first`; returns the rank behind them.
__device__ __forceinline__ int write_entries(bool present, int64_t first, int64_t n, int rank, int count,
                                             int32_t* list) {
  const int lane = threadIdx.x % kWarpSize;
  const unsigned ballot = __ballot_sync(kFullWarp, present);
  const int before = rank + __popc(ballot & ((1u << lane) - 1));
  const int64_t entry = first + lane;
  if (entry < n) list[present ? before : count + (entry - before)] = static_cast<int32_t>(entry);
  return rank + __popc(ballot);
}

// One row of the lists, by one warp: entry i has the class classes[i * stride].
__device__ __forceinline__ void write_lists(const uint8_t* classes, int64_t stride, int64_t n, int64_t row,
                                            const ListPointers& out) {
  const int lane = threadIdx.x % kWarpSize;
  int partial = 0, full = 0;
  for (int64_t i = lane; i < n; i += kWarpSize) {
    const uint8_t one = classes[i * stride];
    partial += one == kPartialBlock;
    full += one == kFullBlock;
  }
  partial = group_sum(partial, kWarpSize);
  full = group_sum(full, kWarpSize);
  if (lane == 0) {
    out.partial_count[row] = partial;
    out.full_count[row] = full;
  }
  int partial_rank = 0, full_rank = 0;
  for (int64_t first = 0; first < n; first += kWarpSize) {
    const int64_t i = first + lane;
    const uint8_t one = i < n ? classes[i * stride] : uint8_t(kEmptyBlock);
    partial_rank = write_entries(one == kPartialBlock, first, n, partial_rank, partial,
                                 out.partial + row * n);
    full_rank = write_entries(one == kFullBlock, first, n, full_rank, full, out.full + row * n);
  }
}

// grid: any; block: kBlockMaskThreads. A warp per row of the lists: first those of the q-blocks, then,
// where `transposes`, those of the kv-blocks, neighbours of which read the same lines of the classes.
__global__ void __launch_bounds__(kBlockMaskThreads)
    block_lists_kernel(const uint8_t* classes,  // [batch, q_blocks, kv_blocks]
                       int64_t batch, BlockGrid grid, ListPointers kv, ListPointers q, bool transposes) {
  const int64_t kv_rows = batch * grid.q_blocks, q_rows = transposes ? batch * grid.kv_blocks : 0;
  const int64_t warps = int64_t(gridDim.x) * kWarpsPerBlock;
  const int64_t own = int64_t(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarpSize;
  for (int64_t i = own; i < kv_rows + q_rows; i += warps) {
    if (i < kv_rows) {
      write_lists(classes + i * grid.kv_blocks, 1, grid.kv_blocks, i, kv);
    } else {
      const int64_t row = i - kv_rows, b = row / grid.kv_blocks, j = row % grid.kv_blocks;
      write_lists(classes + b * grid.q_blocks * grid.kv_blocks + j, grid.kv_blocks, grid.q_blocks, row, q);
    }
  }
}

}  // namespace masked_loss_ext::cuda
