// SPDX-License-Identifier: BSD-3-Clause
// masked_squared_error on CUDA: launches. Nothing here waits for the device.
#include "elementwise/cuda/kernels.cuh"

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/cuda/runtime.cuh"
#include "elementwise/call.h"

namespace masked_loss_ext::cuda {
namespace {

constexpr int64_t kMaxBlocks = 2048;      // fills 132 multiprocessors; fixed, so that sums are too
constexpr int64_t kItemColumns = 4096;    // longest stretch of a row for one group of lanes
constexpr int kPackBytes = 16;

struct Tag {};  // carries types into generic lambdas
template <class Reader, class Tail>
struct Readers : Tag {
  using Main = Reader;
  using Rest = Tail;
};

bool divisible(int64_t bytes) { return bytes % kPackBytes == 0; }

// 16-byte packs of `operand` are aligned in every row.
bool packs_align(const Layout& layout, Operand operand, const Array& array) {
  if (array.data == nullptr) return true;
  bool aligned = divisible(reinterpret_cast<int64_t>(array.data));
  for (int d = 0; d < layout.outer; ++d) {
    aligned = aligned && divisible(layout.outer_stride[d][operand] * size_of(array.kind));
  }
  return aligned;
}

bool is_direct(const SquaredErrorParams& q) {
  const Layout& l = q.layout;
  return q.prediction.kind == q.target.kind &&
         (l.cols <= 1 || (l.col_stride[kPrediction] == 1 && l.col_stride[kTarget] == 1));
}

bool has_packs(const SquaredErrorParams& q) {
  const Layout& l = q.layout;
  return l.cols * size_of(q.prediction.kind) >= kPackBytes &&
         packs_align(l, kPrediction, q.prediction) && packs_align(l, kTarget, q.target) &&
         packs_align(l, kGrad, q.grad_prediction) && packs_align(l, kGrad, q.grad_target);
}

// Calls f with the readers that fit.
template <class T, class F>
void with_direct(const SquaredErrorParams& q, F f) {
  using One = DirectReader<T, 1>;
  if (has_packs(q)) {
    f(Readers<DirectReader<T, kVectorOf<T>>, One>{});
  } else {
    f(Readers<One, One>{});
  }
}

template <class F>
void with_readers(const SquaredErrorParams& q, F f) {
  if (!is_direct(q)) {
    const bool wide = q.prediction.kind == Kind::kDouble || q.target.kind == Kind::kDouble;
    if (wide) return f(Readers<AnyReader<double>, AnyReader<double>>{});
    return f(Readers<AnyReader<float>, AnyReader<float>>{});
  }
  switch (q.prediction.kind) {
    case Kind::kDouble: return with_direct<double>(q, f);
    case Kind::kHalf: return with_direct<c10::Half>(q, f);
    case Kind::kBFloat16: return with_direct<c10::BFloat16>(q, f);
    default: return with_direct<float>(q, f);
  }
}

// whole_rows: something is written once per row, so a row must not be cut, nor passed over where it has
// no columns: its sum is 0.
void cut(SquaredErrorParams& q, bool whole_rows) {
  const Layout& l = q.layout;
  q.cols_per_item = whole_rows ? l.cols : std::min(l.cols, kItemColumns);
  q.col_items = whole_rows ? 1 : l.cols > 0 ? (l.cols + q.cols_per_item - 1) / q.cols_per_item : 0;
  q.items = l.rows * q.col_items;
  const int64_t pack = is_direct(q) && has_packs(q) ? kPackBytes / size_of(q.prediction.kind) : 1;
  q.lanes = 1;
  while (q.lanes < kWarpSize && q.lanes * pack < q.cols_per_item) q.lanes *= 2;
}

unsigned block_count(const SquaredErrorParams& q) {
  const int64_t items_per_block = kThreads / q.lanes;
  const int64_t blocks = (q.items + items_per_block - 1) / items_per_block;
  return static_cast<unsigned>(std::clamp<int64_t>(blocks, 1, kMaxBlocks));
}

SquaredErrorParams params_of(const SquaredErrorInputs& in, Reduction reduction, double foreground,
                             double background) {
  SquaredErrorParams q = {};
  q.prediction = array_of(in.prediction);
  q.target = array_of(in.target);
  q.mask = array_of(in.mask);
  q.edit_mask = array_of(in.edit_mask);
  q.weighting = array_of(in.weighting);
  q.foreground = foreground;
  q.background = background;
  q.denominator = fixed_denominator(reduction, in.prediction);
  q.divide_by_count = reduction == Reduction::kMean;
  return q;
}

// Two launches: blocks leave partial sums, one block adds them.
void launch_squared_error_forward(const char* op, SquaredErrorParams& q, const Tensor& like,
                                  Tensor& loss, Tensor& count, bool scalar) {
  const unsigned blocks = block_count(q);
  Tensor sums = device_empty(like, {blocks}, ScalarType::Double);
  Tensor counts = device_empty(like, {blocks}, ScalarType::Long);
  q.partial_sum = sums.mutable_data_ptr<double>();
  q.partial_count = counts.mutable_data_ptr<int64_t>();
  int64_t* count_data = count.mutable_data_ptr<int64_t>();
  const cudaStream_t stream = current_stream(like);
  with_readers(q, [&](auto readers) {
    using R = decltype(readers);
    using A = typename R::Main::A;
    check_launch(op, launch(stream, dim3(blocks), dim3(kThreads), 0,
                            squared_error_forward_kernel<typename R::Main, typename R::Rest>, q));
    A* loss_data = scalar ? static_cast<A*>(loss.mutable_data_ptr()) : nullptr;
    check_launch(op, launch(stream, dim3(1), dim3(kThreads), 0, squared_error_finish_kernel<A>,
                            q.partial_sum, q.partial_count, int(blocks), q.denominator,
                            q.divide_by_count, loss_data, count_data));
  });
}

std::tuple<Tensor, Tensor> masked_squared_error_forward_cuda(
    const Tensor& prediction, const Tensor& target, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& edit_mask, const std::optional<Tensor>& weighting,
    double foreground_weight, double background_weight, std::string reduction_name) {
  constexpr const char* op = "masked_squared_error";
  const SquaredErrorInputs in{prediction, target, mask, edit_mask, weighting};
  const Reduction reduction = parse_reduction(op, reduction_name);
  check_inputs(op, in, reduction, foreground_weight, background_weight);
  const DeviceScope scope(prediction);
  Tensor loss = device_empty(prediction, output_sizes(prediction, loss_shape(reduction)),
                             accumulate_type(in));
  Tensor count = device_empty(prediction, std::vector<int64_t>{}, ScalarType::Long);
  LayoutBuilder builder = input_layout(in);
  SquaredErrorParams q = params_of(in, reduction, foreground_weight, background_weight);
  if (!is_scalar(reduction)) {
    builder.add(kLoss, loss);
    q.loss = array_of(loss);
  }
  if (builder.merge(q.layout) > LayoutBuilder::kMostMerged) {
    const MergingInputs copies(in);
    return masked_squared_error_forward_cuda(copies.prediction, copies.target, copies.mask,
                                             copies.edit_mask, copies.weighting, foreground_weight,
                                             background_weight, reduction_name);
  }
  cut(q, reduction == Reduction::kToken);
  launch_squared_error_forward(op, q, prediction, loss, count, is_scalar(reduction));
  return {loss, count};
}

void launch_squared_error_backward(const char* op, const SquaredErrorParams& q, const Tensor& like) {
  if (q.items == 0) return;
  const cudaStream_t stream = current_stream(like);
  with_readers(q, [&](auto readers) {
    using R = decltype(readers);
    check_launch(op, launch(stream, dim3(block_count(q)), dim3(kThreads), 0,
                            squared_error_backward_kernel<typename R::Main, typename R::Rest>, q));
  });
}

std::tuple<Tensor, Tensor, Tensor> masked_squared_error_backward_cuda(
    const Tensor& grad_loss, const Tensor& prediction, const Tensor& target,
    const std::optional<Tensor>& mask, const std::optional<Tensor>& edit_mask,
    const std::optional<Tensor>& weighting, const Tensor& count, double foreground_weight,
    double background_weight, std::string reduction_name, bool needs_prediction,
    bool needs_target, bool needs_weighting) {
  constexpr const char* op = "_masked_squared_error_backward";
  const SquaredErrorInputs in{prediction, target, mask, edit_mask, weighting};
  const Reduction reduction = parse_reduction(op, reduction_name);
  check_inputs(op, in, reduction, foreground_weight, background_weight);
  check_grad_loss(op, grad_loss, in, reduction);
  check_count(op, count, prediction);
  const DeviceScope scope(prediction);
  const GradientPlan plan =
      plan_gradients(in, needs_prediction, needs_target, needs_weighting && weighting.has_value());
  Tensor grad_prediction = device_empty(prediction, plan.prediction_sizes, prediction.scalar_type());
  Tensor grad_target = device_empty(prediction, plan.target_sizes, target.scalar_type());
  Tensor grad_weighting = device_empty(prediction, plan.weighting_sizes, accumulate_type(in));
  SquaredErrorParams q = params_of(in, reduction, foreground_weight, background_weight);
  if (backward_layout(in, plan, reduction, grad_loss, grad_prediction, grad_target, grad_weighting)
          .merge(q.layout) > LayoutBuilder::kMostMerged) {
    const MergingInputs copies(in);
    return masked_squared_error_backward_cuda(
        torch::stable::contiguous(grad_loss), copies.prediction, copies.target, copies.mask,
        copies.edit_mask, copies.weighting, count, foreground_weight, background_weight,
        reduction_name, needs_prediction, needs_target, needs_weighting);
  }
  (is_scalar(reduction) ? q.grad_loss : q.loss) = array_of(grad_loss);
  q.count = count.const_data_ptr<int64_t>();
  if (plan.prediction) q.grad_prediction = array_of(grad_prediction);
  if (plan.target) q.grad_target = array_of(grad_target);
  if (plan.weighting) q.grad_weighting = array_of(grad_weighting);
  cut(q, plan.whole_rows);
  launch_squared_error_backward(op, q, prediction);
  return {grad_prediction, grad_target, grad_weighting};
}

}  // namespace
}  // namespace masked_loss_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(MASKED_LOSS_EXT_CUDA_LIBRARY, MASKED_LOSS_EXT_CUDA_KEY, m) {
  m.impl("masked_squared_error",
         TORCH_BOX(&masked_loss_ext::cuda::masked_squared_error_forward_cuda));
  m.impl("_masked_squared_error_backward",
         TORCH_BOX(&masked_loss_ext::cuda::masked_squared_error_backward_cuda));
}
