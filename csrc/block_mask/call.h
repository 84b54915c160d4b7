// SPDX-License-Identifier: BSD-3-Clause
// The block-mask operators, for every device: arguments, checks, results. A Device is Cpu or Cuda with
// check_offsets() of packed rows, fill_rows() and fill_lists().
#pragma once

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "block_mask/formula.h"
#include "common/checks.h"
#include "common/operator.h"

namespace masked_loss_ext {

constexpr int64_t kMaxLength = 2147483647;  // positions are int32 in the results

inline void check_tensor_kind(const char* op, const char* name, const Tensor& tensor, ScalarType type,
                              int64_t dims, const char* layout) {
  const ScalarType got = type_of(op, name, tensor);
  if (got == type && tensor.dim() == dims) return;
  fail(op, ": ", name, " must be ", type == ScalarType::Int ? "int32 " : "int64 ", layout, ", got ",
       torch::headeronly::toString(got), " ", shape_text(tensor));
}

// --- block lists

struct BlockArguments {
  const int64_t q_block, kv_block;

  explicit BlockArguments(Arguments& in) : q_block(in.integer()), kv_block(in.integer()) {}
};

inline BlockGrid checked_grid(const char* op, const BlockArguments& blocks, int64_t batch, int64_t rows,
                              int64_t kv_len) {
  const auto& [q_block, kv_block] = blocks;
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

struct ListTensors {
  Tensor partial_count, partial, full_count, full;

  ListPointers pointers() const {
    return {partial_count.mutable_data_ptr<int32_t>(), partial.mutable_data_ptr<int32_t>(),
            full_count.mutable_data_ptr<int32_t>(), full.mutable_data_ptr<int32_t>()};
  }
};

template <class Device>
ListTensors empty_lists(const Tensor& like, std::vector<int64_t> counts, int64_t columns) {
  std::vector<int64_t> lists = counts;
  if (columns >= 0) lists.push_back(columns);
  const auto one = [&](const std::vector<int64_t>& sizes) {
    return Device::empty(like, sizes, ScalarType::Int);
  };
  return {one(counts), one(lists), one(counts), one(lists)};
}

using EightTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Allocates and fills the eight lists. `packed`, or null: the rows of `in`, still to be written.
template <class Device>
EightTensors block_lists(const char* op, const IntervalRows& in, const BlockGrid& grid, bool transposes,
                         const PackedRows* packed, const Tensor& like) {
  const ListTensors kv = empty_lists<Device>(like, {in.batch, 1, grid.q_blocks}, grid.kv_blocks);
  const ListTensors q = transposes
                            ? empty_lists<Device>(like, {in.batch, 1, grid.kv_blocks}, grid.q_blocks)
                            : empty_lists<Device>(like, {0}, -1);
  const ListPointers q_pointers = q.pointers();
  Device::fill_lists(op, in, grid, kv.pointers(), transposes ? &q_pointers : nullptr, packed, like);
  return {kv.partial_count, kv.partial, kv.full_count, kv.full,
          q.partial_count,  q.partial,  q.full_count,  q.full};
}

template <class Device>
struct IntervalBlockLists {
  const Tensor lo, hi;
  const int64_t kv_len;
  const BlockArguments blocks;
  const bool transposes;

  explicit IntervalBlockLists(Arguments& in)
      : lo(in.tensor()), hi(in.tensor()), kv_len(in.integer()), blocks(in), transposes(in.flag()) {}

  EightTensors run() const {
    constexpr const char* op = "interval_block_lists";
    const IntervalRows in = checked_rows(op);
    const BlockGrid grid = checked_grid(op, blocks, in.batch, in.rows, kv_len);
    const typename Device::Scope scope(lo);
    return block_lists<Device>(op, in, grid, transposes, nullptr, lo);
  }

 private:
  IntervalRows checked_rows(const char* op) const {
    check_tensor_kind(op, "lo", lo, ScalarType::Int, 3, "[B, R, Sq]");
    if (lo.size(1) > kMaxIntervals) {
      fail(op, ": lo must have at most ", kMaxIntervals, " intervals per row, got ", shape_text(lo));
    }
    check_length(op, "the number of rows", lo.size(2), 0, kMaxLength);
    check_tensor_kind(op, "hi", hi, ScalarType::Int, 3, "[B, R, Sq]");
    check_same_shape(op, "hi", hi, lo, "lo");
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
};

// --- packed rows

struct PackedArguments {
  const Tensor offsets, kept;
  const int64_t rows;
  const std::string mode;
  const std::optional<int64_t> left, right;
  const std::optional<Tensor> prefix;
  const int64_t sinks;
  const std::string dropped;

  explicit PackedArguments(Arguments& in)
      : offsets(in.tensor()),
        kept(in.tensor()),
        rows(in.integer()),
        mode(in.text()),
        left(in.optional_integer()),
        right(in.optional_integer()),
        prefix(in.optional_tensor()),
        sinks(in.integer()),
        dropped(in.text()) {}

  // Where the rows, lo and hi, are written is not set yet.
  PackedRows checked(const char* op) const {
    check_tensors(op);
    check_length(op, "rows", rows, 0, kMaxLength);
    PackedRows p = {};
    p.mode = parsed_mode(op);
    p.left = window_side(op, "window_left", left);
    p.right = window_side(op, "window_right", right);
    check_prefix(op, p.mode);
    check_length(op, "sinks", sinks);
    p.dropped = parsed_dropped(op);
    const bool front = sinks > 0 || p.mode == PackedMode::kCausalLast || p.mode == PackedMode::kPrefix;
    const int64_t pieces = front && (left || right) ? 2 : 1;
    if (kept.size(1) * pieces > kMaxIntervals) {
      fail(op, ": kept must have at most ", kMaxIntervals / pieces, " segments per sample",
           pieces == 2 ? " where a window stands beside a prefix or sinks" : "", ", got ",
           shape_text(kept));
    }
    p.offsets = offsets.const_data_ptr<int64_t>();
    p.kept = kept.const_data_ptr<int64_t>();
    p.prefix = prefix ? prefix->const_data_ptr<int64_t>() : nullptr;
    p.offset_stride = offsets.stride(0);
    p.kept_stride[0] = kept.stride(0);
    p.kept_stride[1] = kept.stride(1);
    p.prefix_stride = prefix ? prefix->stride(0) : 0;
    p.samples = kept.size(0);
    p.segments = static_cast<int>(kept.size(1));
    p.slots = static_cast<int>(p.segments * pieces);
    p.rows = rows;
    p.sinks = smaller(sinks, rows);
    return p;
  }

 private:
  void check_tensors(const char* op) const {
    check_tensor_kind(op, "segment_offsets", offsets, ScalarType::Long, 1, "[N * G + 1]");
    check_tensor_kind(op, "kept", kept, ScalarType::Long, 2, "[N, G]");
    if (kept.size(1) < 1) fail(op, ": kept must have a segment per sample, got ", shape_text(kept));
    if (offsets.size(0) != kept.size(0) * kept.size(1) + 1) {
      fail(op, ": segment_offsets must have one entry more than kept ", shape_text(kept), ", got ",
           shape_text(offsets));
    }
    check_same_device(op, "segment_offsets", offsets, kept, "kept");
  }

  PackedMode parsed_mode(const char* op) const {
    if (mode == "full") return PackedMode::kFull;
    if (mode == "causal") return PackedMode::kCausal;
    if (mode == "causal_last") return PackedMode::kCausalLast;
    if (mode == "prefix") return PackedMode::kPrefix;
    fail(op, ": mode must be full, causal, causal_last or prefix, got ", mode);
  }

  DroppedQueries parsed_dropped(const char* op) const {
    if (dropped == "none") return DroppedQueries::kNone;
    if (dropped == "self") return DroppedQueries::kSelf;
    if (dropped == "attend") return DroppedQueries::kAttend;
    fail(op, ": dropped must be none, self or attend, got ", dropped);
  }

  int64_t window_side(const char* op, const char* name, const std::optional<int64_t>& side) const {
    if (!side) return -1;
    check_length(op, name, *side);
    return smaller(*side, rows);
  }

  void check_prefix(const char* op, PackedMode parsed) const {
    if (prefix.has_value() != (parsed == PackedMode::kPrefix)) {
      fail(op, ": prefix must be given for mode prefix and for no other, got ", prefix ? "one" : "None",
           " for mode ", mode);
    }
    if (!prefix) return;
    check_tensor_kind(op, "prefix", *prefix, ScalarType::Long, 1, "[N]");
    if (prefix->size(0) != kept.size(0)) {
      fail(op, ": prefix must have an entry per sample of kept ", shape_text(kept), ", got ",
           shape_text(*prefix));
    }
    check_same_device(op, "prefix", *prefix, kept, "kept");
  }
};

// Allocates lo and hi, and says so to the rows.
template <class Device>
std::tuple<Tensor, Tensor> empty_rows(PackedRows& p, const Tensor& like) {
  const std::vector<int64_t> sizes = {p.slots, p.rows};
  std::tuple<Tensor, Tensor> lo_hi = {Device::empty(like, sizes, ScalarType::Int),
                                      Device::empty(like, sizes, ScalarType::Int)};
  p.lo = std::get<0>(lo_hi).template mutable_data_ptr<int32_t>();
  p.hi = std::get<1>(lo_hi).template mutable_data_ptr<int32_t>();
  return lo_hi;
}

template <class Device>
struct PackedRowIntervals {
  const PackedArguments packed;

  explicit PackedRowIntervals(Arguments& in) : packed(in) {}

  std::tuple<Tensor, Tensor> run() const {
    constexpr const char* op = "packed_rows";
    PackedRows p = packed.checked(op);
    Device::check_offsets(op, p);
    const typename Device::Scope scope(packed.kept);
    const auto lo_hi = empty_rows<Device>(p, packed.kept);
    Device::fill_rows(op, p, packed.kept);
    return lo_hi;
  }
};

template <class Device>
struct NestedDropoutPlan {
  const PackedArguments packed;
  const BlockArguments blocks;

  explicit NestedDropoutPlan(Arguments& in) : packed(in), blocks(in) {}

  auto run() const {
    constexpr const char* op = "nested_dropout_plan";
    PackedRows p = packed.checked(op);
    Device::check_offsets(op, p);
    const BlockGrid grid = checked_grid(op, blocks, 1, p.rows, p.rows);
    const typename Device::Scope scope(packed.kept);
    const auto lo_hi = empty_rows<Device>(p, packed.kept);
    const IntervalRows in = {p.lo, p.hi, {0, p.rows, 1}, {0, p.rows, 1}, 1, p.rows, p.rows, p.slots};
    return std::tuple_cat(lo_hi, block_lists<Device>(op, in, grid, true, &p, packed.kept));
  }
};

template <class Device, class Library>
void register_block_mask(Library& m) {
  m.impl("interval_block_lists", &boxed<IntervalBlockLists<Device>>);
  m.impl("packed_rows", &boxed<PackedRowIntervals<Device>>);
  m.impl("nested_dropout_plan", &boxed<NestedDropoutPlan<Device>>);
}

}  // namespace masked_loss_ext
