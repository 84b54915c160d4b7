// SPDX-License-Identifier: BSD-3-Clause
// The products of a call on CUDA: ATen's, which are the vendor's. Logits are in the type of hidden or, where
// that is asked for, in float32, of which the products of the gradients take a half copy. What several chunks
// add up to is added up in float32.
#pragma once

#include "linear_cross_entropy/call.h"
#include "linear_cross_entropy/cuda/aten.h"
#include "linear_cross_entropy/cuda/launches.h"

namespace masked_loss_ext::cuda {

constexpr const char* kLinearOp = "masked_linear_cross_entropy";

// sum += part, of one type: float or double.
inline void add_to(const Tensor& sum, const Tensor& part) {
  launch_add(kLinearOp, array_of(sum), array_of(part), part.numel(), sum);
}

class CudaProducts {
 public:
  explicit CudaProducts(const LinearArguments& in)
      : in_(in),
        half_(size_of(kind_of(in.hidden)) == 2),
        wide_(half_ && in.fp32_logits),
        weight_(in.linear_weight.stride(1) == 1 || in.linear_weight.stride(0) == 1
                    ? in.linear_weight
                    : contiguous_copy(in.linear_weight)) {
    if (in.bias) bias_ = in.bias->is_contiguous() ? *in.bias : contiguous_copy(*in.bias);
  }

  ScalarType logits_type() const { return wide_ ? ScalarType::Float : in_.hidden.scalar_type(); }

  int64_t rows_at_a_time(int64_t rows, bool sums_weight) const {
    constexpr int64_t kChunkBytes = int64_t(512) << 20, kLeastRows = 2048;
    const int64_t of_logit = wide_ ? 4 + 2 : size_of(kind_of(in_.hidden));  // the half copy too
    const int64_t chunk = rows_per_chunk(rows, in_.classes(), of_logit, kChunkBytes, kLeastRows);
    // 8192 rows of V = 151936, D = 4096 (H200): 43 ms of products in one chunk, 45 in four.
    const bool in_one = sums_weight && half_ && is_smaller_in_one(rows, chunk, of_logit, in_.width());
    return in_one ? std::max<int64_t>(rows, 1) : chunk;
  }

  // logits = H W^T + bias
  void logits(const Tensor& hidden, const Tensor& logits) const {
    const Tensor classes = transposed(weight_);
    if (bias_ && !wide_) return add_product(*bias_, hidden, classes, logits);
    product(hidden, classes, logits);
    if (bias_) add_bias_row(logits);
  }

  // In the type of the weight.
  Tensor gradient_of(const Tensor& logits) {
    if (!wide_) return logits;
    const int64_t rows = logits.size(0);
    if (!half_copy_) {  // the first chunk is the largest
      half_copy_ = device_empty(logits, {rows, in_.classes()}, in_.hidden.scalar_type());
    }
    const Tensor copy = rows_from(*half_copy_, 0, rows);
    convert(copy, logits);
    return copy;
  }

  // grad = G W
  void add_hidden(const Tensor& g, const Tensor& grad) const { product(g, weight_, grad); }

  // grad = sum over chunks of G^T H, and of G for the bias.
  void begin_weight(const Tensor& grad, bool one_chunk) { begin_sum<Cuda>(weight_sum_, grad, one_chunk); }

  void add_weight(const Tensor& g, const Tensor& hidden) {
    const Tensor& into = *weight_sum_.into;
    const bool first = weight_sum_.is_empty;
    weight_sum_.is_empty = false;
    if (first) return product(transposed(g), hidden, into);
    if (into.scalar_type() == g.scalar_type()) return add_product(into, transposed(g), hidden, into);
    // There is no product of halves that adds to float32.
    const int64_t classes = in_.classes(), most = std::min(kTileClasses, classes);
    if (!tile_) tile_ = device_empty(into, {most, in_.width()}, ScalarType::Float);
    for (int64_t c = 0; c < classes; c += most) {
      const int64_t count = std::min(most, classes - c);
      const Tensor part = rows_from(*tile_, 0, count);
      product(transposed(columns_from(g, c, count)), hidden, part);
      add_to(rows_from(into, c, count), part);
    }
  }

  void end_weight() { end(weight_sum_); }

  void begin_bias(const Tensor& grad) { begin_sum<Cuda>(bias_sum_, grad, false); }

  void add_bias(const Tensor& g) {
    const Tensor& into = *bias_sum_.into;
    const bool first = bias_sum_.is_empty;
    bias_sum_.is_empty = false;
    if (first) return sum_of_rows(g, into);
    const Tensor part = device_empty(into, {in_.classes()}, into.scalar_type());
    sum_of_rows(g, part);
    add_to(into, part);
  }

  void end_bias() { end(bias_sum_); }

 private:
  static constexpr int64_t kTileClasses = 8192;

  void add_bias_row(const Tensor& logits) const {
    launch_add_bias(kLinearOp, static_cast<float*>(logits.mutable_data_ptr()), array_of(*bias_), logits.size(0),
                    in_.classes(), logits);
  }

  void end(const ChunkSum& sum) {
    if (sum.is_empty) return fill_zero(kLinearOp, *sum.result);
    if (sum.into->get() != sum.result->get()) convert(*sum.result, *sum.into);
  }

  const LinearArguments& in_;
  const bool half_, wide_;  // wide: float32 logits of halves
  const Tensor weight_;
  std::optional<Tensor> bias_, half_copy_, tile_;
  ChunkSum weight_sum_, bias_sum_;
};

}  // namespace masked_loss_ext::cuda
