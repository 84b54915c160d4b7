// SPDX-License-Identifier: BSD-3-Clause
// The block-mask operators on CUDA: launches. Nothing here waits for the device.
#include "block_mask/cuda/kernels.cuh"

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/cuda/runtime.cuh"

namespace masked_loss_ext::cuda {
namespace {

constexpr int64_t kMaxBlocks = 1 << 16;  // kernels take what is beyond in steps of the grid

dim3 blocks_for(int64_t items, int64_t per_block) {
  return dim3(static_cast<unsigned>(std::min((items + per_block - 1) / per_block, kMaxBlocks)));
}

void launch_packed_rows(const char* op, const PackedRows& p, const Tensor& like) {
  if (p.rows == 0) return;
  check_launch(op, launch(current_stream(like), blocks_for(p.rows, kBlockMaskThreads),
                          dim3(kBlockMaskThreads), 0, packed_rows_kernel, p));
}

// Two launches: classes, then all lists.
void launch_block_lists(const char* op, const IntervalRows& in, const BlockGrid& grid,
                        const ListPointers& kv, const ListPointers& q, bool transposes,
                        const Tensor& like) {
  const int64_t rows = in.batch * grid.q_blocks, lists = rows + (transposes ? in.batch * grid.kv_blocks : 0);
  if (lists == 0) return;
  Tensor classes = device_empty(like, {rows * grid.kv_blocks}, ScalarType::Byte);
  uint8_t* class_data = static_cast<uint8_t*>(classes.mutable_data_ptr());
  const cudaStream_t stream = current_stream(like);
  if (rows > 0 && grid.kv_blocks > 0) {
    check_launch(op, launch(stream, blocks_for(rows, 1), dim3(kBlockMaskThreads), 0,
                            block_classes_kernel, in, grid, class_data));
  }
  check_launch(op, launch(stream, blocks_for(lists, kWarpsPerBlock), dim3(kBlockMaskThreads), 0,
                          block_lists_kernel, class_data, in.batch, grid, kv, q, transposes));
}

EightTensors interval_block_lists_cuda(const Tensor& lo, const Tensor& hi, int64_t kv_len,
                                       int64_t q_block, int64_t kv_block, bool transposes) {
  constexpr const char* op = "interval_block_lists";
  const IntervalRows in = interval_rows(op, lo, hi, kv_len);
  const BlockGrid grid = block_grid(op, in.batch, in.rows, kv_len, q_block, kv_block);
  const DeviceScope scope(lo);
  const ListTensors kv = allocate_lists(device_empty, lo, in.batch, grid.q_blocks, grid.kv_blocks);
  const ListTensors q =
      allocate_lists(device_empty, lo, in.batch, grid.kv_blocks, grid.q_blocks, transposes);
  launch_block_lists(op, in, grid, pointers_of(kv), pointers_of(q), transposes, lo);
  return as_results(kv, q);
}

std::tuple<Tensor, Tensor> allocate_intervals(const PackedRows& p, const Tensor& like) {
  const std::vector<int64_t> sizes = {p.slots, p.rows};
  return {device_empty(like, sizes, ScalarType::Int), device_empty(like, sizes, ScalarType::Int)};
}

std::tuple<Tensor, Tensor> packed_rows_cuda(const Tensor& segment_offsets, const Tensor& kept,
                                            int64_t rows, std::string mode,
                                            std::optional<int64_t> window_left,
                                            std::optional<int64_t> window_right,
                                            const std::optional<Tensor>& prefix, int64_t sinks,
                                            std::string dropped) {
  constexpr const char* op = "packed_rows";
  PackedRows p = packed_rows_of(op, {segment_offsets, kept, rows, mode, window_left, window_right,
                                     prefix, sinks, dropped});
  const DeviceScope scope(kept);
  const auto intervals = allocate_intervals(p, kept);
  set_intervals(p, std::get<0>(intervals), std::get<1>(intervals));
  launch_packed_rows(op, p, kept);
  return intervals;
}

using TenTensors = decltype(std::tuple_cat(std::tuple<Tensor, Tensor>(), EightTensors()));

TenTensors nested_dropout_plan_cuda(const Tensor& segment_offsets, const Tensor& kept, int64_t rows,
                                    std::string mode, std::optional<int64_t> window_left,
                                    std::optional<int64_t> window_right,
                                    const std::optional<Tensor>& prefix, int64_t sinks,
                                    std::string dropped, int64_t q_block, int64_t kv_block) {
  constexpr const char* op = "nested_dropout_plan";
  PackedRows p = packed_rows_of(op, {segment_offsets, kept, rows, mode, window_left, window_right,
                                     prefix, sinks, dropped});
  const BlockGrid grid = block_grid(op, 1, rows, rows, q_block, kv_block);
  const DeviceScope scope(kept);
  const auto intervals = allocate_intervals(p, kept);
  set_intervals(p, std::get<0>(intervals), std::get<1>(intervals));
  const ListTensors kv = allocate_lists(device_empty, kept, 1, grid.q_blocks, grid.kv_blocks);
  const ListTensors q = allocate_lists(device_empty, kept, 1, grid.kv_blocks, grid.q_blocks);
  launch_packed_rows(op, p, kept);
  launch_block_lists(op, interval_rows_of(p), grid, pointers_of(kv), pointers_of(q), true, kept);
  return std::tuple_cat(intervals, as_results(kv, q));
}

}  // namespace
}  // namespace masked_loss_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(MASKED_LOSS_EXT_CUDA_LIBRARY, MASKED_LOSS_EXT_CUDA_KEY, m) {
  m.impl("interval_block_lists", TORCH_BOX(&masked_loss_ext::cuda::interval_block_lists_cuda));
  m.impl("packed_rows", TORCH_BOX(&masked_loss_ext::cuda::packed_rows_cuda));
  m.impl("nested_dropout_plan", TORCH_BOX(&masked_loss_ext::cuda::nested_dropout_plan_cuda));
}
