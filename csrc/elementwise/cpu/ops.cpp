// SPDX-License-Identifier: BSD-3-Clause
// masked_squared_error on CPU: argument checks, allocation, the cut into chunks, the final sum.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <tuple>

#include "common/cpu/device.h"
#include "common/cpu/capability.h"
#include "elementwise/cpu/kernels.h"
#include "common/cpu/memory.h"
#include "common/cpu/parallel.h"
#include "common/cpu/scalars.h"
#include "elementwise/call.h"

namespace masked_loss_ext {
namespace {

// Elements of work per chunk: large enough to hide the scheduling (some 50 ns), small enough to balance.
constexpr int64_t kChunkElements = 32768;

const SquaredErrorKernels& kernels() {
  return kernels_of_this_machine<SquaredErrorKernels>();
}

Tensor allocate(const Tensor& prediction, const std::vector<int64_t>& sizes, ScalarType type) {
  Tensor tensor = empty_tensor(prediction, sizes, type);
  const size_t bytes = tensor.numel() * tensor.element_size();
  advise_huge_pages(tensor.mutable_data_ptr(), bytes);
  // Without channels there are still tokens, but no kernel comes to write their 0.
  if (prediction.numel() == 0 && bytes > 0) std::memset(tensor.mutable_data_ptr(), 0, bytes);
  return tensor;
}

ByteRange untouched_pages_of(const Tensor& fresh) {
  return untouched_pages(fresh.mutable_data_ptr(), fresh.numel() * fresh.element_size());
}

// whole_rows: something is written once per row, so a row must not be cut.
Chunks cut(const Layout& layout, bool whole_rows) {
  Chunks chunks;
  if (layout.rows == 0 || layout.cols == 0) return chunks;
  chunks.cols_per_chunk = whole_rows ? layout.cols : std::min(layout.cols, kChunkElements);
  chunks.col_chunks = (layout.cols + chunks.cols_per_chunk - 1) / chunks.cols_per_chunk;
  chunks.rows_per_chunk = std::max<int64_t>(1, kChunkElements / layout.cols);
  chunks.count =
      (layout.rows + chunks.rows_per_chunk - 1) / chunks.rows_per_chunk * chunks.col_chunks;
  return chunks;
}

SquaredErrorProblem problem_of(const SquaredErrorInputs& in, double foreground, double background) {
  SquaredErrorProblem q;
  q.prediction = array_of(in.prediction);
  q.target = array_of(in.target);
  q.mask = array_of(in.mask);
  q.edit_mask = array_of(in.edit_mask);
  q.weighting = array_of(in.weighting);
  q.foreground = foreground;
  q.background = background;
  return q;
}

void set_layout(SquaredErrorProblem& q, const Layout& layout, bool whole_rows) {
  q.layout = &layout;
  q.chunks = cut(layout, whole_rows);
  q.direct = q.prediction.kind == q.target.kind &&
             (layout.cols <= 1 ||
              (layout.col_stride[kPrediction] == 1 && layout.col_stride[kTarget] == 1));
}

std::tuple<Tensor, Tensor> masked_squared_error_forward_cpu(
    const Tensor& prediction, const Tensor& target, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& edit_mask, const std::optional<Tensor>& weighting,
    double foreground_weight, double background_weight, const std::string& reduction_name) {
  constexpr const char* op = "masked_squared_error";
  const SquaredErrorInputs in{prediction, target, mask, edit_mask, weighting};
  const Reduction reduction = parse_reduction(op, reduction_name);
  check_inputs(op, in, reduction, foreground_weight, background_weight);
  const double denominator = fixed_denominator(reduction, prediction);
  Tensor loss = allocate(prediction, output_sizes(prediction, loss_shape(reduction)),
                         accumulate_type(in));
  Tensor count = empty_tensor(prediction, {}, ScalarType::Long);

  LayoutBuilder builder = input_layout(in);
  if (!is_scalar(reduction)) builder.add(kLoss, loss);
  Layout layout;
  if (builder.merge(layout) > LayoutBuilder::kMostMerged) {
    const MergingInputs copies(in);
    return masked_squared_error_forward_cpu(copies.prediction, copies.target, copies.mask,
                                            copies.edit_mask, copies.weighting, foreground_weight,
                                            background_weight, reduction_name);
  }
  SquaredErrorProblem q = problem_of(in, foreground_weight, background_weight);
  if (!is_scalar(reduction)) q.loss = array_of(loss);
  q.scale = 1 / denominator;
  set_layout(q, layout, reduction == Reduction::kToken);
  std::vector<double> sums(q.chunks.count);
  std::vector<int64_t> counts(q.chunks.count);
  q.partial_sum = sums.data();
  q.partial_count = counts.data();
  const SquaredErrorKernels& kernel = kernels();
  // Last chunk first: what the model wrote last is still in the cache, and what is read last here is
  // what the backward, which goes upwards, reads first.
  for_each_chunk(q.chunks.count,
                 [&](int64_t i) { kernel.forward(q, q.chunks.count - 1 - i); });

  double sum = 0;
  int64_t selected = 0;
  for (int64_t i = 0; i < q.chunks.count; ++i) {
    sum += sums[i];
    selected += counts[i];
  }
  *static_cast<int64_t*>(count.mutable_data_ptr()) = selected;
  const double divisor = reduction == Reduction::kMean ? double(selected) : denominator;
  if (is_scalar(reduction)) write_number(loss, selected > 0 ? sum / divisor : 0.0);
  return {loss, count};
}

// d loss / d term, but for what grad_loss itself holds per token or element.
double backward_scale(const Tensor& grad_loss, const Tensor& count, Reduction reduction,
                      const Tensor& prediction) {
  const double denominator = fixed_denominator(reduction, prediction);
  if (!is_scalar(reduction)) return 1 / denominator;
  const int64_t selected = *count.const_data_ptr<int64_t>();
  if (selected == 0) return 0;
  return read_number(grad_loss) / (reduction == Reduction::kMean ? double(selected) : denominator);
}

std::tuple<Tensor, Tensor, Tensor> masked_squared_error_backward_cpu(
    const Tensor& grad_loss, const Tensor& prediction, const Tensor& target,
    const std::optional<Tensor>& mask, const std::optional<Tensor>& edit_mask,
    const std::optional<Tensor>& weighting, const Tensor& count, double foreground_weight,
    double background_weight, const std::string& reduction_name, bool needs_prediction,
    bool needs_target, bool needs_weighting) {
  constexpr const char* op = "_masked_squared_error_backward";
  const SquaredErrorInputs in{prediction, target, mask, edit_mask, weighting};
  const Reduction reduction = parse_reduction(op, reduction_name);
  check_inputs(op, in, reduction, foreground_weight, background_weight);
  check_grad_loss(op, grad_loss, in, reduction);
  check_count(op, count, prediction);
  const GradientPlan plan =
      plan_gradients(in, needs_prediction, needs_target, needs_weighting && weighting.has_value());
  Tensor grad_prediction = allocate(prediction, plan.prediction_sizes, prediction.scalar_type());
  Tensor grad_target = allocate(prediction, plan.target_sizes, target.scalar_type());
  Tensor grad_weighting = allocate(prediction, plan.weighting_sizes, accumulate_type(in));

  Layout layout;
  if (backward_layout(in, plan, reduction, grad_loss, grad_prediction, grad_target, grad_weighting)
          .merge(layout) > LayoutBuilder::kMostMerged) {
    const MergingInputs copies(in);
    return masked_squared_error_backward_cpu(
        torch::stable::contiguous(grad_loss), copies.prediction, copies.target, copies.mask,
        copies.edit_mask, copies.weighting, count, foreground_weight, background_weight,
        reduction_name, needs_prediction, needs_target, needs_weighting);
  }
  SquaredErrorProblem q = problem_of(in, foreground_weight, background_weight);
  if (!is_scalar(reduction)) q.loss = array_of(grad_loss);
  if (plan.prediction) q.grad_prediction = array_of(grad_prediction);
  if (plan.target) q.grad_target = array_of(grad_target);
  q.zero_prediction = untouched_pages_of(grad_prediction);
  q.zero_target = untouched_pages_of(grad_target);
  if (plan.weighting) q.grad_weighting = array_of(grad_weighting);
  q.scale = backward_scale(grad_loss, count, reduction, prediction);
  set_layout(q, layout, plan.whole_rows);
  const SquaredErrorKernels& kernel = kernels();
  const Tensor& output = plan.prediction ? grad_prediction : grad_target;
  const int64_t bytes = q.chunks.rows_per_chunk * q.chunks.cols_per_chunk * output.element_size();
  for_each_chunk_of_output(q.chunks.count, output.const_data_ptr(), bytes,
                           [&](int64_t chunk) { kernel.backward(q, chunk); });
  return {grad_prediction, grad_target, grad_weighting};
}

}  // namespace
}  // namespace masked_loss_ext

STABLE_TORCH_LIBRARY_IMPL(masked_loss_ext, CPU, m) {
  m.impl("masked_squared_error",
         TORCH_BOX(&masked_loss_ext::masked_squared_error_forward_cpu));
  m.impl("_masked_squared_error_backward",
         TORCH_BOX(&masked_loss_ext::masked_squared_error_backward_cpu));
}
