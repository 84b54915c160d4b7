// SPDX-License-Identifier: BSD-3-Clause
// masked_cross_entropy on CUDA, backward: launches. Nothing here waits for the device.
#include "cross_entropy/cuda/backward.cuh"

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cross_entropy/cuda/launch.cuh"
#include "cross_entropy/saved.h"

namespace masked_loss_ext::cuda {
namespace {

constexpr int64_t kMaxPacks = 2048;  // of a part, 32 KB: blocks that only write zeros end early

using OptionalTensor = std::optional<Tensor>;

template <class A>
const A* values_of(const OptionalTensor& tensor) {
  return tensor && tensor->numel() > 0 ? static_cast<const A*>(tensor->const_data_ptr()) : nullptr;
}

template <class A>
BackwardInputs<A> inputs_of(const CrossEntropyBackward& c, const BackwardValues& v, const Tensor& weight_sum,
                            const Tensor& grad_token_weight) {
  BackwardInputs<A> in = {};
  in.grad_loss = values_of<A>(v.grad_loss);
  in.grad_lse = values_of<A>(v.grad_lse);
  in.grad_entropy = values_of<A>(v.grad_entropy);
  in.grad_log_prob = values_of<A>(v.grad_log_prob);
  in.row_sums = values_of<A>(v.row_sums);
  in.entropy = values_of<A>(v.entropy);
  in.log_prob = values_of<A>(v.log_prob);
  in.smooth_distance = values_of<A>(v.smooth_distance);
  in.denominator = static_cast<const double*>(c.denominator.const_data_ptr());
  in.weight_sum = values_of<double>(weight_sum);
  in.one_grad_loss = c.reduction != RowReduction::kNone;
  in.grad_token_weight = data_of<A>(grad_token_weight);
  return in;
}

// Two launches, one where grad_logits is not needed (null).
void launch_cross_entropy_backward(const CrossEntropyBackward& c, const CrossEntropyParams& q,
                                   const BackwardValues& values, void* grad_logits,
                                   const Tensor& grad_token_weight) {
  if (q.rows.rows == 0) return;
  const Tensor& like = c.in.logits;
  const Grid grid = grid_of(c.op, q), per_row = row_grid(c.op, q.rows.rows);
  const Tensor weights = weight_sum(c.op, q, like);
  constexpr int64_t kMostBytes = sizeof(RowGradient<double>);
  Tensor buffer = device_empty(like, {q.rows.rows * kMostBytes / 8}, ScalarType::Double);
  const cudaStream_t stream = current_stream(like);
  const bool full = c.grad_entropy || c.options.label_smoothing > 0 || c.options.softcap > 0;
  with_logits_type(q, [&](auto value) {
    using T = decltype(value);
    using A = accumulate_t<T>;
    auto* gradients = static_cast<RowGradient<A>*>(buffer.mutable_data_ptr());
    check_launch(c.op, launch(stream, dim3(per_row.blocks), dim3(per_row.threads), 0,
                              cross_entropy_row_gradients_kernel<A>, q,
                              inputs_of<A>(c, values, weights, grad_token_weight), gradients));
    if (grad_logits == nullptr) return;
    const auto kernel =
        full ? cross_entropy_gradient_kernel<T, true> : cross_entropy_gradient_kernel<T, false>;
    check_launch(c.op, launch(stream, dim3(grid.blocks), dim3(grid.threads), 0, kernel, q, gradients,
                              static_cast<T*>(grad_logits)));
  });
}

// grad_logits: null where it is not needed. Returns grad_token_weight.
Tensor backward(const CrossEntropyBackward& c, const Tensor* grad_logits, bool needs_token_weight) {
  const RowInputs per_row(c.in);
  const BackwardValues values(c);
  needs_token_weight = needs_token_weight && c.in.token_weight && c.in.target;
  const std::vector<int64_t> none = {0};
  Tensor grad_token_weight =
      device_empty(c.in.logits, needs_token_weight ? row_sizes(c.in.logits) : none,
                   accumulate_type(c.in.logits));
  CrossEntropyParams q = params_of(c.op, c.in, per_row, c.options, c.ignore_index, c.shift, grad_logits);
  cut(q, kMaxPacks);
  if (grad_logits == nullptr && !needs_token_weight) return grad_token_weight;
  launch_cross_entropy_backward(c, q, values,
                                grad_logits != nullptr ? grad_logits->mutable_data_ptr() : nullptr,
                                grad_token_weight);
  return grad_token_weight;
}

std::tuple<Tensor, Tensor> masked_cross_entropy_backward_cuda(
    const OptionalTensor& grad_loss, const OptionalTensor& grad_lse, const OptionalTensor& grad_entropy,
    const OptionalTensor& grad_log_prob, const Tensor& logits, const OptionalTensor& target,
    const OptionalTensor& mask, const OptionalTensor& weight, const OptionalTensor& token_weight,
    const OptionalTensor& segment_ids, const OptionalTensor& temperature, const Tensor& row_sums,
    const Tensor& entropy, const Tensor& log_prob, const Tensor& smooth_distance,
    const Tensor& denominator, int64_t ignore_index, double label_smoothing, double softcap,
    double z_loss, double focal_gamma, int64_t shift, std::string reduction, bool needs_logits,
    bool needs_token_weight) {
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
  check_backward(call);
  const DeviceScope scope(logits);
  std::vector<int64_t> sizes = {0};
  if (needs_logits) {
    sizes = row_sizes(logits);
    sizes.push_back(logits.size(logits.dim() - 1));
  }
  Tensor grad_logits = device_empty(logits, sizes, logits.scalar_type());
  Tensor grad_token_weight = backward(call, needs_logits ? &grad_logits : nullptr, needs_token_weight);
  return {grad_logits, grad_token_weight};
}

Tensor masked_cross_entropy_backward_in_place_cuda(
    const OptionalTensor& grad_loss, const OptionalTensor& grad_lse, const OptionalTensor& grad_entropy,
    const OptionalTensor& grad_log_prob, const Tensor& logits, const OptionalTensor& target,
    const OptionalTensor& mask, const OptionalTensor& weight, const OptionalTensor& token_weight,
    const OptionalTensor& segment_ids, const OptionalTensor& temperature, const Tensor& row_sums,
    const Tensor& entropy, const Tensor& log_prob, const Tensor& smooth_distance,
    const Tensor& denominator, int64_t ignore_index, double label_smoothing, double softcap,
    double z_loss, double focal_gamma, int64_t shift, std::string reduction, bool needs_token_weight) {
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
  check_backward(call);
  check_overwritable(op, "logits", logits);
  const DeviceScope scope(logits);
  return backward(call, &logits, needs_token_weight);
}

}  // namespace
}  // namespace masked_loss_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(MASKED_LOSS_EXT_CUDA_LIBRARY, MASKED_LOSS_EXT_CUDA_KEY, m) {
  m.impl("_masked_cross_entropy_backward",
         TORCH_BOX(&masked_loss_ext::cuda::masked_cross_entropy_backward_cuda));
  m.impl("_masked_cross_entropy_backward_",
         TORCH_BOX(&masked_loss_ext::cuda::masked_cross_entropy_backward_in_place_cuda));
}
