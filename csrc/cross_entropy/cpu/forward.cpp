// SPDX-License-Identifier: BSD-3-Clause
// The forward of masked_cross_entropy on CPU: allocation and the final sums.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common/cpu/device.h"
#include "cross_entropy/cpu/run.h"

namespace masked_loss_ext {
namespace {

struct ForwardOutputs {
  Tensor loss, lse, entropy, log_prob, hit, smooth_distance, denominator, row_sums;
};

ForwardOutputs allocate_outputs(const Tensor& logits, RowReduction reduction, bool has_target,
                                bool smooths, bool statistics) {
  const ScalarType type = accumulate_type(logits);
  const std::vector<int64_t> rows = row_sizes(logits), none = {0}, scalar;
  const bool per_row = reduction == RowReduction::kNone && has_target;
  std::vector<int64_t> sums = rows;
  sums.push_back(kRowSums);
  return {empty_tensor(logits, per_row ? rows : scalar, type),
          empty_tensor(logits, rows, type),
          empty_tensor(logits, statistics ? rows : none, type),
          empty_tensor(logits, has_target ? rows : none, type),
          empty_tensor(logits, statistics && has_target ? rows : none, ScalarType::Bool),
          empty_tensor(logits, smooths && has_target ? rows : none, type),
          empty_tensor(logits, scalar, ScalarType::Double),
          empty_tensor(logits, sums, type)};
}

using EightTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

EightTensors masked_cross_entropy_forward_cpu(
    const Tensor& logits, const std::optional<Tensor>& target, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& token_weight,
    const std::optional<Tensor>& segment_ids, const std::optional<Tensor>& temperature,
    const std::optional<Tensor>& normalizer, int64_t ignore_index, double label_smoothing,
    double softcap, double z_loss, double focal_gamma, int64_t shift,
    const std::string& reduction_name, bool statistics) {
  constexpr const char* op = "masked_cross_entropy";
  const CrossEntropyInputs in{logits,       target,      mask,       weight,
                              token_weight, segment_ids, temperature};
  const CrossEntropyOptions options{label_smoothing, softcap, z_loss, focal_gamma};
  const RowReduction reduction = parse_row_reduction(op, reduction_name);
  check_inputs(op, in, options, shift);
  check_number(op, "normalizer", normalizer, logits);
  ForwardOutputs out = allocate_outputs(logits, reduction, target.has_value(), label_smoothing > 0,
                                        statistics);
  const RowInputs rows(in);
  const Layout layout = row_layout(op, rows.logits, nullptr);
  CrossEntropyProblem q = problem_of(op, in, rows, options, layout, ignore_index, shift);
  q.statistics = statistics;
  q.row_sums = array_of(out.row_sums);
  q.lse = array_of(out.lse);
  q.entropy = array_where(statistics, out.entropy);
  q.log_prob = array_where(target.has_value(), out.log_prob);
  q.hit = array_where(statistics && target, out.hit);
  q.smooth_distance = array_where(label_smoothing > 0 && target, out.smooth_distance);
  q.loss = array_where(reduction == RowReduction::kNone && target, out.loss);
  if (!target) q.options.label_smoothing = 0;
  const bool divides = reduction == RowReduction::kMean;
  const double given = normalizer && divides ? read_normalizer(op, *normalizer) : 1;
  const ChunkTotals totals = run_forward(q);
  if (totals.bad_row >= 0) refuse_label(q, logits, totals.bad_row);
  const double denominator = divides && !normalizer ? totals.denominator : given;
  write_number(out.denominator, denominator);
  if (out.loss.numel() > 0 && q.loss.data == nullptr) {
    write_number(out.loss, denominator != 0 ? totals.loss / denominator : 0.0);
  }
  return {out.loss, out.lse,             out.entropy,     out.log_prob,
          out.hit,  out.smooth_distance, out.denominator, out.row_sums};
}

}  // namespace
}  // namespace masked_loss_ext

STABLE_TORCH_LIBRARY_IMPL(masked_loss_ext, CPU, m) {
  m.impl("masked_cross_entropy", TORCH_BOX(&masked_loss_ext::masked_cross_entropy_forward_cpu));
}
