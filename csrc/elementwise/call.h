// SPDX-License-Identifier: BSD-3-Clause
// masked_squared_error and its backward, for every device: arguments, checks, results. A Device is Cpu or
// Cuda with allocate(like, sizes, dtype), forward() and backward() of a problem.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <iterator>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "common/layout_builder.h"
#include "common/operator.h"
#include "elementwise/formula.h"

namespace masked_loss_ext {

struct ErrorArguments {
  Tensor prediction, target;
  std::optional<Tensor> mask, edit_mask, weighting;
  double foreground_weight, background_weight;
  std::string reduction, loss;
  std::optional<Tensor> delta;

  explicit ErrorArguments(Arguments& in)
      : prediction(in.tensor()),
        target(in.tensor()),
        mask(in.optional_tensor()),
        edit_mask(in.optional_tensor()),
        weighting(in.optional_tensor()),
        foreground_weight(in.number()),
        background_weight(in.number()),
        reduction(in.text()),
        loss(in.text()),
        delta(in.optional_tensor()) {}
};

enum class Reduction { kMean, kSum, kBatchMean, kTokenSum, kToken, kNone };

inline Reduction parse_reduction(const char* op, const std::string& name) {
  if (name == "mean") return Reduction::kMean;
  if (name == "sum") return Reduction::kSum;
  if (name == "batch_mean") return Reduction::kBatchMean;
  if (name == "token_sum") return Reduction::kTokenSum;
  if (name == "token") return Reduction::kToken;
  if (name == "none") return Reduction::kNone;
  fail(op, ": reduction must be mean, sum, batch_mean, token_sum, token or none, got ", name);
}

inline ElementLoss parse_loss(const char* op, const std::string& name) {
  std::string names;
  for (size_t i = 0; i < std::size(kElementLossNames); ++i) {
    if (name == kElementLossNames[i]) return static_cast<ElementLoss>(i);
    names += (i == 0 ? "" : ", ") + std::string(kElementLossNames[i]);
  }
  fail(op, ": loss must be one of ", names, ", got ", name);
}

inline bool is_scalar(Reduction reduction) {
  return reduction != Reduction::kToken && reduction != Reduction::kNone;
}

// What the sum is divided by, at least 1, but for kMean, whose count only the kernel knows.
inline double fixed_denominator(Reduction reduction, const Tensor& prediction) {
  const int64_t dims = prediction.dim();
  const auto size_or_one = [&](int64_t d) {
    return dims > 0 && prediction.size(d) > 1 ? prediction.size(d) : 1;
  };
  switch (reduction) {
    case Reduction::kBatchMean: return size_or_one(0);
    case Reduction::kToken:
    case Reduction::kTokenSum: return size_or_one(dims - 1);
    default: return 1;
  }
}

// float64 where prediction or target is, else float32.
inline ScalarType accumulate_type(const ErrorArguments& in) {
  const bool wide = in.prediction.scalar_type() == ScalarType::Double ||
                    in.target.scalar_type() == ScalarType::Double;
  return wide ? ScalarType::Double : ScalarType::Float;
}

// So that no product of sizes, and with it no offset, comes near the end of int64.
inline void check_sizes(const char* op, const Tensor& prediction) {
  if (prediction.dim() > kTorchDims) {
    fail(op, ": prediction must have at most ", kTorchDims, " dimensions, got ", prediction.dim());
  }
  int64_t elements = 1;
  for (int64_t d = 0; d < prediction.dim(); ++d) {
    const int64_t size = std::max<int64_t>(prediction.size(d), 1);
    if (size > kLargestLength / elements) {
      fail(op, ": prediction must have at most ", kLargestLength, " elements, got ",
           shape_text(prediction));
    }
    elements *= size;
  }
}

inline void check_delta(const char* op, const Tensor& delta, const Tensor& prediction) {
  check_floating(op, "delta", delta);
  if (delta.dim() != 0) fail(op, ": delta must be one number [], got ", shape_text(delta));
  check_same_device(op, "delta", delta, prediction);
}

inline void check_arguments(const char* op, const ErrorArguments& in, Reduction reduction) {
  check_floating(op, "prediction", in.prediction);
  check_sizes(op, in.prediction);
  check_floating(op, "target", in.target);
  check_same_shape(op, "target", in.target, in.prediction);
  check_same_device(op, "target", in.target, in.prediction);
  if (reduction == Reduction::kToken && in.prediction.dim() == 0) {
    fail(op, ": prediction must have a dimension for reduction token, got []");
  }
  const auto check_mask = [&](const char* name, const std::optional<Tensor>& mask) {
    if (!mask) return;
    check_mask_type(op, name, *mask);
    check_leading_broadcastable(op, name, *mask, in.prediction);
    check_same_device(op, name, *mask, in.prediction);
  };
  check_mask("mask", in.mask);
  check_mask("edit_mask", in.edit_mask);
  if (in.weighting) {
    check_floating(op, "weighting", *in.weighting);
    check_broadcastable(op, "weighting", *in.weighting, in.prediction);
    check_same_device(op, "weighting", *in.weighting, in.prediction);
  }
  check_finite(op, "foreground_weight", in.foreground_weight);
  check_finite(op, "background_weight", in.background_weight);
  if (in.delta) check_delta(op, *in.delta, in.prediction);
}

inline void check_grad_loss(const char* op, const Tensor& grad_loss, const ErrorArguments& in,
                            Reduction reduction) {
  const int64_t dims = reduction == Reduction::kNone    ? in.prediction.dim()
                       : reduction == Reduction::kToken ? in.prediction.dim() - 1
                                                        : 0;
  const ScalarType type = type_of(op, "grad_loss", grad_loss);
  if (type != accumulate_type(in) || grad_loss.dim() != dims) {
    fail(op, ": grad_loss must have the dtype and shape of the loss, got ",
         torch::headeronly::toString(type), " ", shape_text(grad_loss));
  }
  check_leading_shape(op, "grad_loss", grad_loss, in.prediction);
  check_same_device(op, "grad_loss", grad_loss, in.prediction);
}

inline void check_count(const char* op, const Tensor& count, const Tensor& prediction) {
  const ScalarType type = type_of(op, "count", count);
  if (type != ScalarType::Long || count.dim() != 0) {
    fail(op, ": count must be an int64 number [], got ",
         torch::headeronly::toString(type), " ", shape_text(count));
  }
  check_same_device(op, "count", count, prediction);
}

inline ErrorProblem problem_of(const char* op, const ErrorArguments& in, Reduction reduction) {
  ErrorProblem q;
  q.prediction = array_of(in.prediction);
  q.target = array_of(in.target);
  q.mask = array_of(in.mask);
  q.edit_mask = array_of(in.edit_mask);
  q.weighting = array_of(in.weighting);
  q.element_loss = parse_loss(op, in.loss);
  q.delta = array_of(in.delta);
  q.foreground = in.foreground_weight;
  q.background = in.background_weight;
  q.denominator = fixed_denominator(reduction, in.prediction);
  q.divide_by_count = reduction == Reduction::kMean;
  q.one_loss = is_scalar(reduction);
  return q;
}

// prediction.shape, cut to the tokens, with the last dimension 1, or []
enum class OutputShape { kElements, kTokens, kColumn, kScalar };

inline std::vector<int64_t> output_sizes(const Tensor& prediction, OutputShape shape) {
  std::vector<int64_t> sizes;
  if (shape == OutputShape::kScalar) return sizes;
  for (int64_t d = 0; d < prediction.dim(); ++d) sizes.push_back(prediction.size(d));
  if (shape == OutputShape::kTokens) sizes.pop_back();
  if (shape == OutputShape::kColumn && !sizes.empty()) sizes.back() = 1;
  return sizes;
}

inline OutputShape loss_shape(Reduction reduction) {
  if (reduction == Reduction::kNone) return OutputShape::kElements;
  return reduction == Reduction::kToken ? OutputShape::kTokens : OutputShape::kScalar;
}

// grad_weighting is summed over the columns in the kernel where weighting has one for all of them.
inline OutputShape weighting_gradient_shape(const Tensor& weighting) {
  const int64_t dims = weighting.dim();
  return dims == 0 || weighting.size(dims - 1) == 1 ? OutputShape::kColumn : OutputShape::kElements;
}

inline LayoutBuilder input_layout(const ErrorArguments& in) {
  LayoutBuilder builder(in.prediction);
  builder.add(kPrediction, in.prediction);
  builder.add(kTarget, in.target);
  if (in.mask) builder.add(kMask, *in.mask);
  if (in.edit_mask) builder.add(kEditMask, *in.edit_mask);
  if (in.weighting) {
    builder.add(kWeighting, *in.weighting,
                static_cast<int>(in.prediction.dim() - in.weighting->dim()));
  }
  return builder;
}

// Contiguous copies, for strides that leave more dimensions than a layout holds. Three or four are left
// of these: masks have their leading dimensions, weighting has all, but that its last may be 1.
inline ErrorArguments merging(ErrorArguments in) {
  const std::vector<int64_t> all = output_sizes(in.prediction, OutputShape::kElements);
  const auto expand = [](Tensor& tensor, const std::vector<int64_t>& sizes) {
    Tensor copy = torch::stable::new_empty(tensor, sizes);
    torch::stable::copy_(copy, tensor);
    tensor = copy;
  };
  const auto expand_leading = [&](std::optional<Tensor>& mask) {
    if (mask) expand(*mask, {all.begin(), all.begin() + mask->dim()});
  };
  if (in.weighting) {
    expand(*in.weighting, output_sizes(in.prediction, weighting_gradient_shape(*in.weighting)));
  }
  expand_leading(in.mask);
  expand_leading(in.edit_mask);
  expand(in.prediction, all);
  expand(in.target, all);
  return in;
}

template <class Device>
struct MaskedSquaredError {
  const ErrorArguments in;

  explicit MaskedSquaredError(Arguments& stack) : in(stack) {}
  explicit MaskedSquaredError(const ErrorArguments& arguments) : in(arguments) {}

  std::tuple<Tensor, Tensor> run() const {
    constexpr const char* op = "masked_squared_error";
    const Reduction reduction = parse_reduction(op, in.reduction);
    check_arguments(op, in, reduction);
    ErrorProblem q = problem_of(op, in, reduction);
    const typename Device::Scope scope(in.prediction);
    Tensor loss = Device::allocate(in.prediction, output_sizes(in.prediction, loss_shape(reduction)),
                                   accumulate_type(in));
    Tensor count = Device::empty(in.prediction, std::vector<int64_t>{}, ScalarType::Long);
    LayoutBuilder layout = input_layout(in);
    if (!q.one_loss) {
      q.loss = array_of(loss);
      layout.add(kLoss, loss);
    }
    if (layout.merge(q.layout) > LayoutBuilder::kMostMerged) {
      return MaskedSquaredError(merging(in)).run();
    }
    Device::forward(op, q, reduction == Reduction::kToken, in.prediction, loss, count);
    return {loss, count};
  }
};

template <class Device>
struct MaskedSquaredErrorBackward {
  const Tensor grad_loss;
  const ErrorArguments in;
  const Tensor count;
  const bool needs_prediction, needs_target, needs_weighting;

  explicit MaskedSquaredErrorBackward(Arguments& stack)
      : grad_loss(stack.tensor()),
        in(stack),
        count(stack.tensor()),
        needs_prediction(stack.flag()),
        needs_target(stack.flag()),
        needs_weighting(stack.flag()) {}

  // On copies that merge.
  explicit MaskedSquaredErrorBackward(const MaskedSquaredErrorBackward& call, const ErrorArguments& copies)
      : grad_loss(torch::stable::contiguous(call.grad_loss)),
        in(copies),
        count(call.count),
        needs_prediction(call.needs_prediction),
        needs_target(call.needs_target),
        needs_weighting(call.needs_weighting) {}

  // A gradient that is not needed has no elements.
  std::tuple<Tensor, Tensor, Tensor> run() const {
    constexpr const char* op = "_masked_squared_error_backward";
    const Reduction reduction = parse_reduction(op, in.reduction);
    check_arguments(op, in, reduction);
    check_grad_loss(op, grad_loss, in, reduction);
    check_count(op, count, in.prediction);
    ErrorProblem q = problem_of(op, in, reduction);
    const typename Device::Scope scope(in.prediction);
    LayoutBuilder layout = input_layout(in);
    if (!q.one_loss) {
      q.loss = array_of(grad_loss);
      layout.add(kLoss, grad_loss);
    }
    const auto gradient = [&](bool needed, OutputShape shape, ScalarType type, Operand operand,
                              Array& array) {
      if (!needed) return Device::empty(in.prediction, {0}, type);
      Tensor grad = Device::allocate(in.prediction, output_sizes(in.prediction, shape), type);
      array = array_of(grad);
      layout.add(operand, grad);
      return grad;
    };
    const OutputShape all = OutputShape::kElements;
    const bool weighted = needs_weighting && in.weighting.has_value();
    const OutputShape shape = weighted ? weighting_gradient_shape(*in.weighting) : all;
    const Tensor grad_prediction = gradient(needs_prediction, all, in.prediction.scalar_type(), kGrad,
                                            q.grad_prediction);
    const Tensor grad_target =
        gradient(needs_target, all, in.target.scalar_type(), kGrad, q.grad_target);
    const Tensor grad_weighting =
        gradient(weighted, shape, accumulate_type(in), kGradWeighting, q.grad_weighting);
    if (layout.merge(q.layout) > LayoutBuilder::kMostMerged) {
      return MaskedSquaredErrorBackward(*this, merging(in)).run();
    }
    const bool whole_rows = weighted && shape == OutputShape::kColumn;
    Device::backward(op, q, whole_rows, in.prediction, grad_loss, count);
    return {grad_prediction, grad_target, grad_weighting};
  }
};

template <class Device, class Library>
void register_squared_error(Library& m) {
  m.impl("masked_squared_error", &boxed<MaskedSquaredError<Device>>);
  m.impl("_masked_squared_error_backward", &boxed<MaskedSquaredErrorBackward<Device>>);
}

}  // namespace masked_loss_ext
