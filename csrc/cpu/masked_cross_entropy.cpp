// SPDX-License-Identifier: BSD-3-Clause
// masked_cross_entropy on CPU: allocation, the cut into chunks, the final sums.
#include "masked_cross_entropy_host.h"

#include <torch/csrc/stable/library.h>

#include <cstring>
#include <stdexcept>
#include <tuple>

#include "allocate.h"
#include "cpu/capability.h"
#include "cpu/masked_cross_entropy_cpu.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "cpu/scalars.h"

namespace masked_loss_ext {
namespace {

// Logits of work per chunk, and the longest piece of a row: so few that one long row gives every core
// work, enough to hide the scheduling (some 50 ns).
constexpr int64_t kChunkLogits = 16384;
// A gradient of as many rows is cut by rows alone, so that chunks lie one after another in the output.
constexpr int64_t kManyRows = 64;

const CrossEntropyKernels& kernels() {
#if defined(__x86_64__)
  switch (cpu_level()) {
    case Level::kAvx512: return cross_entropy_avx512;
    case Level::kAvx2: return cross_entropy_avx2;
    default: break;
  }
#endif
  return cross_entropy_default;
}

RowChunks cut(const CountedRows& q, bool whole_rows) {
  RowChunks c;
  c.pieces = whole_rows ? 1 : (q.classes + kChunkLogits - 1) / kChunkLogits;
  c.cols_per_piece = (q.classes + c.pieces - 1) / c.pieces;
  c.rows_per_chunk = std::max<int64_t>(1, kChunkLogits / q.classes);
  c.count = (q.rows + c.rows_per_chunk - 1) / c.rows_per_chunk * c.pieces;
  return c;
}

// Everything but what is written. `rows` and the inputs must outlive it.
CrossEntropyProblem problem_of(const CrossEntropyInputs& in, const RowInputs& rows,
                               const CrossEntropyOptions& options, const Layout& layout,
                               int64_t ignore_index, int64_t shift) {
  CrossEntropyProblem q;
  q.layout = &layout;
  q.counted = counted_rows(in.logits, rows, ignore_index, shift);
  q.options = options;
  q.logits = array_of(in.logits);
  q.weight = array_of(in.weight);
  q.token_weight = array_of(rows.token_weight);
  if (in.temperature) q.scale = 1 / read_number(*in.temperature);
  q.weight_sum = double(q.counted.classes);
  if (in.weight && options.label_smoothing > 0) {
    q.weight_sum = 0;
    const bool wide = q.weight.kind == Kind::kDouble;
    for (int64_t c = 0; c < q.counted.classes; ++c) {
      q.weight_sum += wide ? static_cast<const double*>(q.weight.data)[c]
                           : double(static_cast<const float*>(q.weight.data)[c]);
    }
  }
  return q;
}

void check_temperature(const char* op, const std::optional<Tensor>& temperature) {
  if (!temperature) return;
  const double value = read_number(*temperature);
  if (!(value > 0)) fail(op, ": temperature must be positive, got ", value);
}

// The row's index as a tensor's: [i, j].
[[noreturn]] void refuse_label(const CrossEntropyProblem& q, const Tensor& logits, int64_t row) {
  std::string index;
  int64_t rest = row;
  for (int64_t d = logits.dim() - 2; d >= 0; --d) {
    int64_t i = rest % logits.size(d);
    rest /= logits.size(d);
    if (d == logits.dim() - 2) i += q.counted.shift;
    index = std::to_string(i) + (index.empty() ? "" : ", " + index);
  }
  const int64_t label = read_integer(q.counted.target, row + q.counted.shift);
  std::ostringstream text;
  text << "masked_cross_entropy: target at row [" << index << "] must be in [0, " << q.counted.classes
       << ") or ignore_index " << q.counted.ignore_index << ", got " << label;
  throw std::out_of_range(text.str());
}

struct ForwardOutputs {
  Tensor loss, lse, entropy, log_prob, hit, smooth_distance, denominator;
};

ForwardOutputs allocate_outputs(const Tensor& logits, RowReduction reduction, bool has_target,
                                bool smooths, bool statistics) {
  const ScalarType type = accumulate_type(logits);
  const std::vector<int64_t> rows = row_sizes(logits), none = {0}, scalar;
  const bool per_row = reduction == RowReduction::kNone && has_target;
  return {empty_tensor(logits, per_row ? rows : scalar, type),
          empty_tensor(logits, rows, type),
          empty_tensor(logits, statistics ? rows : none, type),
          empty_tensor(logits, has_target ? rows : none, type),
          empty_tensor(logits, statistics && has_target ? rows : none, ScalarType::Bool),
          empty_tensor(logits, smooths && has_target ? rows : none, type),
          empty_tensor(logits, scalar, ScalarType::Double)};
}

// An output that is made, or nothing.
Array array_where(bool made, const Tensor& tensor) { return made ? array_of(tensor) : Array{}; }

ChunkTotals run_forward(CrossEntropyProblem& q) {
  const CrossEntropyKernels& kernel = kernels();
  q.chunks = cut(q.counted, false);
  const bool is_cut = q.chunks.pieces > 1;
  const int64_t groups = (q.counted.rows + kRowsPerFinish - 1) / kRowsPerFinish;
  std::vector<RowPart> parts(is_cut ? q.chunks.count : 0);
  std::vector<ChunkTotals> totals(is_cut ? groups : q.chunks.count);
  q.parts = is_cut ? parts.data() : nullptr;
  q.totals = totals.data();
  // Last chunk first: what the model wrote last is still in the cache, and what is read last here is
  // what the backward, which goes upwards, reads first.
  for_each_chunk(q.chunks.count,
                 [&](int64_t i) { kernel.forward(q, q.chunks.count - 1 - i); });
  if (is_cut) for_each_chunk(groups, [&](int64_t group) { kernel.finish(q, group); });
  ChunkTotals all;
  for (const ChunkTotals& t : totals) {
    all.loss += t.loss;
    all.denominator += t.denominator;
    if (all.bad_row < 0) all.bad_row = t.bad_row;
  }
  return all;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> masked_cross_entropy_forward_cpu(
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
  check_temperature(op, temperature);
  ForwardOutputs out = allocate_outputs(logits, reduction, target.has_value(), label_smoothing > 0,
                                        statistics);
  const RowInputs rows(in);
  const Layout layout = row_layout(op, logits, nullptr);
  CrossEntropyProblem q = problem_of(in, rows, options, layout, ignore_index, shift);
  q.statistics = statistics;
  q.lse = array_of(out.lse);
  q.entropy = array_where(statistics, out.entropy);
  q.log_prob = array_where(target.has_value(), out.log_prob);
  q.hit = array_where(statistics && target, out.hit);
  q.smooth_distance = array_where(label_smoothing > 0 && target, out.smooth_distance);
  q.loss = array_where(reduction == RowReduction::kNone && target, out.loss);
  if (!target) q.options.label_smoothing = 0;
  const ChunkTotals totals = run_forward(q);
  if (totals.bad_row >= 0) refuse_label(q, logits, totals.bad_row);
  double denominator = reduction == RowReduction::kMean ? totals.denominator : 1;
  if (normalizer && reduction == RowReduction::kMean) denominator = read_number(*normalizer);
  write_number(out.denominator, denominator);
  if (q.loss.data == nullptr) {
    write_number(out.loss, denominator != 0 ? totals.loss / denominator : 0.0);
  }
  return {out.loss, out.lse, out.entropy, out.log_prob, out.hit, out.smooth_distance,
          out.denominator};
}

struct BackwardInputs {
  const std::optional<Tensor>&grad_loss, &grad_lse, &grad_entropy, &grad_log_prob;
  const Tensor &lse, &entropy, &log_prob, &smooth_distance, &denominator;
};

void check_backward(const char* op, const CrossEntropyInputs& in, const BackwardInputs& b,
                    RowReduction reduction) {
  auto check = [&](const char* name, const std::optional<Tensor>& tensor, bool per_row) {
    if (!tensor) return;
    if (tensor->scalar_type() != accumulate_type(in.logits)) {
      fail(op, ": ", name, " must have the dtype of the loss, got ",
           torch::headeronly::toString(tensor->scalar_type()));
    }
    if (per_row) return check_per_row(op, name, *tensor, in.logits);
    check_number(op, name, tensor, in.logits);
  };
  check("grad_loss", b.grad_loss, reduction == RowReduction::kNone && in.target);
  check("grad_lse", b.grad_lse, true);
  check("grad_entropy", b.grad_entropy, true);
  check("grad_log_prob", b.grad_log_prob, true);
  check("lse", b.lse, true);
  if (b.grad_entropy) check("entropy", b.entropy, true);
  if (in.target) check("log_prob", b.log_prob, true);
  check_number(op, "denominator", b.denominator, in.logits);
}

// Contiguous copies of the incoming gradients per row, which autograd may hand over expanded.
struct RowGradientInputs {
  std::optional<Tensor> loss, lse, entropy, log_prob;

  explicit RowGradientInputs(const BackwardInputs& b)
      : loss(RowInputs::contiguous(b.grad_loss)),
        lse(RowInputs::contiguous(b.grad_lse)),
        entropy(RowInputs::contiguous(b.grad_entropy)),
        log_prob(RowInputs::contiguous(b.grad_log_prob)) {}
};

void set_gradients(CrossEntropyProblem& q, const BackwardInputs& b, const RowGradientInputs& g,
                   RowReduction reduction, bool has_target) {
  q.lse = array_of(b.lse);
  q.entropy = array_where(b.entropy.numel() > 0, b.entropy);
  q.log_prob = array_where(has_target, b.log_prob);
  q.smooth_distance = array_where(b.smooth_distance.numel() > 0, b.smooth_distance);
  q.grad_lse = array_of(g.lse);
  q.grad_entropy = array_of(g.entropy);
  q.grad_log_prob = array_of(g.log_prob);
  if (!b.grad_loss || !has_target) return;
  if (reduction == RowReduction::kNone) {
    q.grad_loss = array_of(g.loss);
    q.grad_scale = 1;
    return;
  }
  const double denominator = read_number(b.denominator);
  q.grad_scale = denominator != 0 ? read_number(*g.loss) / denominator : 0;
}

void run_backward(CrossEntropyProblem& q, const Tensor* grad_logits, bool in_place) {
  const CrossEntropyKernels& kernel = kernels();
  q.chunks = cut(q.counted, q.counted.rows >= kManyRows);
  if (grad_logits == nullptr || in_place) {
    return for_each_chunk(q.chunks.count, [&](int64_t chunk) { kernel.backward(q, chunk); });
  }
  const int64_t bytes =
      q.chunks.rows_per_chunk * q.chunks.cols_per_piece * grad_logits->element_size();
  for_each_chunk_of_output(q.chunks.count, grad_logits->const_data_ptr(), bytes,
                           [&](int64_t chunk) { kernel.backward(q, chunk); });
}

struct GradientOutputs {
  Tensor logits, token_weight;
};

GradientOutputs backward_cpu(const char* op, const CrossEntropyInputs& in, const BackwardInputs& b,
                             const CrossEntropyOptions& options, int64_t ignore_index, int64_t shift,
                             const std::string& reduction_name, bool needs_logits,
                             bool needs_token_weight, bool in_place) {
  const RowReduction reduction = parse_row_reduction(op, reduction_name);
  check_inputs(op, in, options, shift);
  check_backward(op, in, b, reduction);
  const std::vector<int64_t> none = {0};
  std::vector<int64_t> sizes = row_sizes(in.logits);
  const bool weighs = needs_token_weight && in.token_weight && in.target;
  Tensor grad_token_weight = empty_tensor(in.logits, weighs ? sizes : none, accumulate_type(in.logits));
  sizes.push_back(in.logits.size(in.logits.dim() - 1));
  const bool fresh = needs_logits && !in_place;
  Tensor grad_logits =
      in_place ? in.logits : empty_tensor(in.logits, fresh ? sizes : none, in.logits.scalar_type());

  const RowInputs rows(in);
  const RowGradientInputs gradients(b);
  const Layout layout = row_layout(op, in.logits, needs_logits ? &grad_logits : nullptr);
  CrossEntropyProblem q = problem_of(in, rows, options, layout, ignore_index, shift);
  set_gradients(q, b, gradients, reduction, in.target.has_value());
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
    const Tensor& lse, const Tensor& entropy, const Tensor& log_prob, const Tensor& smooth_distance,
    const Tensor& denominator, int64_t ignore_index, double label_smoothing, double softcap,
    double z_loss, double focal_gamma, int64_t shift, const std::string& reduction,
    bool needs_logits, bool needs_token_weight) {
  const CrossEntropyInputs in{logits,       target,      mask,       weight,
                              token_weight, segment_ids, temperature};
  const BackwardInputs b{grad_loss, grad_lse, grad_entropy,    grad_log_prob, lse,
                         entropy,   log_prob, smooth_distance, denominator};
  const GradientOutputs out =
      backward_cpu("_masked_cross_entropy_backward", in, b,
                   {label_smoothing, softcap, z_loss, focal_gamma}, ignore_index, shift, reduction,
                   needs_logits, needs_token_weight, false);
  return {out.logits, out.token_weight};
}

Tensor masked_cross_entropy_backward_in_place_cpu(
    const std::optional<Tensor>& grad_loss, const std::optional<Tensor>& grad_lse,
    const std::optional<Tensor>& grad_entropy, const std::optional<Tensor>& grad_log_prob,
    const Tensor& logits, const std::optional<Tensor>& target, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& token_weight,
    const std::optional<Tensor>& segment_ids, const std::optional<Tensor>& temperature,
    const Tensor& lse, const Tensor& entropy, const Tensor& log_prob, const Tensor& smooth_distance,
    const Tensor& denominator, int64_t ignore_index, double label_smoothing, double softcap,
    double z_loss, double focal_gamma, int64_t shift, const std::string& reduction,
    bool needs_token_weight) {
  constexpr const char* op = "_masked_cross_entropy_backward_";
  const CrossEntropyInputs in{logits,       target,      mask,       weight,
                              token_weight, segment_ids, temperature};
  const BackwardInputs b{grad_loss, grad_lse, grad_entropy,    grad_log_prob, lse,
                         entropy,   log_prob, smooth_distance, denominator};
  return backward_cpu(op, in, b, {label_smoothing, softcap, z_loss, focal_gamma}, ignore_index, shift,
                      reduction, true, needs_token_weight, true)
      .token_weight;
}

}  // namespace
}  // namespace masked_loss_ext

STABLE_TORCH_LIBRARY_IMPL(masked_loss_ext, CPU, m) {
  m.impl("masked_cross_entropy", TORCH_BOX(&masked_loss_ext::masked_cross_entropy_forward_cpu));
  m.impl("_masked_cross_entropy_backward",
         TORCH_BOX(&masked_loss_ext::masked_cross_entropy_backward_cpu));
  m.impl("_masked_cross_entropy_backward_",
         TORCH_BOX(&masked_loss_ext::masked_cross_entropy_backward_in_place_cpu));
}
