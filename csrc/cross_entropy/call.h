// SPDX-License-Identifier: BSD-3-Clause
// What the CPU and the CUDA side of masked_cross_entropy do before a kernel runs: check, lay out, name
// the shapes of the results.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "common/layout_builder.h"
#include "cross_entropy/formula.h"

namespace masked_loss_ext {

enum class RowReduction { kMean, kSum, kNone };

struct CrossEntropyInputs {
  const Tensor& logits;
  const std::optional<Tensor>& target;
  const std::optional<Tensor>& mask;
  const std::optional<Tensor>& weight;
  const std::optional<Tensor>& token_weight;
  const std::optional<Tensor>& segment_ids;
  const std::optional<Tensor>& temperature;
};

inline RowReduction parse_row_reduction(const char* op, const std::string& name) {
  if (name == "mean") return RowReduction::kMean;
  if (name == "sum") return RowReduction::kSum;
  if (name == "none") return RowReduction::kNone;
  fail(op, ": reduction must be mean, sum or none, got ", name);
}

// Of the loss with its gradient: one gradient per row is known before the incoming ones only where those
// are all one number.
inline RowReduction scalar_reduction(const char* op, const std::string& name) {
  const RowReduction reduction = parse_row_reduction(op, name);
  if (reduction == RowReduction::kNone) fail(op, ": reduction must be mean or sum, got ", name);
  return reduction;
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

inline void check_logits(const char* op, const Tensor& logits) {
  check_floating(op, "logits", logits);
  const int64_t dims = logits.dim();
  if (dims == 0 || logits.size(dims - 1) == 0) {
    fail(op, ": logits must be [..., V] with at least one class, got ", shape_text(logits));
  }
  if (dims > kTorchDims) {
    fail(op, ": logits must have at most ", kTorchDims, " dimensions, got ", dims);
  }
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

inline void check_per_row(const char* op, const char* name, const Tensor& tensor,
                          const Tensor& logits) {
  bool same = tensor.dim() == logits.dim() - 1;
  for (int64_t d = 0; same && d < tensor.dim(); ++d) same = tensor.size(d) == logits.size(d);
  if (!same) {
    fail(op, ": ", name, " must have the shape of logits ", shape_text(logits),
         " without the last dimension, got ", shape_text(tensor));
  }
  check_same_device(op, name, tensor, logits, "logits");
}

inline void check_number(const char* op, const char* name, const std::optional<Tensor>& tensor,
                         const Tensor& logits) {
  if (!tensor) return;
  check_mask_type(op, name, *tensor);
  if (tensor->dim() != 0) fail(op, ": ", name, " must be a number [], got ", shape_text(*tensor));
  check_same_device(op, name, *tensor, logits, "logits");
}

// What a gradient that is already there is multiplied with.
inline void check_scaling(const char* op, const Tensor& grad_logits, const Tensor& grad_loss) {
  check_logits(op, grad_logits);
  check_overwritable(op, "grad_logits", grad_logits);
  check_number(op, "grad_loss", grad_loss, grad_logits);
  if (grad_loss.scalar_type() != accumulate_type(grad_logits)) {
    fail(op, ": grad_loss must have the dtype of the loss, got ",
         torch::headeronly::toString(grad_loss.scalar_type()));
  }
}

inline void check_weight(const char* op, const Tensor& weight, const Tensor& logits) {
  const int64_t classes = logits.size(logits.dim() - 1);
  if (weight.dim() != 1 || weight.size(0) != classes) {
    fail(op, ": weight must have one entry per class [", classes, "], got ", shape_text(weight));
  }
  if (weight.scalar_type() != accumulate_type(logits)) {
    fail(op, ": weight must have the dtype of the loss, ",
         torch::headeronly::toString(accumulate_type(logits)), ", got ",
         torch::headeronly::toString(weight.scalar_type()));
  }
  check_same_device(op, "weight", weight, logits, "logits");
}

inline void check_options(const char* op, const CrossEntropyOptions& options, int64_t shift,
                          const Tensor& logits) {
  check_range(op, "label_smoothing", options.label_smoothing, 0, 1);
  check_finite(op, "softcap", options.softcap, false);
  check_finite(op, "z_loss", options.z_loss, false);
  check_finite(op, "focal_gamma", options.focal_gamma, false);
  if (shift < 0) fail(op, ": shift must not be negative, got ", shift);
  if (shift > 0 && logits.dim() < 2) {
    fail(op, ": logits must be [..., S, V] where shift is not 0, got ", shape_text(logits));
  }
}

inline void check_inputs(const char* op, const CrossEntropyInputs& in,
                         const CrossEntropyOptions& options, int64_t shift) {
  check_logits(op, in.logits);
  check_options(op, options, shift, in.logits);
  if (in.target) {
    check_integer(op, "target", *in.target,
                  " (one class per row: soft labels are not what this function takes)");
    check_per_row(op, "target", *in.target, in.logits);
  }
  if (in.mask) {
    check_mask_type(op, "mask", *in.mask);
    check_per_row(op, "mask", *in.mask, in.logits);
  }
  if (in.weight) check_weight(op, *in.weight, in.logits);
  if (in.token_weight) {
    check_floating(op, "token_weight", *in.token_weight);
    check_per_row(op, "token_weight", *in.token_weight, in.logits);
  }
  if (in.segment_ids) {
    check_integer(op, "segment_ids", *in.segment_ids, "");
    check_per_row(op, "segment_ids", *in.segment_ids, in.logits);
  }
  check_number(op, "temperature", in.temperature, in.logits);
}

// What is read, for as long as this lives: contiguous copies where the caller's are not, which is one entry
// per row beside V logits, or per class; of the logits only where a row of them is no stretch of memory.
struct RowInputs {
  Tensor logits;
  std::optional<Tensor> target, mask, weight, token_weight, segment_ids;

  explicit RowInputs(const CrossEntropyInputs& in)
      : logits(has_contiguous_rows(in.logits) ? in.logits : torch::stable::contiguous(in.logits)),
        target(contiguous(in.target)),
        mask(contiguous(in.mask)),
        weight(contiguous(in.weight)),
        token_weight(contiguous(in.token_weight)),
        segment_ids(contiguous(in.segment_ids)) {}

  static std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
    if (!tensor || tensor->is_contiguous()) return tensor;
    return torch::stable::contiguous(*tensor);
  }
};

inline CountedRows counted_rows(const RowInputs& in, int64_t ignore_index, int64_t shift) {
  const Tensor& logits = in.logits;
  const int64_t dims = logits.dim();
  CountedRows q;
  q.rows = 1;
  for (int64_t d = 0; d + 1 < dims; ++d) q.rows *= logits.size(d);
  q.classes = logits.size(dims - 1);
  q.row_length = dims > 1 ? logits.size(dims - 2) : 1;
  q.shift = std::min(shift, q.row_length);  // beyond the row there is nothing: no sum overflows
  q.ignore_index = ignore_index;
  q.target = array_of(in.target);
  q.mask = array_of(in.mask);
  q.segment_ids = array_of(in.segment_ids);
  return q;
}

// Where each row of the logits (kPrediction) and of their gradient (kGrad) begins: offset_at().
inline Layout row_layout(const char* op, const Tensor& logits, const Tensor* grad_logits) {
  LayoutBuilder builder(row_sizes(logits));
  builder.add(kPrediction, logits);
  if (grad_logits != nullptr) builder.add(kGrad, *grad_logits);
  return builder.build(op);
}

}  // namespace masked_loss_ext
