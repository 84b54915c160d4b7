// SPDX-License-Identifier: BSD-3-Clause
// masked_cross_entropy on CUDA, backward: checks of what forward saved, launches. Nothing here waits for
// the device.
#include "cuda/masked_cross_entropy_backward.cuh"

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/masked_cross_entropy_launch.cuh"

namespace masked_loss_ext::cuda {
namespace {

constexpr int64_t kMaxPacks = 2048;  // of a part, 32 KB: blocks that only write zeros end early

using OptionalTensor = std::optional<Tensor>;

struct Gradients {
  const OptionalTensor &loss, &lse, &entropy, &log_prob;
};

struct Saved {
  const Tensor &lse, &entropy, &log_prob, &smooth_distance, &denominator;
};

// One value per row in the dtype of the loss; `empty_allowed`: forward leaves what is not wanted empty.
void check_row_values(const char* op, const char* name, const Tensor& tensor, const Tensor& logits,
                      bool empty_allowed) {
  if (empty_allowed && tensor.numel() == 0) return;
  check_per_row(op, name, tensor, logits);
  if (tensor.scalar_type() == accumulate_type(logits)) return;
  fail(op, ": ", name, " must have the dtype of the loss, ",
       torch::headeronly::toString(accumulate_type(logits)), ", got ",
       torch::headeronly::toString(tensor.scalar_type()));
}

void check_gradients(const char* op, const Gradients& grad, const Saved& saved, const Tensor& logits,
                     bool has_target, RowReduction reduction) {
  if (grad.loss && reduction == RowReduction::kNone && has_target) {
    check_row_values(op, "grad_loss", *grad.loss, logits, false);
  } else if (grad.loss) {
    check_number(op, "grad_loss", grad.loss, logits);
    if (grad.loss->scalar_type() != accumulate_type(logits)) {
      fail(op, ": grad_loss must have the dtype of the loss");
    }
  }
  if (grad.lse) check_row_values(op, "grad_lse", *grad.lse, logits, false);
  if (grad.entropy) check_row_values(op, "grad_entropy", *grad.entropy, logits, false);
  if (grad.log_prob) check_row_values(op, "grad_log_prob", *grad.log_prob, logits, false);
  check_row_values(op, "lse", saved.lse, logits, false);
  check_row_values(op, "entropy", saved.entropy, logits, !grad.entropy);
  check_row_values(op, "log_prob", saved.log_prob, logits, !has_target);
  check_row_values(op, "smooth_distance", saved.smooth_distance, logits, true);
  if (saved.denominator.dim() != 0 || saved.denominator.scalar_type() != ScalarType::Double) {
    fail(op, ": denominator must be a float64 number []");
  }
  check_same_device(op, "denominator", saved.denominator, logits, "logits");
}

struct BackwardCall {
  const char* op;
  CrossEntropyInputs in;
  Gradients grad;
  Saved saved;
  CrossEntropyOptions options;
  int64_t ignore_index, shift;
  RowReduction reduction;
};

// What may come with strides of its own, contiguous for as long as this lives.
struct RowValues {
  OptionalTensor grad_loss, grad_lse, grad_entropy, grad_log_prob;
  Tensor lse, entropy, log_prob, smooth_distance;

  explicit RowValues(const BackwardCall& c)
      : grad_loss(RowInputs::contiguous(c.grad.loss)),
        grad_lse(RowInputs::contiguous(c.grad.lse)),
        grad_entropy(RowInputs::contiguous(c.grad.entropy)),
        grad_log_prob(RowInputs::contiguous(c.grad.log_prob)),
        lse(*RowInputs::contiguous(c.saved.lse)),
        entropy(*RowInputs::contiguous(c.saved.entropy)),
        log_prob(*RowInputs::contiguous(c.saved.log_prob)),
        smooth_distance(*RowInputs::contiguous(c.saved.smooth_distance)) {}
};

template <class A>
const A* values_of(const OptionalTensor& tensor) {
  return tensor && tensor->numel() > 0 ? static_cast<const A*>(tensor->const_data_ptr()) : nullptr;
}

template <class A>
BackwardInputs<A> inputs_of(const BackwardCall& c, const RowValues& v, const Tensor& weight_sum,
                            const Tensor& grad_token_weight) {
  BackwardInputs<A> in = {};
  in.grad_loss = values_of<A>(v.grad_loss);
  in.grad_lse = values_of<A>(v.grad_lse);
  in.grad_entropy = values_of<A>(v.grad_entropy);
  in.grad_log_prob = values_of<A>(v.grad_log_prob);
  in.lse = values_of<A>(v.lse);
  in.entropy = values_of<A>(v.entropy);
  in.log_prob = values_of<A>(v.log_prob);
  in.smooth_distance = values_of<A>(v.smooth_distance);
  in.denominator = static_cast<const double*>(c.saved.denominator.const_data_ptr());
  in.weight_sum = values_of<double>(weight_sum);
  in.one_grad_loss = c.reduction != RowReduction::kNone;
  in.grad_token_weight = data_of<A>(grad_token_weight);
  return in;
}

// Two launches, one where grad_logits is not needed (null).
void launch_cross_entropy_backward(const BackwardCall& c, const CrossEntropyParams& q,
                                   const RowValues& values, void* grad_logits,
                                   const Tensor& grad_token_weight) {
  if (q.rows.rows == 0) return;
  const Tensor& like = c.in.logits;
  const Grid grid = grid_of(c.op, q), per_row = row_grid(c.op, q.rows.rows);
  const Tensor weights = weight_sum(c.op, q, like);
  constexpr int64_t kMostBytes = sizeof(RowGradient<double>);
  Tensor buffer = device_empty(like, {q.rows.rows * kMostBytes / 8}, ScalarType::Double);
  const cudaStream_t stream = current_stream(like);
  const bool full = c.grad.entropy || c.options.label_smoothing > 0 || c.options.softcap > 0;
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
Tensor backward(const BackwardCall& c, const Tensor* grad_logits, bool needs_token_weight) {
  const RowInputs per_row(c.in);
  const RowValues values(c);
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

void check(const BackwardCall& c) {
  check_inputs(c.op, c.in, c.options, c.shift);
  check_gradients(c.op, c.grad, c.saved, c.in.logits, c.in.target.has_value(), c.reduction);
}

std::tuple<Tensor, Tensor> masked_cross_entropy_backward_cuda(
    const OptionalTensor& grad_loss, const OptionalTensor& grad_lse, const OptionalTensor& grad_entropy,
    const OptionalTensor& grad_log_prob, const Tensor& logits, const OptionalTensor& target,
    const OptionalTensor& mask, const OptionalTensor& weight, const OptionalTensor& token_weight,
    const OptionalTensor& segment_ids, const OptionalTensor& temperature, const Tensor& lse,
    const Tensor& entropy, const Tensor& log_prob, const Tensor& smooth_distance,
    const Tensor& denominator, int64_t ignore_index, double label_smoothing, double softcap,
    double z_loss, double focal_gamma, int64_t shift, std::string reduction, bool needs_logits,
    bool needs_token_weight) {
  constexpr const char* op = "_masked_cross_entropy_backward";
  const BackwardCall call{op,
                          {logits, target, mask, weight, token_weight, segment_ids, temperature},
                          {grad_loss, grad_lse, grad_entropy, grad_log_prob},
                          {lse, entropy, log_prob, smooth_distance, denominator},
                          {label_smoothing, softcap, z_loss, focal_gamma},
                          ignore_index,
                          shift,
                          parse_row_reduction(op, reduction)};
  check(call);
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
    const OptionalTensor& segment_ids, const OptionalTensor& temperature, const Tensor& lse,
    const Tensor& entropy, const Tensor& log_prob, const Tensor& smooth_distance,
    const Tensor& denominator, int64_t ignore_index, double label_smoothing, double softcap,
    double z_loss, double focal_gamma, int64_t shift, std::string reduction, bool needs_token_weight) {
  constexpr const char* op = "_masked_cross_entropy_backward_";
  const BackwardCall call{op,
                          {logits, target, mask, weight, token_weight, segment_ids, temperature},
                          {grad_loss, grad_lse, grad_entropy, grad_log_prob},
                          {lse, entropy, log_prob, smooth_distance, denominator},
                          {label_smoothing, softcap, z_loss, focal_gamma},
                          ignore_index,
                          shift,
                          parse_row_reduction(op, reduction)};
  check(call);
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
