// SPDX-License-Identifier: BSD-3-Clause
// What the backward of masked_cross_entropy is given besides the inputs, on both devices: checked, and read
// from contiguous copies where it comes back with other strides (gradients that autograd expanded, results
// that a hook on saved tensors packed in its own way).
#pragma once

#include <optional>

#include "cross_entropy/call.h"

namespace masked_loss_ext {

struct CrossEntropyBackward {
  const char* op;
  const CrossEntropyInputs in;
  const std::optional<Tensor>&grad_loss, &grad_lse, &grad_entropy, &grad_log_prob;
  const Tensor &row_sums, &entropy, &log_prob, &smooth_distance, &denominator;
  const CrossEntropyOptions options;
  const int64_t ignore_index, shift;
  const RowReduction reduction;

  bool has_row_losses() const { return reduction == RowReduction::kNone && in.target; }
};

inline void check_loss_type(const char* op, const char* name, const Tensor& tensor,
                            const Tensor& logits) {
  if (tensor.scalar_type() == accumulate_type(logits)) return;
  fail(op, ": ", name, " must have the dtype of the loss, ",
       torch::headeronly::toString(accumulate_type(logits)), ", got ",
       torch::headeronly::toString(tensor.scalar_type()));
}

// One value per row; where none is needed, what the forward leaves without elements may be so.
inline void check_row_values(const char* op, const char* name, const Tensor& tensor,
                             const Tensor& logits, bool needed = true) {
  check_loss_type(op, name, tensor, logits);
  if (!needed && tensor.numel() == 0) return check_same_device(op, name, tensor, logits, "logits");
  check_per_row(op, name, tensor, logits);
}

inline void check_row_sums(const char* op, const char* name, const Tensor& sums, int64_t count,
                           ScalarType type, const Tensor& logits) {
  std::vector<int64_t> sizes = row_sizes(logits);
  sizes.push_back(count);
  bool same = sums.scalar_type() == type && sums.dim() == static_cast<int64_t>(sizes.size());
  for (int64_t d = 0; same && d < sums.dim(); ++d) same = sums.size(d) == sizes[d];
  if (!same) {
    fail(op, ": ", name, " must be what the forward returned, ", torch::headeronly::toString(type),
         " [..., ", count, "], got ", torch::headeronly::toString(sums.scalar_type()), " ",
         shape_text(sums));
  }
  check_same_device(op, name, sums, logits, "logits");
}

inline void check_denominator(const char* op, const Tensor& denominator, const Tensor& logits) {
  if (denominator.dim() != 0 || denominator.scalar_type() != ScalarType::Double) {
    fail(op, ": denominator must be a float64 number [], got ",
         torch::headeronly::toString(denominator.scalar_type()), " ", shape_text(denominator));
  }
  check_same_device(op, "denominator", denominator, logits, "logits");
}

inline void check_backward(const CrossEntropyBackward& c) {
  const char* op = c.op;
  const Tensor& logits = c.in.logits;
  check_inputs(op, c.in, c.options, c.shift);
  if (c.grad_loss && c.has_row_losses()) {
    check_row_values(op, "grad_loss", *c.grad_loss, logits);
  } else if (c.grad_loss) {
    check_number(op, "grad_loss", c.grad_loss, logits);
    check_loss_type(op, "grad_loss", *c.grad_loss, logits);
  }
  if (c.grad_lse) check_row_values(op, "grad_lse", *c.grad_lse, logits);
  if (c.grad_entropy) check_row_values(op, "grad_entropy", *c.grad_entropy, logits);
  if (c.grad_log_prob) check_row_values(op, "grad_log_prob", *c.grad_log_prob, logits);
  check_row_sums(op, "row_sums", c.row_sums, kRowSums, accumulate_type(logits), logits);
  const bool has_target = c.in.target.has_value();
  check_row_values(op, "entropy", c.entropy, logits, c.grad_entropy.has_value());
  check_row_values(op, "log_prob", c.log_prob, logits, has_target);
  check_row_values(op, "smooth_distance", c.smooth_distance, logits,
                   has_target && c.options.label_smoothing > 0);
  check_denominator(op, c.denominator, logits);
}

// As they are read, for as long as this lives; absent what has no elements.
struct BackwardValues {
  std::optional<Tensor> grad_loss, grad_lse, grad_entropy, grad_log_prob, row_sums, entropy, log_prob,
      smooth_distance;

  explicit BackwardValues(const CrossEntropyBackward& c)
      : grad_loss(RowInputs::contiguous(c.grad_loss)),
        grad_lse(RowInputs::contiguous(c.grad_lse)),
        grad_entropy(RowInputs::contiguous(c.grad_entropy)),
        grad_log_prob(RowInputs::contiguous(c.grad_log_prob)),
        row_sums(some(c.row_sums)),
        entropy(some(c.entropy)),
        log_prob(some(c.log_prob)),
        smooth_distance(some(c.smooth_distance)) {}

 private:
  static std::optional<Tensor> some(const Tensor& tensor) {
    if (tensor.numel() == 0) return std::nullopt;
    return RowInputs::contiguous(tensor);
  }
};

}  // namespace masked_loss_ext
