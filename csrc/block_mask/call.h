// SPDX-License-Identifier: BSD-3-Clause
// What the CPU and the CUDA side of the block-mask operators do before a kernel runs: check, allocate,
// describe. `Allocate` is (like, sizes, dtype) -> Tensor.
#pragma once

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "block_mask/formula.h"
#include "common/checks.h"

namespace masked_loss_ext {

constexpr int64_t kMaxLength = 2147483647;  // positions are int32 in the results

inline void check_tensor_kind(const char* op, const char* name, const Tensor& tensor, ScalarType type,
                              int64_t dims, const char* layout) {
  if (tensor.scalar_type() == type && tensor.dim() == dims) return;
  fail(op, ": ", name, " must be ", type == ScalarType::Int ? "int32 " : "int64 ", layout, ", got ",
       torch::headeronly::toString(tensor.scalar_type()), " ", shape_text(tensor));
}

inline PackedMode parse_mode(const char* op, const std::string& name) {
  if (name == "full") return PackedMode::kFull;
  if (name == "causal") return PackedMode::kCausal;
  if (name == "causal_last") return PackedMode::kCausalLast;
  if (name == "prefix") return PackedMode::kPrefix;
  fail(op, ": mode must be full, causal, causal_last or prefix, got ", name);
}

inline DroppedQueries parse_dropped(const char* op, const std::string& name) {
  if (name == "none") return DroppedQueries::kNone;
  if (name == "self") return DroppedQueries::kSelf;
  if (name == "attend") return DroppedQueries::kAttend;
  fail(op, ": dropped must be none, self or attend, got ", name);
}

// --- interval_block_lists

struct BlockGrid {
  int64_t q_block, kv_block, q_blocks, kv_blocks;
};

inline BlockGrid block_grid(const char* op, int64_t batch, int64_t rows, int64_t kv_len,
                            int64_t q_block, int64_t kv_block) {
  check_length(op, "q_block", q_block, 1, kMaxLength);
  check_length(op, "kv_block", kv_block, 1, kMaxLength);
  const BlockGrid grid = {q_block, kv_block, (rows + q_block - 1) / q_block,
                          (kv_len + kv_block - 1) / kv_block};
  // The lists have an entry per pair; each side is below 2^31, so the product of two fits.
  const int64_t pairs = grid.q_blocks * grid.kv_blocks;
  if (pairs > 0 && batch > kLargestLength / pairs) {
    fail(op, ": q_block and kv_block must leave at most ", kLargestLength, " pairs of blocks, got ",
         batch, " x ", grid.q_blocks, " x ", grid.kv_blocks);
  }
  return grid;
}

inline IntervalRows interval_rows(const char* op, const Tensor& lo, const Tensor& hi, int64_t kv_len) {
  check_tensor_kind(op, "lo", lo, ScalarType::Int, 3, "[B, R, Sq]");
  if (lo.size(1) > kMaxIntervals) {
    fail(op, ": lo must have at most ", kMaxIntervals, " intervals per row, got ", shape_text(lo));
  }
  check_length(op, "the number of rows", lo.size(2), 0, kMaxLength);
  check_tensor_kind(op, "hi", hi, ScalarType::Int, 3, "[B, R, Sq]");
  for (int64_t d = 0; d < 3; ++d) {
    if (hi.size(d) != lo.size(d)) {
      fail(op, ": hi must have the shape of lo ", shape_text(lo), ", got ", shape_text(hi));
    }
  }
  check_same_device(op, "hi", hi, lo, "lo");
  check_length(op, "kv_len", kv_len, 0, kMaxLength);
  IntervalRows in = {};
  in.lo = lo.const_data_ptr<int32_t>();
  in.hi = hi.const_data_ptr<int32_t>();
  for (int d = 0; d < 3; ++d) {
    in.lo_stride[d] = lo.stride(d);
    in.hi_stride[d] = hi.stride(d);
  }
  in.batch = lo.size(0);
  in.rows = lo.size(2);
  in.kv_len = kv_len;
  in.intervals = static_cast<int>(lo.size(1));
  return in;
}

// One direction of the lists: of `partial` and of full blocks, which and how many in each of n rows.
struct ListTensors {
  Tensor partial_count, partial, full_count, full;
};

struct ListPointers {
  int32_t* partial_count;  // [batch, rows of the list]
  int32_t* partial;        // [batch, rows of the list, columns]
  int32_t* full_count;
  int32_t* full;
};

template <class Allocate>
ListTensors allocate_lists(const Allocate& allocate, const Tensor& like, int64_t batch, int64_t rows,
                           int64_t columns, bool needed = true) {
  const std::vector<int64_t> none = {0};
  const std::vector<int64_t> counts = needed ? std::vector<int64_t>{batch, 1, rows} : none;
  const std::vector<int64_t> lists = needed ? std::vector<int64_t>{batch, 1, rows, columns} : none;
  const ScalarType type = ScalarType::Int;
  return {allocate(like, counts, type), allocate(like, lists, type), allocate(like, counts, type),
          allocate(like, lists, type)};
}

inline ListPointers pointers_of(const ListTensors& t) {
  return {t.partial_count.mutable_data_ptr<int32_t>(), t.partial.mutable_data_ptr<int32_t>(),
          t.full_count.mutable_data_ptr<int32_t>(), t.full.mutable_data_ptr<int32_t>()};
}

using EightTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

inline EightTensors as_results(const ListTensors& kv, const ListTensors& q) {
  return {kv.partial_count, kv.partial, kv.full_count, kv.full,
          q.partial_count,  q.partial,  q.full_count,  q.full};
}

// --- packed_rows

struct PackedArguments {
  const Tensor& offsets;
  const Tensor& kept;
  int64_t rows;
  const std::string& mode;
  std::optional<int64_t> left, right;
  const std::optional<Tensor>& prefix;
  int64_t sinks;
  const std::string& dropped;
};

inline void check_packed_tensors(const char* op, const PackedArguments& a) {
  check_tensor_kind(op, "segment_offsets", a.offsets, ScalarType::Long, 1, "[N * G + 1]");
  check_tensor_kind(op, "kept", a.kept, ScalarType::Long, 2, "[N, G]");
  if (a.kept.size(1) < 1) fail(op, ": kept must have a segment per sample, got ", shape_text(a.kept));
  if (a.offsets.size(0) != a.kept.size(0) * a.kept.size(1) + 1) {
    fail(op, ": segment_offsets must have one entry more than kept ", shape_text(a.kept), ", got ",
         shape_text(a.offsets));
  }
  check_same_device(op, "segment_offsets", a.offsets, a.kept, "kept");
}

inline void check_prefix(const char* op, const PackedArguments& a, PackedMode mode) {
  if (a.prefix.has_value() != (mode == PackedMode::kPrefix)) {
    fail(op, ": prefix must be given for mode prefix and for no other, got ",
         a.prefix ? "one" : "None", " for mode ", a.mode);
  }
  if (!a.prefix) return;
  check_tensor_kind(op, "prefix", *a.prefix, ScalarType::Long, 1, "[N]");
  if (a.prefix->size(0) != a.kept.size(0)) {
    fail(op, ": prefix must have an entry per sample of kept ", shape_text(a.kept), ", got ",
         shape_text(*a.prefix));
  }
  check_same_device(op, "prefix", *a.prefix, a.kept, "kept");
}

inline int64_t window_side(const char* op, const char* name, const std::optional<int64_t>& side,
                           int64_t rows) {
  if (!side) return -1;
  check_length(op, name, *side);
  return smaller(*side, rows);
}

// Checks all arguments; lo and hi are set by set_intervals().
inline PackedRows packed_rows_of(const char* op, const PackedArguments& a) {
  check_packed_tensors(op, a);
  check_length(op, "rows", a.rows, 0, kMaxLength);
  PackedRows p = {};
  p.mode = parse_mode(op, a.mode);
  p.left = window_side(op, "window_left", a.left, a.rows);
  p.right = window_side(op, "window_right", a.right, a.rows);
  check_prefix(op, a, p.mode);
  check_length(op, "sinks", a.sinks);
  p.dropped = parse_dropped(op, a.dropped);
  const bool front = a.sinks > 0 || p.mode == PackedMode::kCausalLast || p.mode == PackedMode::kPrefix;
  const int64_t pieces = front && (a.left || a.right) ? 2 : 1;
  if (a.kept.size(1) * pieces > kMaxIntervals) {
    fail(op, ": kept must have at most ", kMaxIntervals / pieces, " segments per sample",
         pieces == 2 ? " where a window stands beside a prefix or sinks" : "", ", got ",
         shape_text(a.kept));
  }
  p.offsets = a.offsets.const_data_ptr<int64_t>();
  p.kept = a.kept.const_data_ptr<int64_t>();
  p.prefix = a.prefix ? a.prefix->const_data_ptr<int64_t>() : nullptr;
  p.offset_stride = a.offsets.stride(0);
  p.kept_stride[0] = a.kept.stride(0);
  p.kept_stride[1] = a.kept.stride(1);
  p.prefix_stride = a.prefix ? a.prefix->stride(0) : 0;
  p.samples = a.kept.size(0);
  p.segments = static_cast<int>(a.kept.size(1));
  p.slots = static_cast<int>(p.segments * pieces);
  p.rows = a.rows;
  p.sinks = smaller(a.sinks, a.rows);
  return p;
}

inline void set_intervals(PackedRows& p, const Tensor& lo, const Tensor& hi) {
  p.lo = lo.mutable_data_ptr<int32_t>();
  p.hi = hi.mutable_data_ptr<int32_t>();
}

// The intervals that packed rows consist of, as input of the block lists.
inline IntervalRows interval_rows_of(const PackedRows& p) {
  IntervalRows in = {p.lo, p.hi, {0, p.rows, 1}, {0, p.rows, 1}, 1, p.rows, p.rows, p.slots};
  return in;
}

}  // namespace masked_loss_ext
