// SPDX-License-Identifier: BSD-3-Clause
// What the CPU and the CUDA side of masked_squared_error do before a kernel runs: check, allocate,
// lay out. Each side brings its own `Device` with allocate(like, sizes, dtype).
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "common/cpu/device.h"
#include "common/layout_builder.h"

namespace masked_loss_ext {

enum class Reduction { kMean, kSum, kBatchMean, kTokenSum, kToken, kNone };

struct SquaredErrorInputs {
  const Tensor& prediction;
  const Tensor& target;
  const std::optional<Tensor>& mask;
  const std::optional<Tensor>& edit_mask;
  const std::optional<Tensor>& weighting;
};

inline Reduction parse_reduction(const char* op, const std::string& name) {
  if (name == "mean") return Reduction::kMean;
  if (name == "sum") return Reduction::kSum;
  if (name == "batch_mean") return Reduction::kBatchMean;
  if (name == "token_sum") return Reduction::kTokenSum;
  if (name == "token") return Reduction::kToken;
  if (name == "none") return Reduction::kNone;
  fail(op, ": reduction must be mean, sum, batch_mean, token_sum, token or none, got ", name);
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
inline ScalarType accumulate_type(const SquaredErrorInputs& in) {
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

inline void check_inputs(const char* op, const SquaredErrorInputs& in, Reduction reduction,
                         double foreground_weight, double background_weight) {
  check_floating(op, "prediction", in.prediction);
  check_sizes(op, in.prediction);
  check_floating(op, "target", in.target);
  check_same_shape(op, "target", in.target, in.prediction);
  check_same_device(op, "target", in.target, in.prediction);
  if (reduction == Reduction::kToken && in.prediction.dim() == 0) {
    fail(op, ": prediction must have a dimension for reduction token, got []");
  }
  if (in.mask) {
    check_mask_type(op, "mask", *in.mask);
    check_leading_broadcastable(op, "mask", *in.mask, in.prediction);
    check_same_device(op, "mask", *in.mask, in.prediction);
  }
  if (in.edit_mask) {
    check_mask_type(op, "edit_mask", *in.edit_mask);
    check_leading_broadcastable(op, "edit_mask", *in.edit_mask, in.prediction);
    check_same_device(op, "edit_mask", *in.edit_mask, in.prediction);
  }
  if (in.weighting) {
    check_floating(op, "weighting", *in.weighting);
    check_broadcastable(op, "weighting", *in.weighting, in.prediction);
    check_same_device(op, "weighting", *in.weighting, in.prediction);
  }
  check_finite(op, "foreground_weight", foreground_weight);
  check_finite(op, "background_weight", background_weight);
}

inline void check_grad_loss(const char* op, const Tensor& grad_loss, const SquaredErrorInputs& in,
                            Reduction reduction) {
  const int64_t dims = reduction == Reduction::kNone    ? in.prediction.dim()
                       : reduction == Reduction::kToken ? in.prediction.dim() - 1
                                                        : 0;
  if (grad_loss.scalar_type() != accumulate_type(in) || grad_loss.dim() != dims) {
    fail(op, ": grad_loss must have the dtype and shape of the loss, got ",
         torch::headeronly::toString(grad_loss.scalar_type()), " ", shape_text(grad_loss));
  }
  check_leading_shape(op, "grad_loss", grad_loss, in.prediction);
  check_same_device(op, "grad_loss", grad_loss, in.prediction);
}

inline void check_count(const char* op, const Tensor& count, const Tensor& prediction) {
  if (count.scalar_type() != ScalarType::Long || count.dim() != 0) {
    fail(op, ": count must be an int64 number [], got ",
         torch::headeronly::toString(count.scalar_type()), " ", shape_text(count));
  }
  check_same_device(op, "count", count, prediction);
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

inline LayoutBuilder input_layout(const SquaredErrorInputs& in) {
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
struct MergingInputs {
  Tensor prediction, target;
  std::optional<Tensor> mask, edit_mask, weighting;

  explicit MergingInputs(const SquaredErrorInputs& in)
      : prediction(expanded(in.prediction, sizes(in, in.prediction.dim()))),
        target(expanded(in.target, sizes(in, in.prediction.dim()))) {
    if (in.mask) mask = expanded(*in.mask, sizes(in, in.mask->dim()));
    if (in.edit_mask) edit_mask = expanded(*in.edit_mask, sizes(in, in.edit_mask->dim()));
    if (in.weighting) {
      weighting = expanded(*in.weighting,
                           output_sizes(in.prediction, weighting_gradient_shape(*in.weighting)));
    }
  }

  static Tensor expanded(const Tensor& tensor, const std::vector<int64_t>& sizes) {
    Tensor copy = empty_tensor(tensor, sizes, tensor.scalar_type());
    torch::stable::copy_(copy, tensor);
    return copy;
  }

 private:
  static std::vector<int64_t> sizes(const SquaredErrorInputs& in, int64_t dims) {
    std::vector<int64_t> leading = output_sizes(in.prediction, OutputShape::kElements);
    leading.resize(dims);
    return leading;
  }
};

// Which gradients are made, and of what shape; the sizes of one that is not are [0].
struct GradientPlan {
  bool prediction, target, weighting;
  std::vector<int64_t> prediction_sizes, target_sizes, weighting_sizes;
  bool whole_rows;  // grad_weighting is written once per row
};

inline GradientPlan plan_gradients(const SquaredErrorInputs& in, bool prediction, bool target,
                                   bool weighting) {
  const std::vector<int64_t> none = {0};
  const std::vector<int64_t> all = output_sizes(in.prediction, OutputShape::kElements);
  GradientPlan plan{prediction, target, weighting, prediction ? all : none, target ? all : none,
                    none, false};
  if (weighting) {
    const OutputShape shape = weighting_gradient_shape(*in.weighting);
    plan.weighting_sizes = output_sizes(in.prediction, shape);
    plan.whole_rows = shape == OutputShape::kColumn;
  }
  return plan;
}

inline LayoutBuilder backward_layout(const SquaredErrorInputs& in, const GradientPlan& plan,
                                     Reduction reduction, const Tensor& grad_loss,
                                     const Tensor& grad_prediction, const Tensor& grad_target,
                                     const Tensor& grad_weighting) {
  LayoutBuilder builder = input_layout(in);
  if (!is_scalar(reduction)) builder.add(kLoss, grad_loss);
  if (plan.prediction) builder.add(kGrad, grad_prediction);
  if (plan.target) builder.add(kGrad, grad_target);
  if (plan.weighting) builder.add(kGradWeighting, grad_weighting);
  return builder;
}

}  // namespace masked_loss_ext
