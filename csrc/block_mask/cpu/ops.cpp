// SPDX-License-Identifier: BSD-3-Clause
// The block-mask operators on CPU: checks, allocation, results.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common/cpu/device.h"
#include "block_mask/cpu/kernels.h"
#include "common/cpu/parallel.h"

namespace masked_loss_ext {
namespace {

constexpr int64_t kRowsPerChunk = 1 << 19;  // a quarter of a millisecond

// The operators never write where offsets are wrong, but here they can be looked at.
void check_offsets(const char* op, const PackedRows& p) {
  int64_t before = 0;
  const int64_t last = p.samples * p.segments;
  for (int64_t i = 0; i <= last; ++i) {
    const int64_t offset = p.offsets[i * p.offset_stride];
    if (offset < before) {
      fail(op, ": segment_offsets must ascend from 0 or more, got ", offset, " at ", i);
    }
    before = offset;
  }
  if (before > p.rows) {
    fail(op, ": segment_offsets must end within the ", p.rows, " rows, got ", before);
  }
}

EightTensors interval_block_lists_cpu(const Tensor& lo, const Tensor& hi, int64_t kv_len,
                                      int64_t q_block, int64_t kv_block, bool transposes) {
  constexpr const char* op = "interval_block_lists";
  const IntervalRows in = interval_rows(op, lo, hi, kv_len);
  const BlockGrid grid = block_grid(op, in.batch, in.rows, kv_len, q_block, kv_block);
  const ListTensors kv = allocate_lists(empty_tensor, lo, in.batch, grid.q_blocks, grid.kv_blocks);
  const ListTensors q =
      allocate_lists(empty_tensor, lo, in.batch, grid.kv_blocks, grid.q_blocks, transposes);
  const ListPointers q_pointers = pointers_of(q);
  fill_block_lists(in, grid, pointers_of(kv), transposes ? &q_pointers : nullptr, nullptr);
  return as_results(kv, q);
}

std::tuple<Tensor, Tensor> allocate_intervals(const PackedRows& p, const Tensor& like) {
  return {empty_tensor(like, {p.slots, p.rows}, ScalarType::Int),
          empty_tensor(like, {p.slots, p.rows}, ScalarType::Int)};
}

std::tuple<Tensor, Tensor> packed_rows_cpu(const Tensor& segment_offsets, const Tensor& kept,
                                           int64_t rows, const std::string& mode,
                                           std::optional<int64_t> window_left,
                                           std::optional<int64_t> window_right,
                                           const std::optional<Tensor>& prefix, int64_t sinks,
                                           const std::string& dropped) {
  constexpr const char* op = "packed_rows";
  PackedRows p = packed_rows_of(op, {segment_offsets, kept, rows, mode, window_left, window_right,
                                     prefix, sinks, dropped});
  check_offsets(op, p);
  const auto [lo, hi] = allocate_intervals(p, kept);
  set_intervals(p, lo, hi);
  for_each_chunk((rows + kRowsPerChunk - 1) / kRowsPerChunk, [&](int64_t chunk) {
    fill_packed_rows(p, chunk * kRowsPerChunk, std::min(rows, (chunk + 1) * kRowsPerChunk));
  });
  return {lo, hi};
}

using TenTensors = decltype(std::tuple_cat(std::tuple<Tensor, Tensor>(), EightTensors()));

TenTensors nested_dropout_plan_cpu(const Tensor& segment_offsets, const Tensor& kept, int64_t rows,
                                   const std::string& mode, std::optional<int64_t> window_left,
                                   std::optional<int64_t> window_right,
                                   const std::optional<Tensor>& prefix, int64_t sinks,
                                   const std::string& dropped, int64_t q_block, int64_t kv_block) {
  constexpr const char* op = "nested_dropout_plan";
  PackedRows p = packed_rows_of(op, {segment_offsets, kept, rows, mode, window_left, window_right,
                                     prefix, sinks, dropped});
  check_offsets(op, p);
  const BlockGrid grid = block_grid(op, 1, rows, rows, q_block, kv_block);
  const auto intervals = allocate_intervals(p, kept);
  set_intervals(p, std::get<0>(intervals), std::get<1>(intervals));
  const ListTensors kv = allocate_lists(empty_tensor, kept, 1, grid.q_blocks, grid.kv_blocks);
  const ListTensors q = allocate_lists(empty_tensor, kept, 1, grid.kv_blocks, grid.q_blocks);
  const ListPointers q_pointers = pointers_of(q);
  fill_block_lists(interval_rows_of(p), grid, pointers_of(kv), &q_pointers, &p);
  return std::tuple_cat(intervals, as_results(kv, q));
}

}  // namespace
}  // namespace masked_loss_ext

STABLE_TORCH_LIBRARY_IMPL(masked_loss_ext, CPU, m) {
  m.impl("interval_block_lists", TORCH_BOX(&masked_loss_ext::interval_block_lists_cpu));
  m.impl("packed_rows", TORCH_BOX(&masked_loss_ext::packed_rows_cpu));
  m.impl("nested_dropout_plan", TORCH_BOX(&masked_loss_ext::nested_dropout_plan_cpu));
}
