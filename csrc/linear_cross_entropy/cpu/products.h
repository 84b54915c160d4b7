// SPDX-License-Identifier: BSD-3-Clause
// The products of a call on CPU. Half types are multiplied as they are where the processor can, else, and
// for float32 logits, in float32: the weight is widened tile by tile.
#pragma once

#include "linear_cross_entropy/call.h"
#include "linear_cross_entropy/products.h"

namespace masked_loss_ext {

class CpuProducts {
 public:
  explicit CpuProducts(const LinearArguments& in);

  ScalarType logits_type() const { return wide_ ? ScalarType::Float : in_.hidden.scalar_type(); }
  int64_t rows_at_a_time(int64_t rows, bool sums_weight) const;

  // logits = H W^T + bias
  void logits(const Tensor& hidden, const Tensor& logits) const;
  const Tensor& gradient_of(const Tensor& logits) const { return logits; }
  // grad = G W
  void add_hidden(const Tensor& g, const Tensor& grad) const;

  // grad = sum over chunks of G^T H, in float32 where there are several; then for the bias of the sum of G.
  void begin_weight(const Tensor& grad, bool one_chunk);
  void add_weight(const Tensor& g, const Tensor& hidden);
  void end_weight();
  void begin_bias(const Tensor& grad);
  void add_bias(const Tensor& g);
  void end_bias();

 private:
  void begin(ChunkSum& sum, const Tensor& result, bool in_place);
  void end(ChunkSum& sum);
  template <class F>
  void for_each_tile(const F& f) const;  // of the weight: f(tile in float32, its first class, classes)

  const LinearArguments& in_;
  const bool wide_;
  const Tensor weight_;
  std::optional<Tensor> bias_;  // in the type of the logits
  ChunkSum weight_sum_, bias_sum_;
};

}  // namespace masked_loss_ext
