// SPDX-License-Identifier: BSD-3-Clause
// masked_cross_entropy, its backward and its sweep (loss and gradient in one pass), for every device:
// arguments, checks, results. A Device is Cpu or Cuda with forward(), backward(), sweep() and scale() of a
// RowProblem. A keyword is a word of the schema, a field of RowArguments and a check.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "common/layout_builder.h"
#include "common/operator.h"
#include "cross_entropy/formula.h"

namespace masked_loss_ext {

// What all that is per row goes by, and what its errors call it: logits [..., V], or where those are made in
// pieces hidden states [..., D] with as many rows.
struct RowLike {
  const Tensor& like;
  int64_t classes;
  const char* name = "logits";
  const char* class_weight = "weight";

  RowLike(const Tensor& logits)
      : like(logits), classes(logits.dim() > 0 ? logits.size(logits.dim() - 1) : 0) {}
  RowLike(const Tensor& hidden, int64_t v)
      : like(hidden), classes(v), name("hidden"), class_weight("class_weight") {}
};

struct CrossEntropyInputs {
  Tensor logits;  // or hidden, see RowLike
  std::optional<Tensor> target, mask, weight, token_weight, segment_ids, temperature, normalizer;
};

// In the order of the schema.
struct RowArguments : CrossEntropyInputs {
  int64_t ignore_index;
  CrossEntropyOptions options;
  int64_t shift;
  std::string reduction;
  bool statistics;
  std::optional<Tensor> schedule;

  explicit RowArguments(Arguments& in) : RowArguments(in.tensor(), in) {}

  RowArguments(Tensor first, Arguments& in)
      : CrossEntropyInputs{std::move(first),     in.optional_tensor(), in.optional_tensor(),
                           in.optional_tensor(), in.optional_tensor(), in.optional_tensor(),
                           in.optional_tensor(), in.optional_tensor()},
        ignore_index(in.integer()),
        options{in.number(), in.number(), in.number(), in.number()},
        shift(in.integer()),
        reduction(in.text()),
        statistics(in.flag()),
        schedule(in.optional_tensor()) {}

  bool smooths() const { return schedule.has_value() || options.label_smoothing > 0; }
};

// --- checks ------------------------------------------------------------------------------------------

inline RowReduction parse_row_reduction(const char* op, const std::string& name) {
  if (name == "mean") return RowReduction::kMean;
  if (name == "sum") return RowReduction::kSum;
  if (name == "none") return RowReduction::kNone;
  fail(op, ": reduction must be mean, sum or none, got ", name);
}

// float64 where the logits are, else float32.
inline ScalarType accumulate_type(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline std::vector<int64_t> row_sizes(const Tensor& logits) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d + 1 < logits.dim(); ++d) sizes.push_back(logits.size(d));
  return sizes;
}

inline std::vector<int64_t> row_sizes(const Tensor& logits, int64_t each) {
  std::vector<int64_t> sizes = row_sizes(logits);
  sizes.push_back(each);
  return sizes;
}

inline void check_logits(const char* op, const Tensor& logits) {
  check_floating(op, "logits", logits);
  const int64_t dims = logits.dim();
  if (dims == 0 || logits.size(dims - 1) == 0) {
    fail(op, ": logits must be [..., V] with at least one class, got ", shape_text(logits));
  }
  if (dims > kTorchDims) {
    fail(op, ": logits must have at most ", kTorchDims, " dimensions, got ", dims);
  }
}

// Rows of which each is one stretch of memory.
inline bool has_contiguous_rows(const Tensor& logits) {
  const int64_t last = logits.dim() - 1;
  return logits.stride(last) == 1 || logits.size(last) == 1 || logits.numel() == 0;
}

// For what is written over: two rows that share memory would each overwrite what the other must still read.
inline void check_overwritable(const char* op, const char* name, const Tensor& tensor) {
  if (tensor.numel() == 0 || tensor.is_contiguous()) return;
  if (!has_contiguous_rows(tensor)) {
    fail(op, ": ", name, " must be contiguous in the last dimension to be written over, got a stride of ",
         tensor.stride(tensor.dim() - 1));
  }
  std::vector<std::pair<int64_t, int64_t>> steps;  // stride, size
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) > 1) steps.push_back({tensor.stride(d), tensor.size(d)});
  }
  std::sort(steps.begin(), steps.end());
  int64_t extent = 1;
  for (const auto& [stride, size] : steps) {
    if (stride < extent) {
      fail(op, ": ", name, " must not be expanded or overlap to be written over, got a stride of ",
           stride, " across ", extent, " elements for ", shape_text(tensor));
    }
    extent += stride * (size - 1);
  }
}

inline bool is_per_row(const Tensor& tensor, const RowLike& rows) {
  return tensor.dim() == rows.like.dim() - 1 && sizes_fit(tensor, rows.like);
}

inline void check_per_row(const char* op, const char* name, const Tensor& tensor, const RowLike& rows) {
  if (!is_per_row(tensor, rows)) {
    fail(op, ": ", name, " must have the shape of ", rows.name, " ", shape_text(rows.like),
         " without the last dimension, got ", shape_text(tensor));
  }
  check_same_device(op, name, tensor, rows.like, rows.name);
}

inline void check_number(const char* op, const char* name, const std::optional<Tensor>& tensor,
                         const RowLike& rows) {
  if (!tensor) return;
  check_mask_type(op, name, *tensor);
  if (tensor->dim() != 0) fail(op, ": ", name, " must be a number [], got ", shape_text(*tensor));
  check_same_device(op, name, *tensor, rows.like, rows.name);
}

inline void check_temperature(const char* op, const std::optional<Tensor>& temperature,
                              const RowLike& rows) {
  if (!temperature || temperature->dim() == 0) return check_number(op, "temperature", temperature, rows);
  check_mask_type(op, "temperature", *temperature);
  if (!is_per_row(*temperature, rows)) {
    fail(op, ": temperature must be a number, a 0-d tensor or have the shape of ", rows.name, " ",
         shape_text(rows.like), " without the last dimension, got ", shape_text(*temperature));
  }
  check_same_device(op, "temperature", *temperature, rows.like, rows.name);
}

inline void check_loss_type(const char* op, const char* name, const Tensor& tensor,
                            const Tensor& logits) {
  if (tensor.scalar_type() == accumulate_type(logits)) return;
  fail(op, ": ", name, " must have the dtype of the loss, ",
       torch::headeronly::toString(accumulate_type(logits)), ", got ",
       torch::headeronly::toString(tensor.scalar_type()));
}

inline void check_weight(const char* op, const Tensor& weight, const RowLike& rows) {
  const char* name = rows.class_weight;
  if (weight.dim() != 1 || weight.size(0) != rows.classes) {
    fail(op, ": ", name, " must have one entry per class [", rows.classes, "], got ", shape_text(weight));
  }
  check_loss_type(op, name, weight, rows.like);
  check_same_device(op, name, weight, rows.like, rows.name);
}

inline void check_options(const char* op, const CrossEntropyOptions& options, int64_t shift,
                          const RowLike& rows) {
  check_range(op, "label_smoothing", options.label_smoothing, 0, 1);
  check_finite(op, "softcap", options.softcap, false);
  check_finite(op, "z_loss", options.z_loss, false);
  check_finite(op, "focal_gamma", options.focal_gamma, false);
  if (shift < 0) fail(op, ": shift must not be negative, got ", shift);
  if (shift > 0 && rows.like.dim() < 2) {
    fail(op, ": ", rows.name, " must be [..., S, ", rows.name[0] == 'h' ? "D" : "V",
         "] where shift is not 0, got ", shape_text(rows.like));
  }
}

inline void check_inputs(const char* op, const CrossEntropyInputs& in, const RowLike& rows,
                         const CrossEntropyOptions& options, int64_t shift) {
  check_options(op, options, shift, rows);
  constexpr const char* no_soft_labels =
      " (one class per row: soft labels are not what this function takes)";
  if (in.target) check_integer(op, "target", *in.target, no_soft_labels);
  if (in.target) check_per_row(op, "target", *in.target, rows);
  if (in.mask) check_mask_type(op, "mask", *in.mask);
  if (in.mask) check_per_row(op, "mask", *in.mask, rows);
  if (in.weight) check_weight(op, *in.weight, rows);
  if (in.token_weight) check_floating(op, "token_weight", *in.token_weight);
  if (in.token_weight) check_per_row(op, "token_weight", *in.token_weight, rows);
  if (in.segment_ids) check_integer(op, "segment_ids", *in.segment_ids, "");
  if (in.segment_ids) check_per_row(op, "segment_ids", *in.segment_ids, rows);
  check_temperature(op, in.temperature, rows);
  check_number(op, "normalizer", in.normalizer, rows);
}

// One value per row; where none is needed, what the forward leaves without elements may be so.
inline void check_row_values(const char* op, const char* name, const Tensor& tensor,
                             const RowLike& rows, bool needed = true) {
  check_loss_type(op, name, tensor, rows.like);
  if (!needed && tensor.numel() == 0) return check_same_device(op, name, tensor, rows.like, rows.name);
  check_per_row(op, name, tensor, rows);
}

// What the forward returned of `type` and of these sizes.
inline void check_saved(const char* op, const char* name, const Tensor& tensor,
                        const std::vector<int64_t>& sizes, ScalarType type, const char* shape,
                        const RowLike& rows) {
  bool same = tensor.scalar_type() == type && tensor.dim() == static_cast<int64_t>(sizes.size());
  for (int64_t d = 0; same && d < tensor.dim(); ++d) same = tensor.size(d) == sizes[d];
  if (!same) {
    fail(op, ": ", name, " must be what the forward returned, ", torch::headeronly::toString(type), " ",
         shape, ", got ", torch::headeronly::toString(tensor.scalar_type()), " ", shape_text(tensor));
  }
  check_same_device(op, name, tensor, rows.like, rows.name);
}

inline void check_row_sums(const char* op, const char* name, const Tensor& sums, int64_t count,
                           ScalarType type, const RowLike& rows) {
  const std::string shape = "[..., " + std::to_string(count) + "]";
  check_saved(op, name, sums, row_sizes(rows.like, count), type, shape.c_str(), rows);
}

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
    const int64_t classes = logits.size(logits.dim() - 1);
    layout.cols = logits.numel() / classes;
    layout.col_stride[kPrediction] = layout.col_stride[kGrad] = classes;
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
  q.rows = 1;
  for (int64_t d = 0; d + 1 < dims; ++d) q.rows *= like.like.size(d);
  q.classes = like.classes;
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
    const bool fits = numbers.scalar_type() == ScalarType::Double && numbers.dim() == 1 &&
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
      : RowInputs(name, checked(name, in), in.logits), logits(with_contiguous_rows(in.logits)) {
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
    check_logits(op, in.logits);
    check_rows(op, in, in.logits);
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

// --- the operators ------------------------------------------------------------------------------------

template <class Device>
struct RowForward {
  const RowArguments in;

  explicit RowForward(Arguments& arguments) : in(arguments) {}

  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> run() const {
    RowCall call("masked_cross_entropy", in);
    RowProblem& q = call.problem;
    const typename Device::Scope scope(in.logits);
    const bool has_target = in.target.has_value();
    const ScalarType type = accumulate_type(in.logits);
    const std::vector<int64_t> rows = row_sizes(in.logits), none;
    const auto make = [&](Array& place, bool needed, const std::vector<int64_t>& sizes, ScalarType of) {
      return make_result<Device>(in.logits, place, needed, sizes, of);
    };
    const Tensor loss = make(q.loss, true, q.reduction == RowReduction::kNone ? rows : none, type);
    const Tensor lse = make(q.lse, true, rows, type);
    const Tensor entropy = make(q.entropy, in.statistics, rows, type);
    const Tensor log_prob = make(q.log_prob, has_target, rows, type);
    const Tensor hit = make(q.hit, in.statistics && has_target, rows, ScalarType::Bool);
    const Tensor argmax = make(q.argmax, in.statistics, rows, ScalarType::Long);
    const Tensor distance = make(q.smooth_distance, in.smooths() && has_target, rows, type);
    const Tensor totals = make(q.totals, true, {2}, ScalarType::Double);
    const Tensor sums = make(q.row_sums, true, row_sizes(in.logits, kRowSums), type);
    call.set_layout(nullptr);
    Device::forward(call.op, q, in.logits);
    return {loss, lse, entropy, log_prob, hit, argmax, distance, totals, sums};
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

// kInPlace: the gradient is written over the logits, which autograd is told by the caller.
template <class Device, bool kInPlace>
struct RowBackward {
  const RowGradientArguments gradients;
  const RowArguments in;
  const bool needs_logits, needs_token_weight;

  explicit RowBackward(Arguments& arguments)
      : gradients(arguments),
        in(arguments),
        needs_logits(kInPlace || arguments.flag()),
        needs_token_weight(arguments.flag()) {}

  auto run() const {
    RowCall call(kInPlace ? "_masked_cross_entropy_backward_" : "_masked_cross_entropy_backward", in);
    RowProblem& q = call.problem;
    gradients.put(call, in.logits);
    if (kInPlace) check_overwritable(call.op, "logits", in.logits);
    const typename Device::Scope scope(in.logits);
    const bool weighs = needs_token_weight && in.token_weight && in.target;
    const Tensor token_weight = make_result<Device>(in.logits, q.grad_token_weight, weighs,
                                                    row_sizes(in.logits), accumulate_type(in.logits));
    const Tensor logits =
        kInPlace ? in.logits
                 : make_result<Device>(in.logits, q.grad_logits, needs_logits,
                                       row_sizes(in.logits, q.counted.classes), in.logits.scalar_type());
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
                                       row_sizes(in.logits, q.counted.classes), in.logits.scalar_type());
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
