// SPDX-License-Identifier: BSD-3-Clause
// The logit-free cross entropy on CUDA, around its products: which rows take part, in order; their copies there
// and back; what is added to what a product has left.
#pragma once

#include "cross_entropy/cuda/launch.cuh"
#include "linear_cross_entropy/cuda/launches.h"
#include "linear_cross_entropy/flow.h"

namespace masked_loss_ext::cuda {

constexpr int kRowTiles = 4;  // of a block's threads
constexpr int64_t kRowsOfBlock = kRowTiles * kThreads;
constexpr int kWarpsOfBlock = kThreads / kWarpSize;
constexpr int64_t kOneTooMany = -2;  // a place at which label_of() says that the label is bad

__device__ __forceinline__ bool takes_part(const RowProblem& q, int64_t row, bool receiving) {
  if (row >= q.counted.rows || label_of<DeviceElements>(q.counted, row) == kNotCounted) return false;
  if (!receiving) return true;
  return q.row_sums.kind == Kind::kDouble ? receives<double>(q, row) : receives<float>(q, row);
}

__device__ __forceinline__ int64_t row_of_tile(int tile) {
  return blockIdx.x * kRowsOfBlock + tile * kThreads + threadIdx.x;
}

// How many of its rows take part, by each block. grid: ceil(rows / kRowsOfBlock); block: kThreads.
__global__ void __launch_bounds__(kThreads)
    linear_kept_counts_kernel(RowProblem q, bool receiving, int64_t* counts)  // [blocks]
{
  __shared__ int64_t scratch[kMaxWarps];
  int64_t mine = 0;
  for (int tile = 0; tile < kRowTiles; ++tile) mine += takes_part(q, row_of_tile(tile), receiving);
  mine = block_sum(mine, scratch);
  if (threadIdx.x == 0) counts[blockIdx.x] = mine;
}

// A row for which there is no place is NaN, where results are made.
__device__ __forceinline__ void put_lost_row(const RowProblem& q, int64_t row) {
  if (q.row_sums.kind == Kind::kDouble) {
    put_row<double>(q, row, not_a_number());
  } else {
    put_row<float>(q, row, not_a_number());
  }
}

// The rows that take part, in order, and -1 behind them. grid, block: as above.
__global__ void __launch_bounds__(kThreads, 4)  // ptxas left to itself spills for sm_80
    linear_kept_rows_kernel(RowProblem q, bool receiving, const int64_t* counts,  // [blocks]
                            KeptPlaces kept)
{
  __shared__ int64_t scratch[2][kMaxWarps];
  __shared__ int64_t of_block[2];
  __shared__ int warps[kWarpsOfBlock];
  int64_t before = 0, total = 0;
  for (int64_t i = threadIdx.x; i < gridDim.x; i += kThreads) {
    total += counts[i];
    if (i < blockIdx.x) before += counts[i];
  }
  before = block_sum(before, scratch[0]);
  total = block_sum(total, scratch[1]);
  if (threadIdx.x == 0) {
    of_block[0] = before;
    of_block[1] = total;
    if (blockIdx.x == 0 && kept.total != nullptr) *kept.total = total;
  }
  __syncthreads();
  before = of_block[0];
  total = of_block[1];
  const bool too_many = total > kept.most;
  const int64_t places = kept.count - too_many;
  for (int tile = 0; tile < kRowTiles; ++tile) {
    const int64_t row = row_of_tile(tile);
    const bool takes = takes_part(q, row, receiving);
    int in_tile;
    const int64_t place = before + sum_before<kWarpsOfBlock>(takes, warps, &in_tile);
    if (takes && place < places) kept.index[place] = row;
    if (takes && place >= places && !receiving && q.row_sums.data != nullptr) put_lost_row(q, row);
    before += in_tile;
    __syncthreads();  // the scratch serves the next tile
  }
  const int64_t step = int64_t(gridDim.x) * kThreads;
  for (int64_t i = min(total, places) + blockIdx.x * kThreads + threadIdx.x; i < kept.count; i += step) {
    kept.index[i] = i < places ? -1 : kOneTooMany;
  }
}

// --- copies of rows ------------------------------------------------------------------------------------

// Which row this warp copies, with its place. grid: ceil(count / kWarpsOfBlock); block: kThreads.
struct WarpRow {
  int64_t row;
  int lane;
  __device__ WarpRow()
      : row(int64_t(blockIdx.x) * kWarpsOfBlock + threadIdx.x / kWarpSize), lane(threadIdx.x % kWarpSize) {}
};

// [N, D] of any strides to [count, D]; 0 where the place is negative. Unit: what is moved at once.
template <class Unit>
__global__ void __launch_bounds__(kThreads) linear_take_rows_kernel(RowCopy c) {
  const WarpRow mine;
  if (mine.row >= c.count) return;
  const int64_t place = c.index[mine.row];
  Unit* to = static_cast<Unit*>(c.to) + mine.row * c.units;
  if (place < 0) {
    for (int64_t i = mine.lane; i < c.units; i += kWarpSize) to[i] = Unit{};
    return;
  }
  const int64_t offset = offset_at(c.layout, kPrediction, place) * c.element;
  const Unit* from = reinterpret_cast<const Unit*>(static_cast<const char*>(c.from) + offset);
#pragma unroll 4
  for (int64_t i = mine.lane; i < c.units; i += kWarpSize) to[i] = from[i];
}

// [count, D] to [N, D]; rows in no place stay as they are.
template <class Unit>
__global__ void __launch_bounds__(kThreads) linear_put_rows_kernel(RowCopy c) {
  const WarpRow mine;
  if (mine.row >= c.count) return;
  const int64_t place = c.index[mine.row];
  if (place < 0) return;
  const Unit* from = static_cast<const Unit*>(c.from) + mine.row * c.units;
  Unit* to = static_cast<Unit*>(c.to) + place * c.units;
#pragma unroll 4
  for (int64_t i = mine.lane; i < c.units; i += kWarpSize) to[i] = from[i];
}

// --- beside the products -------------------------------------------------------------------------------

// sum += part; both begin on a 16-byte boundary. grid: any; block: kThreads.
template <class T>
__global__ void __launch_bounds__(kThreads) linear_add_kernel(T* sum, const T* part, int64_t count) {
  constexpr int kVector = kVectorOf<T>;
  const int64_t packs = count / kVector, step = int64_t(gridDim.x) * kThreads;
  const int64_t first = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t i = first; i < packs; i += step) {
    Vector<T> a = load_pack(sum + i * kVector);
    const Vector<T> b = load_pack(part + i * kVector);
#pragma unroll
    for (int j = 0; j < kVector; ++j) a.value[j] += b.value[j];
    *reinterpret_cast<Vector<T>*>(sum + i * kVector) = a;
  }
  for (int64_t i = packs * kVector + first; i < count; i += step) sum[i] += part[i];
}

// logits += bias, for every row. grid: (ceil(classes / kThreads), any); block: kThreads. A thread has a column.
__global__ void __launch_bounds__(kThreads)
    linear_add_bias_kernel(float* logits,  // [rows, classes]
                           Array bias,     // [classes]
                           int64_t rows, int64_t classes)
{
  const int64_t col = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (col >= classes) return;
  const float add = load<float>(bias, col);
  for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) logits[row * classes + col] += add;
}

}  // namespace masked_loss_ext::cuda
