// SPDX-License-Identifier: BSD-3-Clause
// masked_cross_entropy on CUDA, forward: launches. Nothing here waits for the device.
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cross_entropy/cuda/forward.cuh"
#include "cross_entropy/cuda/launch.cuh"
#include "cross_entropy/cuda/rows.cuh"

namespace masked_loss_ext::cuda {
namespace {

struct ForwardResults {
  Tensor loss, lse, entropy, log_prob, hit, smooth_distance, denominator, row_sums;
};

ForwardResults make_results(const CrossEntropyInputs& in, const CrossEntropyOptions& options,
                            RowReduction reduction, bool statistics) {
  const Tensor& like = in.logits;
  const std::vector<int64_t> rows = row_sizes(like), none = {0}, scalar = {};
  const ScalarType type = accumulate_type(like);
  const bool has_target = in.target.has_value();
  const bool per_row = reduction == RowReduction::kNone && has_target;
  std::vector<int64_t> sums = rows;
  sums.push_back(kRowSums);
  return {device_empty(like, per_row ? rows : scalar, type),
          device_empty(like, rows, type),
          device_empty(like, statistics ? rows : none, type),
          device_empty(like, has_target ? rows : none, type),
          device_empty(like, statistics && has_target ? rows : none, ScalarType::Bool),
          device_empty(like, options.label_smoothing > 0 && has_target ? rows : none, type),
          device_empty(like, scalar, ScalarType::Double),
          device_empty(like, sums, type)};
}

template <class A>
RowOutputs<A> outputs_of(const ForwardResults& r, RowReduction reduction, bool has_target,
                         const Tensor& weight_sum, const std::optional<Tensor>& normalizer) {
  RowOutputs<A> out = {};
  out.row_sums = data_of<A>(r.row_sums);
  out.lse = data_of<A>(r.lse);
  out.entropy = data_of<A>(r.entropy);
  out.log_prob = data_of<A>(r.log_prob);
  out.smooth_distance = data_of<A>(r.smooth_distance);
  out.hit = data_of<bool>(r.hit);
  const bool per_row = reduction == RowReduction::kNone && has_target;
  (per_row ? out.row_loss : out.loss) = data_of<A>(r.loss);
  out.denominator = data_of<double>(r.denominator);
  if (reduction == RowReduction::kMean) {
    out.rule = normalizer ? Denominator::kGiven : Denominator::kCounted;
  }
  out.normalizer = array_of(normalizer);
  out.weight_sum = data_of<double>(weight_sum);
  return out;
}

// Three launches, two where one block has all rows.
void launch_cross_entropy_forward(const char* op, const CrossEntropyParams& q,
                                  const ForwardResults& results, RowReduction reduction,
                                  const std::optional<Tensor>& normalizer, const Tensor& like) {
  const Grid grid = grid_of(op, q), per_row = row_grid(op, q.rows.rows);
  constexpr int64_t kDoubles = sizeof(RowSums<double>) / sizeof(double);
  constexpr int64_t kTotalsDoubles = sizeof(Totals) / sizeof(double);
  Tensor parts_buffer = device_empty(like, {q.rows.rows * q.parts * kDoubles}, ScalarType::Double);
  Tensor totals_buffer = device_empty(like, {per_row.blocks * kTotalsDoubles}, ScalarType::Double);
  auto* parts = static_cast<RowSums<double>*>(parts_buffer.mutable_data_ptr());
  auto* totals = static_cast<Totals*>(totals_buffer.mutable_data_ptr());
  const Tensor weights = weight_sum(op, q, like);
  const cudaStream_t stream = current_stream(like);
  const bool full = q.statistics || q.options.label_smoothing > 0 || q.options.softcap > 0;
  if (q.rows.rows > 0) {
    with_logits_type(q, [&](auto value) {
      using T = decltype(value);
      const auto kernel = full ? cross_entropy_sums_kernel<T, true> : cross_entropy_sums_kernel<T, false>;
      check_launch(op, launch(stream, dim3(grid.blocks), dim3(grid.threads), 0, kernel, q, parts));
    });
  }
  with_loss_type(q, [&](auto value) {
    using A = decltype(value);
    const RowOutputs<A> out = outputs_of<A>(results, reduction, q.rows.target.data != nullptr, weights,
                                              normalizer);
    check_launch(op, launch(stream, dim3(per_row.blocks), dim3(per_row.threads), 0,
                            cross_entropy_rows_kernel<A>, q, out, parts, totals));
    if (per_row.blocks == 1) return;
    check_launch(op, launch(stream, dim3(1), dim3(kThreads), 0, cross_entropy_finish_kernel<A>, out,
                            totals, int64_t{per_row.blocks}));
  });
}

using EightTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

EightTensors masked_cross_entropy_forward_cuda(
    const Tensor& logits, const std::optional<Tensor>& target, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& token_weight,
    const std::optional<Tensor>& segment_ids, const std::optional<Tensor>& temperature,
    const std::optional<Tensor>& normalizer, int64_t ignore_index, double label_smoothing,
    double softcap, double z_loss, double focal_gamma, int64_t shift, std::string reduction_name,
    bool statistics) {
  constexpr const char* op = "masked_cross_entropy";
  const CrossEntropyInputs in{logits, target, mask, weight, token_weight, segment_ids, temperature};
  const CrossEntropyOptions options{label_smoothing, softcap, z_loss, focal_gamma};
  const RowReduction reduction = parse_row_reduction(op, reduction_name);
  check_inputs(op, in, options, shift);
  check_number(op, "normalizer", normalizer, logits);
  const DeviceScope scope(logits);
  const RowInputs per_row(in);
  const ForwardResults r = make_results(in, options, reduction, statistics);
  CrossEntropyParams q = params_of(op, in, per_row, options, ignore_index, shift, nullptr);
  q.statistics = statistics;
  cut(q, 0);
  launch_cross_entropy_forward(op, q, r, reduction, normalizer, logits);
  return {r.loss, r.lse,             r.entropy,     r.log_prob,
          r.hit,  r.smooth_distance, r.denominator, r.row_sums};
}

}  // namespace
}  // namespace masked_loss_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(MASKED_LOSS_EXT_CUDA_LIBRARY, MASKED_LOSS_EXT_CUDA_KEY, m) {
  m.impl("masked_cross_entropy",
         TORCH_BOX(&masked_loss_ext::cuda::masked_cross_entropy_forward_cuda));
}
