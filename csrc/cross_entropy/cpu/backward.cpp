// SPDX-License-Identifier: BSD-3-Clause
// The backward of masked_cross_entropy on CPU, into fresh memory or over the logits.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common/cpu/device.h"
#include "cross_entropy/cpu/run.h"
#include "cross_entropy/saved.h"

namespace masked_loss_ext {
namespace {

void set_gradients(CrossEntropyProblem& q, const CrossEntropyBackward& c, const BackwardValues& v) {
  q.row_sums = array_of(v.row_sums);
  q.entropy = array_of(v.entropy);
  q.log_prob = array_of(v.log_prob);
  q.smooth_distance = array_of(v.smooth_distance);
  q.grad_lse = array_of(v.grad_lse);
  q.grad_entropy = array_of(v.grad_entropy);
  q.grad_log_prob = array_of(v.grad_log_prob);
  if (!c.grad_loss || !c.in.target) return;
  if (c.has_row_losses()) {
    q.grad_loss = array_of(v.grad_loss);
    q.grad_scale = 1;
    return;
  }
  const double denominator = read_number(c.denominator);
  q.grad_scale = denominator != 0 ? read_number(*c.grad_loss) / denominator : 0;
}

struct GradientOutputs {
  Tensor logits, token_weight;
};

GradientOutputs backward_cpu(const CrossEntropyBackward& c, bool needs_logits,
                             bool needs_token_weight, bool in_place) {
  check_backward(c);
  if (in_place) check_overwritable(c.op, "logits", c.in.logits);
  const Tensor& logits = c.in.logits;
  const std::vector<int64_t> none = {0};
  std::vector<int64_t> sizes = row_sizes(logits);
  const bool weighs = needs_token_weight && c.in.token_weight && c.in.target;
  Tensor grad_token_weight = empty_tensor(logits, weighs ? sizes : none, accumulate_type(logits));
  sizes.push_back(logits.size(logits.dim() - 1));
  const bool fresh = needs_logits && !in_place;
  Tensor grad_logits =
      in_place ? logits : empty_tensor(logits, fresh ? sizes : none, logits.scalar_type());

  const RowInputs rows(c.in);
  const BackwardValues values(c);
  const Layout layout = row_layout(c.op, rows.logits, needs_logits ? &grad_logits : nullptr);
  CrossEntropyProblem q =
      problem_of(c.op, c.in, rows, c.options, layout, c.ignore_index, c.shift);
  set_gradients(q, c, values);
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
    const Tensor& row_sums, const Tensor& entropy, const Tensor& log_prob, const Tensor& smooth_distance,
    const Tensor& denominator, int64_t ignore_index, double label_smoothing, double softcap,
    double z_loss, double focal_gamma, int64_t shift, const std::string& reduction,
    bool needs_logits, bool needs_token_weight) {
  constexpr const char* op = "_masked_cross_entropy_backward";
  const CrossEntropyBackward call{op,
                                  {logits, target, mask, weight, token_weight, segment_ids, temperature},
                                  grad_loss,
                                  grad_lse,
                                  grad_entropy,
                                  grad_log_prob,
                                  row_sums,
                                  entropy,
                                  log_prob,
                                  smooth_distance,
                                  denominator,
                                  {label_smoothing, softcap, z_loss, focal_gamma},
                                  ignore_index,
                                  shift,
                                  parse_row_reduction(op, reduction)};
  const GradientOutputs out = backward_cpu(call, needs_logits, needs_token_weight, false);
  return {out.logits, out.token_weight};
}

Tensor masked_cross_entropy_backward_in_place_cpu(
    const std::optional<Tensor>& grad_loss, const std::optional<Tensor>& grad_lse,
    const std::optional<Tensor>& grad_entropy, const std::optional<Tensor>& grad_log_prob,
    const Tensor& logits, const std::optional<Tensor>& target, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& token_weight,
    const std::optional<Tensor>& segment_ids, const std::optional<Tensor>& temperature,
    const Tensor& row_sums, const Tensor& entropy, const Tensor& log_prob, const Tensor& smooth_distance,
    const Tensor& denominator, int64_t ignore_index, double label_smoothing, double softcap,
    double z_loss, double focal_gamma, int64_t shift, const std::string& reduction,
    bool needs_token_weight) {
  constexpr const char* op = "_masked_cross_entropy_backward_";
  const CrossEntropyBackward call{op,
                                  {logits, target, mask, weight, token_weight, segment_ids, temperature},
                                  grad_loss,
                                  grad_lse,
                                  grad_entropy,
                                  grad_log_prob,
                                  row_sums,
                                  entropy,
                                  log_prob,
                                  smooth_distance,
                                  denominator,
                                  {label_smoothing, softcap, z_loss, focal_gamma},
                                  ignore_index,
                                  shift,
                                  parse_row_reduction(op, reduction)};
  return backward_cpu(call, true, needs_token_weight, true).token_weight;
}

}  // namespace
}  // namespace masked_loss_ext

STABLE_TORCH_LIBRARY_IMPL(masked_loss_ext, CPU, m) {
  m.impl("_masked_cross_entropy_backward",
         TORCH_BOX(&masked_loss_ext::masked_cross_entropy_backward_cpu));
  m.impl("_masked_cross_entropy_backward_",
         TORCH_BOX(&masked_loss_ext::masked_cross_entropy_backward_in_place_cpu));
}
