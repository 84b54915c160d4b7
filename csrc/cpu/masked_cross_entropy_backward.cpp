// SPDX-License-Identifier: BSD-3-Clause
// The backward of masked_cross_entropy on CPU, into fresh memory or over the logits.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "allocate.h"
#include "cpu/masked_cross_entropy_run.h"

namespace masked_loss_ext {
namespace {

struct BackwardInputs {
  const std::optional<Tensor>&grad_loss, &grad_lse, &grad_entropy, &grad_log_prob;
  const Tensor &lse, &entropy, &log_prob, &smooth_distance, &denominator;
};

void check_backward(const char* op, const CrossEntropyInputs& in, const BackwardInputs& b,
                    RowReduction reduction, bool smooths) {
  auto check = [&](const char* name, const std::optional<Tensor>& tensor, bool per_row) {
    if (!tensor) return;
    if (tensor->scalar_type() != accumulate_type(in.logits)) {
      fail(op, ": ", name, " must have the dtype of the loss, got ",
           torch::headeronly::toString(tensor->scalar_type()));
    }
    if (per_row) return check_per_row(op, name, *tensor, in.logits);
    check_number(op, name, tensor, in.logits);
  };
  check("grad_loss", b.grad_loss, reduction == RowReduction::kNone && in.target);
  check("grad_lse", b.grad_lse, true);
  check("grad_entropy", b.grad_entropy, true);
  check("grad_log_prob", b.grad_log_prob, true);
  check("lse", b.lse, true);
  if (b.grad_entropy) check("entropy", b.entropy, true);
  if (in.target) check("log_prob", b.log_prob, true);
  if (in.target && smooths) check("smooth_distance", b.smooth_distance, true);
  check_number(op, "denominator", b.denominator, in.logits);
}

// Contiguous copies of the incoming gradients per row, which autograd may hand over expanded.
struct RowGradientInputs {
  std::optional<Tensor> loss, lse, entropy, log_prob;

  explicit RowGradientInputs(const BackwardInputs& b)
      : loss(RowInputs::contiguous(b.grad_loss)),
        lse(RowInputs::contiguous(b.grad_lse)),
        entropy(RowInputs::contiguous(b.grad_entropy)),
        log_prob(RowInputs::contiguous(b.grad_log_prob)) {}
};

void set_gradients(CrossEntropyProblem& q, const BackwardInputs& b, const RowGradientInputs& g,
                   RowReduction reduction, bool has_target) {
  q.lse = array_of(b.lse);
  q.entropy = array_where(b.entropy.numel() > 0, b.entropy);
  q.log_prob = array_where(has_target, b.log_prob);
  q.smooth_distance = array_where(b.smooth_distance.numel() > 0, b.smooth_distance);
  q.grad_lse = array_of(g.lse);
  q.grad_entropy = array_of(g.entropy);
  q.grad_log_prob = array_of(g.log_prob);
  if (!b.grad_loss || !has_target) return;
  if (reduction == RowReduction::kNone) {
    q.grad_loss = array_of(g.loss);
    q.grad_scale = 1;
    return;
  }
  const double denominator = read_number(b.denominator);
  q.grad_scale = denominator != 0 ? read_number(*g.loss) / denominator : 0;
}

struct GradientOutputs {
  Tensor logits, token_weight;
};

GradientOutputs backward_cpu(const char* op, const CrossEntropyInputs& in, const BackwardInputs& b,
                             const CrossEntropyOptions& options, int64_t ignore_index, int64_t shift,
                             const std::string& reduction_name, bool needs_logits,
                             bool needs_token_weight, bool in_place) {
  const RowReduction reduction = parse_row_reduction(op, reduction_name);
  check_inputs(op, in, options, shift);
  check_backward(op, in, b, reduction, options.label_smoothing > 0);
  const std::vector<int64_t> none = {0};
  std::vector<int64_t> sizes = row_sizes(in.logits);
  const bool weighs = needs_token_weight && in.token_weight && in.target;
  Tensor grad_token_weight = empty_tensor(in.logits, weighs ? sizes : none, accumulate_type(in.logits));
  sizes.push_back(in.logits.size(in.logits.dim() - 1));
  const bool fresh = needs_logits && !in_place;
  Tensor grad_logits =
      in_place ? in.logits : empty_tensor(in.logits, fresh ? sizes : none, in.logits.scalar_type());

  const RowInputs rows(in);
  const RowGradientInputs gradients(b);
  const Layout layout = row_layout(op, in.logits, needs_logits ? &grad_logits : nullptr);
  CrossEntropyProblem q = problem_of(in, rows, options, layout, ignore_index, shift);
  set_gradients(q, b, gradients, reduction, in.target.has_value());
  if (fresh) {
    const size_t bytes = grad_logits.numel() * grad_logits.element_size();
    advise_huge_pages(grad_logits.mutable_data_ptr(), bytes);
    q.zero_logits = untouched_pages(grad_logits.mutable_data_ptr(), bytes);
  }
  q.grad_logits = array_where(needs_logits, grad_logits);
  q.grad_token_weight = array_where(weighs, grad_token_weight);
  run_backward(q, needs_logits ? &grad_logits : nullptr, in_place);
  return {grad_logits, grad_token_weight};
}

std::tuple<Tensor, Tensor> masked_cross_entropy_backward_cpu(
    const std::optional<Tensor>& grad_loss, const std::optional<Tensor>& grad_lse,
    const std::optional<Tensor>& grad_entropy, const std::optional<Tensor>& grad_log_prob,
    const Tensor& logits, const std::optional<Tensor>& target, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& token_weight,
    const std::optional<Tensor>& segment_ids, const std::optional<Tensor>& temperature,
    const Tensor& lse, const Tensor& entropy, const Tensor& log_prob, const Tensor& smooth_distance,
    const Tensor& denominator, int64_t ignore_index, double label_smoothing, double softcap,
    double z_loss, double focal_gamma, int64_t shift, const std::string& reduction,
    bool needs_logits, bool needs_token_weight) {
  const CrossEntropyInputs in{logits,       target,      mask,       weight,
                              token_weight, segment_ids, temperature};
  const BackwardInputs b{grad_loss, grad_lse, grad_entropy,    grad_log_prob, lse,
                         entropy,   log_prob, smooth_distance, denominator};
  const GradientOutputs out =
      backward_cpu("_masked_cross_entropy_backward", in, b,
                   {label_smoothing, softcap, z_loss, focal_gamma}, ignore_index, shift, reduction,
                   needs_logits, needs_token_weight, false);
  return {out.logits, out.token_weight};
}

Tensor masked_cross_entropy_backward_in_place_cpu(
    const std::optional<Tensor>& grad_loss, const std::optional<Tensor>& grad_lse,
    const std::optional<Tensor>& grad_entropy, const std::optional<Tensor>& grad_log_prob,
    const Tensor& logits, const std::optional<Tensor>& target, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& token_weight,
    const std::optional<Tensor>& segment_ids, const std::optional<Tensor>& temperature,
    const Tensor& lse, const Tensor& entropy, const Tensor& log_prob, const Tensor& smooth_distance,
    const Tensor& denominator, int64_t ignore_index, double label_smoothing, double softcap,
    double z_loss, double focal_gamma, int64_t shift, const std::string& reduction,
    bool needs_token_weight) {
  constexpr const char* op = "_masked_cross_entropy_backward_";
  const CrossEntropyInputs in{logits,       target,      mask,       weight,
                              token_weight, segment_ids, temperature};
  const BackwardInputs b{grad_loss, grad_lse, grad_entropy,    grad_log_prob, lse,
                         entropy,   log_prob, smooth_distance, denominator};
  return backward_cpu(op, in, b, {label_smoothing, softcap, z_loss, focal_gamma}, ignore_index, shift,
                      reduction, true, needs_token_weight, true)
      .token_weight;
}

}  // namespace
}  // namespace masked_loss_ext

STABLE_TORCH_LIBRARY_IMPL(masked_loss_ext, CPU, m) {
  m.impl("_masked_cross_entropy_backward",
         TORCH_BOX(&masked_loss_ext::masked_cross_entropy_backward_cpu));
  m.impl("_masked_cross_entropy_backward_",
         TORCH_BOX(&masked_loss_ext::masked_cross_entropy_backward_in_place_cpu));
}
