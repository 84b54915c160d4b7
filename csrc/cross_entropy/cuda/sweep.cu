// SPDX-License-Identifier: BSD-3-Clause
// The loss of masked_cross_entropy and its gradient in one sweep, on CUDA: launches. Nothing here waits for
// the device. How many blocks share a row depends on the GPU's shared memory, and with it the last bits.
#include "cross_entropy/cuda/sweep.cuh"

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cross_entropy/cuda/launch.cuh"

namespace masked_loss_ext::cuda {
namespace {

using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kScaleMaxPacks = 2048;  // of a part
constexpr unsigned kScaleBlocks = 1024;

struct SweepCut {
  bool kept;
  int64_t shared_bytes;
};

// A row to a team of lanes, a block, or a cluster of blocks of which a multiprocessor holds two, so that one
// reads while the other writes; a block that fills a multiprocessor has all its threads. Where nothing can
// keep the row, to a block that reads it twice.
SweepCut cut_sweep(CrossEntropyParams& q, const BlockLimits& limits) {
  cut(q, 0);
  const int64_t packs = ceil_div(q.rows.classes, pack_elements(q));
  if (packs <= kLanesMaxPacks) {
    return {true, kThreads / q.team * slot_bytes(q.packs_per_part, true)};
  }
  const auto bytes = [&](int64_t blocks) { return slot_bytes(ceil_div(packs, blocks), true); };
  int blocks = 1;
  while (blocks < limits.cluster_blocks && bytes(blocks) > limits.half_shared_bytes) blocks *= 2;
  const bool kept = bytes(blocks) <= limits.shared_bytes;
  if (!kept) blocks = 1;
  q.packs_per_part = ceil_div(packs, blocks);
  q.parts = blocks;  // of which the last may have a little less
  q.team = q.packs_per_part > kSmallBlockMaxPacks ? kThreads : kSmallBlock;
  if (kept && bytes(blocks) > limits.half_shared_bytes) q.team = kMostThreads;
  return {kept, slot_bytes(q.packs_per_part, kept)};
}

template <class A>
RowOutputs<A> totals_outputs(RowReduction reduction, const Tensor& denominator,
                             const OptionalTensor& normalizer) {
  RowOutputs<A> out = {};
  out.denominator = data_of<double>(denominator);
  if (reduction == RowReduction::kMean) {
    out.rule = normalizer ? Denominator::kGiven : Denominator::kCounted;
  }
  out.normalizer = array_of(normalizer);
  return out;
}

// One launch, two where one block has not all rows.
template <class A>
void launch_totals(const char* op, const CrossEntropyParams& q, const RowOutputs<A>& out,
                   const double* row_losses, const Tensor& like) {
  const Grid grid = row_grid(op, q.rows.rows);
  constexpr int64_t kDoubles = sizeof(Totals) / sizeof(double);
  Tensor buffer = device_empty(like, {grid.blocks * kDoubles}, ScalarType::Double);
  auto* totals = static_cast<Totals*>(buffer.mutable_data_ptr());
  const cudaStream_t stream = current_stream(like);
  check_launch(op, launch(stream, dim3(grid.blocks), dim3(grid.threads), 0,
                          cross_entropy_totals_kernel<A>, q, out, row_losses, totals));
  if (grid.blocks == 1) return;
  check_launch(op, launch(stream, dim3(1), dim3(kThreads), 0, cross_entropy_finish_kernel<A>, out, totals,
                          int64_t{grid.blocks}));
}

template <class T, bool kFull>
void launch_sweep(const char* op, CrossEntropyParams q, const SweepInputs& in, const Tensor& grad_logits) {
  if (q.rows.rows == 0) return;
  const auto keeping = cross_entropy_sweep_kernel<T, kFull, true>;
  const SweepCut cut = cut_sweep(q, block_limits(keeping));
  const auto kernel = cut.kept ? keeping : cross_entropy_sweep_kernel<T, kFull, false>;
  const Grid grid = grid_of(op, q);
  check_launch(op, launch_clusters(static_cast<unsigned>(q.parts), current_stream(grad_logits),
                                   dim3(grid.blocks), dim3(grid.threads),
                                   static_cast<size_t>(cut.shared_bytes), kernel, q, in,
                                   static_cast<T*>(grad_logits.mutable_data_ptr())));
}

struct GradientCall {
  CrossEntropyInputs in;
  const OptionalTensor& normalizer;
  CrossEntropyOptions options;
  int64_t ignore_index, shift;
  const std::string& reduction_name;
};

// Returns the loss. Three launches, up to two more where there are many rows, one with weighted smoothing:
// the denominator, which labels, mask and class weights tell, the rows, the loss.
Tensor with_gradient(const GradientCall& c, const Tensor& grad_logits) {
  constexpr const char* op = "masked_cross_entropy";
  const Tensor& logits = c.in.logits;
  const RowReduction reduction = parse_row_reduction(op, c.reduction_name);
  const std::vector<int64_t> scalar = {};
  const Tensor loss = device_empty(logits, scalar, accumulate_type(logits));
  const Tensor denominator = device_empty(logits, scalar, ScalarType::Double);
  const RowInputs per_row(c.in);
  const CrossEntropyParams q =
      params_of(op, c.in, per_row, c.options, c.ignore_index, c.shift, &grad_logits);
  const Tensor weights = weight_sum(op, q, logits);
  const Tensor row_losses = device_empty(logits, {q.rows.rows}, ScalarType::Double);
  const SweepInputs in = {data_of<double>(denominator), data_of<double>(weights),
                          data_of<double>(row_losses)};
  const bool full = c.options.label_smoothing > 0 || c.options.softcap > 0;
  with_logits_type(q, [&](auto value) {
    using T = decltype(value);
    using A = accumulate_t<T>;
    RowOutputs<A> out = totals_outputs<A>(reduction, denominator, c.normalizer);
    launch_totals<A>(op, q, out, nullptr, logits);
    full ? launch_sweep<T, true>(op, q, in, grad_logits) : launch_sweep<T, false>(op, q, in, grad_logits);
    out.loss = data_of<A>(loss);
    launch_totals<A>(op, q, out, in.row_losses, logits);
  });
  return loss;
}

void check(const GradientCall& c) {
  constexpr const char* op = "masked_cross_entropy";
  scalar_reduction(op, c.reduction_name);
  check_inputs(op, c.in, c.options, c.shift);
  check_number(op, "normalizer", c.normalizer, c.in.logits);
}

std::tuple<Tensor, Tensor> masked_cross_entropy_with_gradient_cuda(
    const Tensor& logits, const Tensor& target, const OptionalTensor& mask, const OptionalTensor& weight,
    const OptionalTensor& token_weight, const OptionalTensor& segment_ids,
    const OptionalTensor& temperature, const OptionalTensor& normalizer, int64_t ignore_index,
    double label_smoothing, double softcap, double z_loss, double focal_gamma, int64_t shift,
    std::string reduction) {
  const OptionalTensor labels = target;
  const GradientCall call{{logits, labels, mask, weight, token_weight, segment_ids, temperature},
                          normalizer,
                          {label_smoothing, softcap, z_loss, focal_gamma},
                          ignore_index,
                          shift,
                          reduction};
  check(call);
  const DeviceScope scope(logits);
  std::vector<int64_t> sizes = row_sizes(logits);
  sizes.push_back(logits.size(logits.dim() - 1));
  const Tensor grad_logits = device_empty(logits, sizes, logits.scalar_type());
  return {with_gradient(call, grad_logits), grad_logits};
}

Tensor masked_cross_entropy_with_gradient_in_place_cuda(
    const Tensor& logits, const Tensor& target, const OptionalTensor& mask, const OptionalTensor& weight,
    const OptionalTensor& token_weight, const OptionalTensor& segment_ids,
    const OptionalTensor& temperature, const OptionalTensor& normalizer, int64_t ignore_index,
    double label_smoothing, double softcap, double z_loss, double focal_gamma, int64_t shift,
    std::string reduction) {
  const OptionalTensor labels = target;
  const GradientCall call{{logits, labels, mask, weight, token_weight, segment_ids, temperature},
                          normalizer,
                          {label_smoothing, softcap, z_loss, focal_gamma},
                          ignore_index,
                          shift,
                          reduction};
  check(call);
  check_overwritable("masked_cross_entropy", "logits", logits);
  const DeviceScope scope(logits);
  return with_gradient(call, logits);
}

void scale_gradient_cuda(const Tensor& grad_logits, const Tensor& grad_loss) {
  constexpr const char* op = "_masked_cross_entropy_scale_gradient_";
  check_scaling(op, grad_logits, grad_loss);
  if (grad_logits.numel() == 0) return;
  const DeviceScope scope(grad_logits);
  CrossEntropyParams q = {};
  q.rows.classes = grad_logits.size(grad_logits.dim() - 1);
  q.rows.rows = grad_logits.numel() / q.rows.classes;
  q.layout = row_layout(op, grad_logits, &grad_logits);
  q.logits = array_of(grad_logits);
  cut(q, kScaleMaxPacks);
  const Grid grid = grid_of(op, q);
  with_logits_type(q, [&](auto value) {
    using T = decltype(value);
    check_launch(op, launch(current_stream(grad_logits), dim3(std::min(grid.blocks, kScaleBlocks)),
                            dim3(grid.threads), 0, cross_entropy_scale_kernel<T>, q,
                            static_cast<T*>(grad_logits.mutable_data_ptr()),
                            static_cast<const accumulate_t<T>*>(grad_loss.const_data_ptr())));
  });
}

}  // namespace
}  // namespace masked_loss_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(MASKED_LOSS_EXT_CUDA_LIBRARY, MASKED_LOSS_EXT_CUDA_KEY, m) {
  m.impl("_masked_cross_entropy_with_gradient",
         TORCH_BOX(&masked_loss_ext::cuda::masked_cross_entropy_with_gradient_cuda));
  m.impl("_masked_cross_entropy_with_gradient_",
         TORCH_BOX(&masked_loss_ext::cuda::masked_cross_entropy_with_gradient_in_place_cuda));
  m.impl("_masked_cross_entropy_scale_gradient_",
         TORCH_BOX(&masked_loss_ext::cuda::scale_gradient_cuda));
}
