// SPDX-License-Identifier: BSD-3-Clause
// masked_cross_entropy, its backward and its sweep (loss and gradient in one pass), for every device: from
// the checked arguments to a RowProblem, results. A Device is Cpu or Cuda with forward(), backward(), sweep()
// and scale() of a RowProblem. A keyword is a word of the schema, a field of RowArguments and a check.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cross_entropy/arguments.h"

namespace masked_loss_ext {

// --- from tensors to a RowProblem ----------------------------------------------------------------------

// Arrays of what is read, for as long as this lives: of contiguous copies where the tensors are not (class
// weights, gradients that autograd expanded, what a hook on saved tensors packed in its own way), which is
// one entry per row beside V logits. Absent what has no elements.
class ReadTensors {
 public:
  Array operator()(const Tensor& tensor) {
    if (tensor.numel() == 0) return {};
    if (tensor.is_contiguous()) return array_of(tensor);
    held_.push_back(torch::stable::contiguous(tensor));
    return array_of(held_.back());
  }
  Array operator()(const std::optional<Tensor>& tensor) { return tensor ? (*this)(*tensor) : Array{}; }

 private:
  std::vector<Tensor> held_;
};

// Where each row of the logits (kPrediction) and of their gradient (kGrad) begins: offset_at().
inline Layout row_layout(const char* op, const Tensor& logits, const Tensor* grad_logits) {
  const bool contiguous = grad_logits == nullptr || grad_logits->is_contiguous();
  if (contiguous && logits.is_contiguous()) {
    Layout layout;
    layout.cols = row_count(logits);
    layout.col_stride[kPrediction] = layout.col_stride[kGrad] = logits.size(logits.dim() - 1);
    return layout;
  }
  LayoutBuilder builder(row_sizes(logits));
  builder.add(kPrediction, logits);
  if (grad_logits != nullptr) builder.add(kGrad, *grad_logits);
  return builder.build(op);
}

inline CountedRows counted_rows(const RowLike& like, int64_t ignore_index, int64_t shift) {
  const int64_t dims = like.like.dim();
  CountedRows q;
  q.rows = row_count(like.like);
  q.classes = like.classes;
  q.first = like.first;
  q.columns = like.columns;
  q.row_length = dims > 1 ? like.like.size(dims - 2) : 1;
  q.shift = std::min(shift, q.row_length);  // beyond the row there is nothing: no sum overflows
  q.ignore_index = ignore_index;
  return q;
}

inline CrossEntropyOptions options_of(const RowArguments& in) {
  if (!in.schedule) return in.options;
  const Tensor numbers = torch::stable::contiguous(*in.schedule);
  const auto* value = static_cast<const double*>(numbers.const_data_ptr());
  return {value[0], value[1], value[2], value[3]};
}

inline void check_rows(const char* op, const RowArguments& in, const RowLike& rows) {
  parse_row_reduction(op, in.reduction);
  if (in.schedule) {
    const Tensor& numbers = *in.schedule;
    const bool fits = type_of(op, "schedule", numbers) == ScalarType::Double && numbers.dim() == 1 &&
                      numbers.size(0) == 4 && numbers.is_cpu();
    if (!fits) fail(op, ": schedule must be float64 [4] on the CPU, got ", shape_text(numbers));
  }
  check_inputs(op, in, rows, options_of(in), in.shift);
}

// Checked arguments as a problem, for as long as this lives; logits, results and gradients are not in it yet.
struct RowInputs {
  const char* const op;
  ReadTensors read;
  RowProblem problem;

  RowInputs(const char* name, const CrossEntropyInputs& in, const RowLike& rows, int64_t ignore_index,
            int64_t shift)
      : op(name) {
    problem.counted = counted_rows(rows, ignore_index, shift);
    problem.counted.target = read(in.target);
    problem.counted.mask = read(in.mask);
    problem.counted.segment_ids = read(in.segment_ids);
    problem.weight = read(in.weight);
    problem.token_weight = read(in.token_weight);
    problem.temperature = read(in.temperature);
    problem.temperature_per_row = in.temperature && in.temperature->dim() > 0;
    problem.normalizer = read(in.normalizer);
  }

  RowInputs(const char* name, const RowArguments& in, const RowLike& rows)
      : RowInputs(name, in, rows, in.ignore_index, in.shift) {
    problem.options = options_of(in);
    problem.statistics = in.statistics;
    problem.reduction = parse_row_reduction(op, in.reduction);
    if (in.target) return;
    problem.reduction = RowReduction::kSum;  // without labels there is no loss, and nothing to divide
    problem.options.label_smoothing = 0;
  }
};

// The problem of rows that lie in memory.
struct RowCall : RowInputs {
  const Tensor logits;  // with rows that are each one stretch of memory

  // Of a room whose rows are those of these inputs.
  RowCall(const char* name, const CrossEntropyInputs& in, int64_t ignore_index, int64_t shift)
      : RowInputs(name, checked(name, in, shift), in.logits, ignore_index, shift),
        logits(with_contiguous_rows(in.logits)) {
    problem.logits = array_of(logits);
  }

  RowCall(const char* name, const RowArguments& in)
      : RowInputs(name, checked(name, in), in.like()), logits(with_contiguous_rows(in.logits)) {
    problem.logits = array_of(logits);
  }

  // The gradient of the logits is written there, or, with null, not made.
  void set_layout(const Tensor* grad_logits) {
    problem.layout = row_layout(op, logits, grad_logits);
    if (grad_logits != nullptr) problem.grad_logits = array_of(*grad_logits);
  }

 private:
  static Tensor with_contiguous_rows(const Tensor& logits) {
    return has_contiguous_rows(logits) ? logits : torch::stable::contiguous(logits);
  }

  static const CrossEntropyInputs& checked(const char* op, const CrossEntropyInputs& in, int64_t shift) {
    check_logits(op, in.logits);
    check_inputs(op, in, in.logits, {}, shift);
    return in;
  }

  static const RowArguments& checked(const char* op, const RowArguments& in) {
    parse_row_reduction(op, in.reduction);
    check_logits(op, in.logits, in.shard);
    check_rows(op, in, in.like());
    return in;
  }
};

// Makes a result and puts it into the problem; where it is not needed it has no elements.
template <class Device>
Tensor make_result(const Tensor& like, Array& place, bool needed, const std::vector<int64_t>& sizes,
                   ScalarType type) {
  if (!needed) return Device::empty(like, {0}, type);
  const Tensor result = Device::empty(like, sizes, type);
  place = array_of(result);
  return result;
}

// The results of the operators over rows, in the order of the schema; prepare(result) where rows may be left
// unwritten.
template <class Device, class F>
auto make_row_results(const Tensor& like, RowProblem& q, const RowArguments& in, const F& prepare) {
  const bool has_target = in.target.has_value();
  const ScalarType type = accumulate_type(like);
  const std::vector<int64_t> rows = row_sizes(like), none;
  const auto make = [&](Array& place, bool needed, const std::vector<int64_t>& sizes, ScalarType of) {
    const Tensor result = make_result<Device>(like, place, needed, sizes, of);
    prepare(result);
    return result;
  };
  const Tensor loss = make(q.loss, true, q.reduction == RowReduction::kNone ? rows : none, type);
  const Tensor lse = make(q.lse, true, rows, type);
  const Tensor entropy = make(q.entropy, in.statistics, rows, type);
  const Tensor log_prob = make(q.log_prob, has_target, rows, type);
  const Tensor hit = make(q.hit, in.statistics && has_target, rows, ScalarType::Bool);
  const Tensor argmax = make(q.argmax, in.statistics, rows, ScalarType::Long);
  const Tensor distance = make(q.smooth_distance, in.smooths() && has_target, rows, type);
  const Tensor totals = make(q.totals, true, {2}, ScalarType::Double);
  const Tensor sums = make(q.row_sums, true, row_sizes(like, kRowSums), type);
  return std::tuple(loss, lse, entropy, log_prob, hit, argmax, distance, totals, sums);
}

// --- the operators ------------------------------------------------------------------------------------

template <class Device>
struct RowForward {
  const RowArguments in;

  explicit RowForward(Arguments& arguments) : in(arguments) {}

  auto run() const {
    RowCall call("masked_cross_entropy", in);
    const typename Device::Scope scope(in.logits);
    const auto results = make_row_results<Device>(in.logits, call.problem, in, [](const Tensor&) {});
    call.set_layout(nullptr);
    Device::forward(call.op, call.problem, in.logits);
    return results;
  }
};

// What the backward is given before the arguments of the forward.
struct RowGradientArguments {
  const std::optional<Tensor> grad_loss, grad_lse, grad_entropy, grad_log_prob;
  const Tensor row_sums, entropy, log_prob, smooth_distance, totals;

  explicit RowGradientArguments(Arguments& in)
      : grad_loss(in.optional_tensor()),
        grad_lse(in.optional_tensor()),
        grad_entropy(in.optional_tensor()),
        grad_log_prob(in.optional_tensor()),
        row_sums(in.tensor()),
        entropy(in.tensor()),
        log_prob(in.tensor()),
        smooth_distance(in.tensor()),
        totals(in.tensor()) {}

  // Checked, into the call's problem.
  void put(RowInputs& call, const RowLike& rows) const {
    const char* op = call.op;
    RowProblem& q = call.problem;
    const bool has_target = q.counted.target.data != nullptr;
    const auto per_row = [&](Array& place, const char* name, const std::optional<Tensor>& tensor,
                             bool needed = true) {
      if (tensor) check_row_values(op, name, *tensor, rows, needed);
      place = call.read(tensor);
    };
    if (grad_loss && q.reduction != RowReduction::kNone) {
      check_number(op, "grad_loss", grad_loss, rows);
      check_loss_type(op, "grad_loss", *grad_loss, rows.like);
      q.grad_loss = array_of(*grad_loss);
    } else {
      per_row(q.grad_loss, "grad_loss", grad_loss);
    }
    if (!has_target) q.grad_loss = {};
    per_row(q.grad_lse, "grad_lse", grad_lse);
    per_row(q.grad_entropy, "grad_entropy", grad_entropy);
    per_row(q.grad_log_prob, "grad_log_prob", grad_log_prob);
    check_row_sums(op, "row_sums", row_sums, kRowSums, accumulate_type(rows.like), rows);
    q.row_sums = call.read(row_sums);
    per_row(q.entropy, "entropy", entropy, grad_entropy.has_value());
    per_row(q.log_prob, "log_prob", log_prob, has_target);
    per_row(q.smooth_distance, "smooth_distance", smooth_distance, q.options.label_smoothing > 0);
    check_saved(op, "totals", totals, {2}, ScalarType::Double, "[2]", rows);
    q.totals = call.read(totals);
  }
};

// kInPlace: the gradient is written over the logits, which autograd is told by the caller. Of a shard of the
// vocabulary it follows from the same results, those of whole rows, as of all classes.
template <class Device, bool kInPlace, class Inputs = RowArguments>
struct RowBackward {
  const RowGradientArguments gradients;
  const Inputs in;
  const bool needs_logits, needs_token_weight;

  explicit RowBackward(Arguments& arguments)
      : gradients(arguments),
        in(arguments),
        needs_logits(kInPlace || arguments.flag()),
        needs_token_weight(arguments.flag()) {}

  auto run() const {
    RowCall call(kInPlace ? Inputs::kBackwardInPlace : Inputs::kBackward, in);
    RowProblem& q = call.problem;
    gradients.put(call, in.like());
    if (kInPlace) check_overwritable(call.op, "logits", in.logits);
    const typename Device::Scope scope(in.logits);
    const bool weighs = needs_token_weight && in.token_weight && in.target;
    const Tensor token_weight = make_result<Device>(in.logits, q.grad_token_weight, weighs,
                                                    row_sizes(in.logits), accumulate_type(in.logits));
    const Tensor logits =
        kInPlace ? in.logits
                 : make_result<Device>(in.logits, q.grad_logits, needs_logits,
                                       row_sizes(in.logits, q.counted.columns), in.logits.scalar_type());
    call.set_layout(needs_logits ? &logits : nullptr);
    if ((needs_logits || weighs) && q.counted.rows > 0) Device::backward(call.op, q, in.logits);
    if constexpr (kInPlace) {
      return token_weight;
    } else {
      return std::tuple(logits, token_weight);
    }
  }
};

// The loss, and its gradient for an incoming gradient of 1; reduction mean or sum.
template <class Device, bool kInPlace>
struct RowSweep {
  const RowArguments in;

  explicit RowSweep(Arguments& arguments) : in(arguments) {}

  auto run() const {
    constexpr const char* op = "masked_cross_entropy";  // whose arguments they are
    RowCall call(op, in);
    RowProblem& q = call.problem;
    if (!in.target) fail(op, ": target must be given for a gradient");
    // One gradient per row is known before the incoming ones only where those are all one number.
    if (q.reduction == RowReduction::kNone) fail(op, ": reduction must be mean or sum, got ", in.reduction);
    if (kInPlace) check_overwritable(op, "logits", in.logits);
    const typename Device::Scope scope(in.logits);
    const ScalarType type = accumulate_type(in.logits);
    const Tensor loss = make_result<Device>(in.logits, q.loss, true, {}, type);
    const Tensor totals = make_result<Device>(in.logits, q.totals, true, {2}, ScalarType::Double);
    const Tensor logits =
        kInPlace ? in.logits
                 : make_result<Device>(in.logits, q.grad_logits, true,
                                       row_sizes(in.logits, q.counted.columns), in.logits.scalar_type());
    call.set_layout(&logits);
    Device::sweep(op, q, in.logits);
    if constexpr (kInPlace) {
      return loss;
    } else {
      return std::tuple(loss, logits);
    }
  }
};

// grad_logits *= grad_loss, by what the gradient of a sweep is too small or too large.
template <class Device>
struct ScaleGradient {
  const Tensor grad_logits, grad_loss;

  explicit ScaleGradient(Arguments& in) : grad_logits(in.tensor()), grad_loss(in.tensor()) {}

  void run() const {
    constexpr const char* op = "_masked_cross_entropy_scale_gradient_";
    check_logits(op, grad_logits);
    check_overwritable(op, "grad_logits", grad_logits);
    check_number(op, "grad_loss", grad_loss, grad_logits);
    check_loss_type(op, "grad_loss", grad_loss, grad_logits);
    if (grad_logits.numel() == 0) return;
    const typename Device::Scope scope(grad_logits);
    RowProblem q;
    q.counted = counted_rows(grad_logits, 0, 0);
    q.logits = q.grad_logits = array_of(grad_logits);
    q.grad_loss = array_of(grad_loss);
    q.layout = row_layout(op, grad_logits, &grad_logits);
    Device::scale(op, q, grad_logits);
  }
};

template <class Device, class Library>
void register_row_forward(Library& m) {
  m.impl("masked_cross_entropy", &boxed<RowForward<Device>>);
}

template <class Device, class Library>
void register_row_backward(Library& m) {
  m.impl("_masked_cross_entropy_backward", &boxed<RowBackward<Device, false>>);
  m.impl("_masked_cross_entropy_backward_", &boxed<RowBackward<Device, true>>);
}

template <class Device, class Library>
void register_row_sweep(Library& m) {
  m.impl("_masked_cross_entropy_sweep", &boxed<RowSweep<Device, false>>);
  m.impl("_masked_cross_entropy_sweep_", &boxed<RowSweep<Device, true>>);
  m.impl("_masked_cross_entropy_scale_gradient_", &boxed<ScaleGradient<Device>>);
}

}  // namespace masked_loss_ext
