// SPDX-License-Identifier: BSD-3-Clause
// The arguments that the operators over rows share, and what of them is refused, for every device and for
// each room whose rows are those of a cross entropy.
#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "common/layout_builder.h"
#include "common/operator.h"
#include "cross_entropy/formula.h"

namespace masked_loss_ext {

// A shard of the vocabulary: the classes from `first` on, of so many in all.
struct VocabShard {
  int64_t first, classes;
};

// What all that is per row goes by, and what its errors call it: logits [..., V], or where those are made in
// pieces hidden states [..., D] with as many rows.
struct RowLike {
  const Tensor& like;
  int64_t columns, first = 0, classes;  // of the logits; which they are; of all
  const char* name = "logits";
  const char* last = "V";  // its last dimension
  const char* class_weight = "weight";

  RowLike(const Tensor& logits, const std::optional<VocabShard>& shard = {})
      : like(logits), columns(logits.dim() > 0 ? logits.size(logits.dim() - 1) : 0), classes(columns) {
    if (shard) take(*shard);
  }
  RowLike(const Tensor& hidden, int64_t v, const std::optional<VocabShard>& shard = {})
      : like(hidden), columns(v), classes(v), name("hidden"), last("D"), class_weight("class_weight") {
    if (shard) take(*shard);
  }

 private:
  void take(const VocabShard& shard) {
    first = shard.first;
    classes = shard.classes;
  }
};

struct CrossEntropyInputs {
  Tensor logits;  // or hidden, see RowLike
  std::optional<Tensor> target, mask, weight, token_weight, segment_ids, temperature, normalizer;
};

// In the order of the schema.
struct RowArguments : CrossEntropyInputs {
  static constexpr const char* kBackward = "_masked_cross_entropy_backward";
  static constexpr const char* kBackwardInPlace = "_masked_cross_entropy_backward_";

  int64_t ignore_index;
  CrossEntropyOptions options;
  int64_t shift;
  std::string reduction;
  bool statistics;
  std::optional<Tensor> schedule;
  std::optional<VocabShard> shard;  // of a schema that has one

  explicit RowArguments(Arguments& in) : RowArguments(in.tensor(), in) {}

  RowArguments(Tensor first, Arguments& in)
      : CrossEntropyInputs{std::move(first),     in.optional_tensor(), in.optional_tensor(),
                           in.optional_tensor(), in.optional_tensor(), in.optional_tensor(),
                           in.optional_tensor(), in.optional_tensor()},
        ignore_index(in.integer()),
        options{in.number(), in.number(), in.number(), in.number()},
        shift(in.integer()),
        reduction(in.text()),
        statistics(in.flag()),
        schedule(in.optional_tensor()) {}

  bool smooths() const { return schedule.has_value() || options.label_smoothing > 0; }
  RowLike like() const { return {logits, shard}; }
  void take_shard(Arguments& in) { shard = VocabShard{in.integer(), in.integer()}; }
};

// The same of logits that are a shard of the vocabulary.
struct ShardArguments : RowArguments {
  static constexpr const char* kBackward = "_vocab_parallel_cross_entropy_backward";
  static constexpr const char* kBackwardInPlace = "_vocab_parallel_cross_entropy_backward_";

  explicit ShardArguments(Arguments& in) : RowArguments(in) { take_shard(in); }
};

// --- checks ------------------------------------------------------------------------------------------

inline RowReduction parse_row_reduction(const char* op, const std::string& name) {
  if (name == "mean") return RowReduction::kMean;
  if (name == "sum") return RowReduction::kSum;
  if (name == "none") return RowReduction::kNone;
  fail(op, ": reduction must be mean, sum or none, got ", name);
}

// float64 where the logits are, else float32.
inline ScalarType accumulate_type(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline std::vector<int64_t> row_sizes(const Tensor& logits) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d + 1 < logits.dim(); ++d) sizes.push_back(logits.size(d));
  return sizes;
}

inline int64_t row_count(const Tensor& logits) {
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < logits.dim(); ++d) rows *= logits.size(d);
  return rows;
}

inline std::vector<int64_t> row_sizes(const Tensor& logits, int64_t each) {
  std::vector<int64_t> sizes = row_sizes(logits);
  sizes.push_back(each);
  return sizes;
}

// Of so many columns.
inline void check_shard(const char* op, const std::optional<VocabShard>& shard, int64_t columns) {
  if (!shard) return;
  check_length(op, "vocab_start", shard->first);
  check_length(op, "vocab_size", shard->classes, 1);
  if (shard->first > shard->classes - columns) {
    fail(op, ": vocab_size must be at least vocab_start and the shard's own classes, ", shard->first, " + ",
         columns, ", got ", shard->classes);
  }
}

inline void check_logits(const char* op, const Tensor& logits, const std::optional<VocabShard>& shard = {}) {
  check_floating(op, "logits", logits);
  const int64_t dims = logits.dim();
  if (dims == 0 || (!shard && logits.size(dims - 1) == 0)) {
    fail(op, ": logits must be [..., V]", shard ? "" : " with at least one class", ", got ",
         shape_text(logits));
  }
  if (dims > kTorchDims) {
    fail(op, ": logits must have at most ", kTorchDims, " dimensions, got ", dims);
  }
  check_shard(op, shard, logits.size(dims - 1));
}

// Rows of which each is one stretch of memory.
inline bool has_contiguous_rows(const Tensor& logits) {
  const int64_t last = logits.dim() - 1;
  return logits.stride(last) == 1 || logits.size(last) == 1 || logits.numel() == 0;
}

// For what is written over: two rows that share memory would each overwrite what the other must still read.
inline void check_overwritable(const char* op, const char* name, const Tensor& tensor) {
  if (tensor.numel() == 0 || tensor.is_contiguous()) return;
  if (!has_contiguous_rows(tensor)) {
    fail(op, ": ", name, " must be contiguous in the last dimension to be written over, got a stride of ",
         tensor.stride(tensor.dim() - 1));
  }
  std::vector<std::pair<int64_t, int64_t>> steps;  // stride, size
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) > 1) steps.push_back({tensor.stride(d), tensor.size(d)});
  }
  std::sort(steps.begin(), steps.end());
  int64_t extent = 1;
  for (const auto& [stride, size] : steps) {
    if (stride < extent) {
      fail(op, ": ", name, " must not be expanded or overlap to be written over, got a stride of ",
           stride, " across ", extent, " elements for ", shape_text(tensor));
    }
    extent += stride * (size - 1);
  }
}

inline bool is_per_row(const Tensor& tensor, const RowLike& rows) {
  return tensor.dim() == rows.like.dim() - 1 && sizes_fit(tensor, rows.like);
}

inline void check_per_row(const char* op, const char* name, const Tensor& tensor, const RowLike& rows) {
  if (!is_per_row(tensor, rows)) {
    fail(op, ": ", name, " must have the shape of ", rows.name, " ", shape_text(rows.like),
         " without the last dimension, got ", shape_text(tensor));
  }
  check_same_device(op, name, tensor, rows.like, rows.name);
}

inline void check_number(const char* op, const char* name, const std::optional<Tensor>& tensor,
                         const RowLike& rows) {
  if (!tensor) return;
  check_mask_type(op, name, *tensor);
  if (tensor->dim() != 0) fail(op, ": ", name, " must be a number [], got ", shape_text(*tensor));
  check_same_device(op, name, *tensor, rows.like, rows.name);
}

inline void check_temperature(const char* op, const std::optional<Tensor>& temperature,
                              const RowLike& rows) {
  if (!temperature || temperature->dim() == 0) return check_number(op, "temperature", temperature, rows);
  check_mask_type(op, "temperature", *temperature);
  if (!is_per_row(*temperature, rows)) {
    fail(op, ": temperature must be a number, a 0-d tensor or have the shape of ", rows.name, " ",
         shape_text(rows.like), " without the last dimension, got ", shape_text(*temperature));
  }
  check_same_device(op, "temperature", *temperature, rows.like, rows.name);
}

inline void check_loss_type(const char* op, const char* name, const Tensor& tensor,
                            const Tensor& logits) {
  const ScalarType type = type_of(op, name, tensor);
  if (type == accumulate_type(logits)) return;
  fail(op, ": ", name, " must have the dtype of the loss, ",
       torch::headeronly::toString(accumulate_type(logits)), ", got ", torch::headeronly::toString(type));
}

inline void check_weight(const char* op, const Tensor& weight, const RowLike& rows) {
  const char* name = rows.class_weight;
  if (weight.dim() != 1 || weight.size(0) != rows.classes) {
    fail(op, ": ", name, " must have one entry per class [", rows.classes, "], got ", shape_text(weight));
  }
  check_loss_type(op, name, weight, rows.like);
  check_same_device(op, name, weight, rows.like, rows.name);
}

inline void check_options(const char* op, const CrossEntropyOptions& options, int64_t shift,
                          const RowLike& rows) {
  check_range(op, "label_smoothing", options.label_smoothing, 0, 1);
  check_finite(op, "softcap", options.softcap, false);
  check_finite(op, "z_loss", options.z_loss, false);
  check_finite(op, "focal_gamma", options.focal_gamma, false);
  if (shift < 0) fail(op, ": shift must not be negative, got ", shift);
  if (shift > 0 && rows.like.dim() < 2) {
    fail(op, ": ", rows.name, " must be [..., S, ", rows.last, "] where shift is not 0, got ",
         shape_text(rows.like));
  }
}

inline void check_inputs(const char* op, const CrossEntropyInputs& in, const RowLike& rows,
                         const CrossEntropyOptions& options, int64_t shift) {
  check_options(op, options, shift, rows);
  constexpr const char* no_soft_labels =
      " (one class per row: soft labels are not what this function takes)";
  if (in.target) check_integer(op, "target", *in.target, no_soft_labels);
  if (in.target) check_per_row(op, "target", *in.target, rows);
  if (in.mask) check_mask_type(op, "mask", *in.mask);
  if (in.mask) check_per_row(op, "mask", *in.mask, rows);
  if (in.weight) check_weight(op, *in.weight, rows);
  if (in.token_weight) check_floating(op, "token_weight", *in.token_weight);
  if (in.token_weight) check_per_row(op, "token_weight", *in.token_weight, rows);
  if (in.segment_ids) check_integer(op, "segment_ids", *in.segment_ids, "");
  if (in.segment_ids) check_per_row(op, "segment_ids", *in.segment_ids, rows);
  check_temperature(op, in.temperature, rows);
  check_number(op, "normalizer", in.normalizer, rows);
}

// One value per row; where none is needed, what the forward leaves without elements may be so.
inline void check_row_values(const char* op, const char* name, const Tensor& tensor,
                             const RowLike& rows, bool needed = true) {
  check_loss_type(op, name, tensor, rows.like);
  if (!needed && tensor.numel() == 0) return check_same_device(op, name, tensor, rows.like, rows.name);
  check_per_row(op, name, tensor, rows);
}

// What the forward returned of `type` and of these sizes.
inline void check_saved(const char* op, const char* name, const Tensor& tensor,
                        const std::vector<int64_t>& sizes, ScalarType type, const char* shape,
                        const RowLike& rows) {
  const ScalarType got = type_of(op, name, tensor);
  bool same = got == type && tensor.dim() == static_cast<int64_t>(sizes.size());
  for (int64_t d = 0; same && d < tensor.dim(); ++d) same = tensor.size(d) == sizes[d];
  if (!same) {
    fail(op, ": ", name, " must be what the forward returned, ", torch::headeronly::toString(type), " ",
         shape, ", got ", torch::headeronly::toString(got), " ", shape_text(tensor));
  }
  check_same_device(op, name, tensor, rows.like, rows.name);
}

inline void check_row_sums(const char* op, const char* name, const Tensor& sums, int64_t count,
                           ScalarType type, const RowLike& rows) {
  const std::string shape = "[..., " + std::to_string(count) + "]";
  check_saved(op, name, sums, row_sizes(rows.like, count), type, shape.c_str(), rows);
}

}  // namespace masked_loss_ext
