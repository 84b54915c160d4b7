// SPDX-License-Identifier: BSD-3-Clause
// masked_squared_error on CPU: argument checks, allocation, the cut into chunks, the final sum.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/capability.h"
#include "cpu/masked_squared_error_cpu.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "masked_squared_error_host.h"

namespace masked_loss_ext {
namespace {

// Elements of work per chunk: large enough to hide the scheduling (some 50 ns), small enough to balance.
constexpr int64_t kChunkElements = 32768;

const SquaredErrorKernels& kernels() {
#if defined(__x86_64__)
  switch (cpu_level()) {
    case Level::kAvx512: return squared_error_avx512;
    case Level::kAvx2: return squared_error_avx2;
    default: break;
  }
#endif
  return squared_error_default;
}

Kind kind_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double: return Kind::kDouble;
    case ScalarType::Half: return Kind::kHalf;
    case ScalarType::BFloat16: return Kind::kBFloat16;
    case ScalarType::Bool:
    case ScalarType::Byte: return Kind::kUInt8;
    case ScalarType::Char: return Kind::kInt8;
    case ScalarType::Short: return Kind::kInt16;
    case ScalarType::Int: return Kind::kInt32;
    case ScalarType::Long: return Kind::kInt64;
    default: return Kind::kFloat;
  }
}

Array array_of(const Tensor& tensor) {
  return {const_cast<void*>(tensor.const_data_ptr()), kind_of(tensor)};
}

Array array_of(const std::optional<Tensor>& tensor) {
  return tensor ? array_of(*tensor) : Array{};
}

Tensor allocate(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type) {
  Tensor tensor = torch::stable::new_empty(like, sizes, type);
  advise_huge_pages(tensor.mutable_data_ptr(), tensor.numel() * tensor.element_size());
  return tensor;
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

template <class F>
void write_value(Tensor& tensor, F value) {
  if (tensor.scalar_type() == ScalarType::Double) {
    *static_cast<double*>(tensor.mutable_data_ptr()) = value;
  } else {
    *static_cast<float*>(tensor.mutable_data_ptr()) = static_cast<float>(value);
  }
}

double read_value(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double
             ? *static_cast<const double*>(tensor.const_data_ptr())
             : *static_cast<const float*>(tensor.const_data_ptr());
}

std::tuple<Tensor, Tensor> masked_squared_error_forward_cpu(
    const Tensor& prediction, const Tensor& target, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& edit_mask, const std::optional<Tensor>& weighting,
    double foreground_weight, double background_weight, const std::string& reduction_name) {
  constexpr const char* op = "masked_squared_error";
  const SquaredErrorInputs in{prediction, target, mask, edit_mask, weighting};
  const Reduction reduction = parse_reduction(op, reduction_name);
  check_inputs(op, in, reduction);
  const double denominator = fixed_denominator(reduction, prediction);
  Tensor loss = allocate(prediction, output_sizes(prediction, loss_shape(reduction)),
                         accumulate_type(in));
  Tensor count = torch::stable::new_empty(prediction, {}, ScalarType::Long);

  LayoutBuilder builder = input_layout(in);
  if (!is_scalar(reduction)) builder.add(kLoss, loss);
  const Layout layout = builder.build(op);
  SquaredErrorProblem q = problem_of(in, foreground_weight, background_weight);
  if (!is_scalar(reduction)) q.loss = array_of(loss);
  q.scale = 1 / denominator;
  set_layout(q, layout, reduction == Reduction::kToken);
  std::vector<double> sums(q.chunks.count);
  std::vector<int64_t> counts(q.chunks.count);
  q.partial_sum = sums.data();
  q.partial_count = counts.data();
  const SquaredErrorKernels& kernel = kernels();
  for_each_chunk(q.chunks.count, [&](int64_t chunk) { kernel.forward(q, chunk); });

  double sum = 0;
  int64_t selected = 0;
  for (int64_t i = 0; i < q.chunks.count; ++i) {
    sum += sums[i];
    selected += counts[i];
  }
  *static_cast<int64_t*>(count.mutable_data_ptr()) = selected;
  const double divisor = reduction == Reduction::kMean ? double(selected) : denominator;
  if (is_scalar(reduction)) write_value(loss, selected > 0 ? sum / divisor : 0.0);
  return {loss, count};
}

// d loss / d term, but for what grad_loss itself holds per token or element.
double backward_scale(const Tensor& grad_loss, const Tensor& count, Reduction reduction,
                      const Tensor& prediction) {
  const double denominator = fixed_denominator(reduction, prediction);
  if (!is_scalar(reduction)) return 1 / denominator;
  const int64_t selected = *count.const_data_ptr<int64_t>();
  if (selected == 0) return 0;
  return read_value(grad_loss) / (reduction == Reduction::kMean ? double(selected) : denominator);
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
  check_inputs(op, in, reduction);
  check_grad_loss(op, grad_loss, in, reduction);
  needs_weighting = needs_weighting && weighting.has_value();
  const std::vector<int64_t> all = output_sizes(prediction, OutputShape::kElements), none = {0};
  const OutputShape weighting_shape =
      needs_weighting ? weighting_gradient_shape(*weighting) : OutputShape::kScalar;
  Tensor grad_prediction =
      allocate(prediction, needs_prediction ? all : none, prediction.scalar_type());
  Tensor grad_target = allocate(prediction, needs_target ? all : none, target.scalar_type());
  Tensor grad_weighting = allocate(
      prediction, needs_weighting ? output_sizes(prediction, weighting_shape) : none,
      accumulate_type(in));

  LayoutBuilder builder = input_layout(in);
  if (!is_scalar(reduction)) builder.add(kLoss, grad_loss);
  if (needs_prediction) builder.add(kGrad, grad_prediction);
  if (needs_target) builder.add(kGrad, grad_target);
  if (needs_weighting) builder.add(kGradWeighting, grad_weighting);
  const Layout layout = builder.build(op);
  SquaredErrorProblem q = problem_of(in, foreground_weight, background_weight);
  if (!is_scalar(reduction)) q.loss = array_of(grad_loss);
  if (needs_prediction) q.grad_prediction = array_of(grad_prediction);
  if (needs_target) q.grad_target = array_of(grad_target);
  if (needs_weighting) q.grad_weighting = array_of(grad_weighting);
  q.scale = backward_scale(grad_loss, count, reduction, prediction);
  set_layout(q, layout, needs_weighting && weighting_shape == OutputShape::kColumn);
  const SquaredErrorKernels& kernel = kernels();
  for_each_chunk(q.chunks.count, [&](int64_t chunk) { kernel.backward(q, chunk); });
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
