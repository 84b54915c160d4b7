// SPDX-License-Identifier: BSD-3-Clause
// cross_entropy_terms on CUDA: launches. Nothing here waits for the device.
#include <optional>
#include <tuple>
#include <vector>

#include "cross_entropy_terms/call.h"
#include "cross_entropy_terms/cuda/backward.cuh"
#include "cross_entropy/cuda/launch.cuh"

namespace masked_loss_ext::cuda {
namespace {

constexpr int64_t kMaxPacks = 2048;  // of a part in the backward: see masked_cross_entropy_backward.cu

using OptionalTensor = std::optional<Tensor>;
using EightTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

TermParams term_params(const TermRowInputs& per_row, int64_t ignore_index) {
  TermParams p = {};
  p.rows = term_rows(per_row, ignore_index);
  return p;
}

// Calls f(sums at temperature 1 are needed, sums at T are) with constants.
template <class F>
void with_sums(bool one, bool scaled, F f) {
  if (!one) return f(std::false_type{}, std::true_type{});
  if (scaled) return f(std::true_type{}, std::true_type{});
  f(std::true_type{}, std::false_type{});
}

// Two launches.
void launch_cross_entropy_terms_forward(const char* op, const CrossEntropyParams& q,
                                        const TermParams& p, const Tensor& like) {
  if (q.counted.rows == 0) return;
  const Grid grid = grid_of(op, q), per_row = row_grid(op, q.counted.rows);
  constexpr int64_t kDoubles = sizeof(TermPart) / sizeof(double);
  Tensor buffer = device_empty(like, {q.counted.rows * q.parts * kDoubles}, ScalarType::Double);
  auto* parts = static_cast<TermPart*>(buffer.mutable_data_ptr());
  const cudaStream_t stream = current_stream(like);
  const bool scaled = !p.unscaled || q.temperature.data != nullptr;
  with_logits_type(q, [&](auto value) {
    using T = decltype(value);
    with_sums(p.unscaled, scaled, [&](auto one, auto at_temperature) {
      const auto kernel = cross_entropy_terms_sums_kernel<T, decltype(one)::value,
                                                          decltype(at_temperature)::value>;
      check_launch(op, launch(stream, dim3(grid.blocks), dim3(grid.threads), 0, kernel, q, parts));
    });
    check_launch(op, launch(stream, dim3(per_row.blocks), dim3(per_row.threads), 0,
                            cross_entropy_terms_rows_kernel<T>, q, p, parts, scaled));
  });
}

// Three launches.
void launch_cross_entropy_terms_backward(const char* op, const CrossEntropyParams& q,
                                         const TermParams& p, const Tensor& grad_logits) {
  if (q.counted.rows == 0) return;
  const Grid grid = grid_of(op, q), per_row = row_grid(op, q.counted.rows);
  constexpr int64_t kMostBytes = sizeof(TermGradient<double>);
  Tensor buffer = device_empty(grad_logits, {q.counted.rows * kMostBytes / 8}, ScalarType::Double);
  const cudaStream_t stream = current_stream(grad_logits);
  with_logits_type(q, [&](auto value) {
    using T = decltype(value);
    auto* gradients = static_cast<TermGradient<accumulate_t<T>>*>(buffer.mutable_data_ptr());
    auto* grad = static_cast<T*>(grad_logits.mutable_data_ptr());
    check_launch(op, launch(stream, dim3(per_row.blocks), dim3(per_row.threads), 0,
                            cross_entropy_terms_coefficients_kernel<T>, q, p, gradients));
    check_launch(op, launch(stream, dim3(grid.blocks), dim3(grid.threads), 0,
                            cross_entropy_terms_gradient_kernel<T>, q, gradients, grad));
    check_launch(op, launch(stream, dim3(per_row.blocks), dim3(per_row.threads), 0,
                            cross_entropy_terms_cells_kernel<T>, q, p, grad));
  });
}

EightTensors cross_entropy_terms_forward_cuda(
    const Tensor& logits, const Tensor& target, const OptionalTensor& mask,
    const OptionalTensor& temperature, const OptionalTensor& classes,
    const OptionalTensor& context_before, const OptionalTensor& ngram_after, int64_t ignore_index,
    bool unscaled) {
  constexpr const char* op = "cross_entropy_terms";
  const TermInputs in(logits, target, mask, temperature, classes, context_before, ngram_after);
  check_terms(op, in, unscaled);
  const DeviceScope scope(logits);
  const TermRowInputs per_row(in);
  const TermOutputs out = allocate_terms(in, unscaled, [&](const auto& sizes, ScalarType type) {
    return device_empty(logits, sizes, type);
  });
  RowProblem problem;
  problem.counted = counted_rows(per_row, ignore_index, 0);
  problem.layout = row_layout(op, per_row.logits, nullptr);
  problem.logits = array_of(per_row.logits);
  problem.temperature = array_of(in.rows.temperature);
  const CrossEntropyParams q = params_of(problem, 0);
  TermParams p = term_params(per_row, ignore_index);
  p.terms = arrays_of(out, in, unscaled);
  p.sums = out.sums.mutable_data_ptr<double>();
  p.unscaled = unscaled;
  launch_cross_entropy_terms_forward(op, q, p, logits);
  return {out.scaled_log_prob, out.scaled_mean_log_prob, out.log_prob,   out.entropy,
          out.class_log_prob,  out.unlikelihood,         out.candidates, out.sums};
}

Tensor cross_entropy_terms_backward_cuda(
    const OptionalTensor& grad_scaled_log_prob, const OptionalTensor& grad_scaled_mean_log_prob,
    const OptionalTensor& grad_log_prob, const OptionalTensor& grad_entropy,
    const OptionalTensor& grad_class_log_prob, const OptionalTensor& grad_unlikelihood,
    const Tensor& logits, const Tensor& target, const OptionalTensor& mask,
    const OptionalTensor& temperature, const OptionalTensor& classes,
    const OptionalTensor& context_before, const OptionalTensor& ngram_after, const Tensor& sums,
    int64_t ignore_index) {
  constexpr const char* op = "_cross_entropy_terms_backward";
  const TermInputs in(logits, target, mask, temperature, classes, context_before, ngram_after);
  check_terms(op, in, true);
  const DeviceScope scope(logits);
  const TermGradientInputs gradients(grad_scaled_log_prob, grad_scaled_mean_log_prob, grad_log_prob,
                                     grad_entropy, grad_class_log_prob, grad_unlikelihood, sums);
  check_term_gradients(op, in, gradients);
  const TermRowInputs per_row(in);
  std::vector<int64_t> sizes = row_sizes(logits);
  sizes.push_back(logits.size(logits.dim() - 1));
  Tensor grad_logits = device_empty(logits, sizes, logits.scalar_type());
  RowProblem problem;
  problem.counted = counted_rows(per_row, ignore_index, 0);
  problem.layout = row_layout(op, per_row.logits, &grad_logits);
  problem.logits = array_of(per_row.logits);
  problem.temperature = array_of(in.rows.temperature);
  const CrossEntropyParams q = params_of(problem, kMaxPacks);
  TermParams p = term_params(per_row, ignore_index);
  p.terms = gradients.arrays();
  p.sums = gradients.read_sums();
  launch_cross_entropy_terms_backward(op, q, p, grad_logits);
  return grad_logits;
}

}  // namespace
}  // namespace masked_loss_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(MASKED_LOSS_EXT_CUDA_LIBRARY, MASKED_LOSS_EXT_CUDA_KEY, m) {
  m.impl("cross_entropy_terms", TORCH_BOX(&masked_loss_ext::cuda::cross_entropy_terms_forward_cuda));
  m.impl("_cross_entropy_terms_backward",
         TORCH_BOX(&masked_loss_ext::cuda::cross_entropy_terms_backward_cuda));
}
