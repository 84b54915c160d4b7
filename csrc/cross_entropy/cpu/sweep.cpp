// SPDX-License-Identifier: BSD-3-Clause
// The loss of masked_cross_entropy and its gradient in one sweep, on CPU, for the reductions to a number;
// and what the backward is then left with.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common/cpu/device.h"
#include "cross_entropy/cpu/run.h"

namespace masked_loss_ext {
namespace {

struct GradientCall {
  CrossEntropyInputs in;
  const std::optional<Tensor>& normalizer;
  CrossEntropyOptions options;
  int64_t ignore_index, shift;
  const std::string& reduction_name;
};

// What the backward reads of each row that the forward wrote.
void set_row_values(CrossEntropyProblem& q, Tensor& buffer, const Tensor& logits) {
  const int64_t rows = q.counted.rows;
  buffer = empty_tensor(logits, {kRowSums + 2, rows}, accumulate_type(logits));
  q.row_sums = array_of(buffer);
  auto part = [&](int64_t i) {
    Array array = q.row_sums;
    array.data = static_cast<char*>(array.data) + i * rows * size_of(array.kind);
    return array;
  };
  q.log_prob = part(kRowSums);
  if (q.options.label_smoothing > 0) q.smooth_distance = part(kRowSums + 1);
}

// Returns the loss. The counted rows are known before the first gradient is written, so that a bad label
// leaves all as it was.
Tensor with_gradient_cpu(const GradientCall& c, Tensor& grad_logits, bool in_place) {
  constexpr const char* op = "masked_cross_entropy";  // whose arguments they are
  const Tensor& logits = c.in.logits;
  const RowReduction reduction = scalar_reduction(op, c.reduction_name);
  check_inputs(op, c.in, c.options, c.shift);
  check_number(op, "normalizer", c.normalizer, logits);
  if (in_place) {
    check_overwritable(op, "logits", logits);
  } else {
    std::vector<int64_t> sizes = row_sizes(logits);
    sizes.push_back(logits.size(logits.dim() - 1));
    grad_logits = empty_tensor(logits, sizes, logits.scalar_type());
  }
  const RowInputs rows(c.in);
  const Layout layout = row_layout(op, rows.logits, &grad_logits);
  CrossEntropyProblem q = problem_of(op, c.in, rows, c.options, layout, c.ignore_index, c.shift);
  Tensor row_values;
  set_row_values(q, row_values, logits);
  q.grad_logits = array_of(grad_logits);
  if (!in_place) {
    const size_t bytes = grad_logits.numel() * grad_logits.element_size();
    advise_huge_pages(grad_logits.mutable_data_ptr(), bytes);
    q.zero_logits = untouched_pages(grad_logits.mutable_data_ptr(), bytes);
  }
  const bool divides = reduction == RowReduction::kMean;
  const double given = c.normalizer && divides ? read_normalizer(op, *c.normalizer) : 1;
  const ChunkTotals counted = run_count(q);
  if (counted.bad_row >= 0) refuse_label(q, logits, counted.bad_row);
  const double denominator = divides && !c.normalizer ? counted.denominator : given;
  q.grad_scale = denominator != 0 ? 1 / denominator : 0;
  const ChunkTotals totals = run_both(q, grad_logits, in_place);
  const std::vector<int64_t> scalar;
  Tensor loss = empty_tensor(logits, scalar, accumulate_type(logits));
  write_number(loss, denominator != 0 ? totals.loss / denominator : 0.0);
  return loss;
}

std::tuple<Tensor, Tensor> masked_cross_entropy_with_gradient_cpu(
    const Tensor& logits, const Tensor& target, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& token_weight,
    const std::optional<Tensor>& segment_ids, const std::optional<Tensor>& temperature,
    const std::optional<Tensor>& normalizer, int64_t ignore_index, double label_smoothing,
    double softcap, double z_loss, double focal_gamma, int64_t shift, const std::string& reduction) {
  const std::optional<Tensor> labels = target;
  const GradientCall call{{logits, labels, mask, weight, token_weight, segment_ids, temperature},
                          normalizer,
                          {label_smoothing, softcap, z_loss, focal_gamma},
                          ignore_index,
                          shift,
                          reduction};
  Tensor grad_logits;
  const Tensor loss = with_gradient_cpu(call, grad_logits, false);
  return {loss, grad_logits};
}

Tensor masked_cross_entropy_with_gradient_in_place_cpu(
    const Tensor& logits, const Tensor& target, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& token_weight,
    const std::optional<Tensor>& segment_ids, const std::optional<Tensor>& temperature,
    const std::optional<Tensor>& normalizer, int64_t ignore_index, double label_smoothing,
    double softcap, double z_loss, double focal_gamma, int64_t shift, const std::string& reduction) {
  const std::optional<Tensor> labels = target;
  const GradientCall call{{logits, labels, mask, weight, token_weight, segment_ids, temperature},
                          normalizer,
                          {label_smoothing, softcap, z_loss, focal_gamma},
                          ignore_index,
                          shift,
                          reduction};
  Tensor grad_logits = logits;
  return with_gradient_cpu(call, grad_logits, true);
}

void scale_gradient_cpu(const Tensor& grad_logits, const Tensor& grad_loss) {
  constexpr const char* op = "_masked_cross_entropy_scale_gradient_";
  check_scaling(op, grad_logits, grad_loss);
  const double factor = read_number(grad_loss);
  if (factor == 1) return;
  const Layout layout = row_layout(op, grad_logits, &grad_logits);
  CrossEntropyProblem q;
  q.layout = &layout;
  q.grad_logits = array_of(grad_logits);
  q.counted.classes = grad_logits.size(grad_logits.dim() - 1);
  q.counted.rows = grad_logits.numel() / q.counted.classes;
  q.chunks = cut(q.counted, false);
  for_each_chunk(q.chunks.count,
                 [&](int64_t chunk) { cross_entropy_kernels().scale(q, factor, chunk); });
}

}  // namespace
}  // namespace masked_loss_ext

STABLE_TORCH_LIBRARY_IMPL(masked_loss_ext, CPU, m) {
  m.impl("_masked_cross_entropy_with_gradient",
         TORCH_BOX(&masked_loss_ext::masked_cross_entropy_with_gradient_cpu));
  m.impl("_masked_cross_entropy_with_gradient_",
         TORCH_BOX(&masked_loss_ext::masked_cross_entropy_with_gradient_in_place_cpu));
  m.impl("_masked_cross_entropy_scale_gradient_",
         TORCH_BOX(&masked_loss_ext::scale_gradient_cpu));
}
