// SPDX-License-Identifier: BSD-3-Clause
// The logit-free cross entropy on CUDA: which rows take part, their copies, the passes over their logits.
// Nothing here waits for the device but kept_rows(), for 8 bytes, where the number of rows is not given.
#include "cross_entropy/cuda/sharded.h"
#include "linear_cross_entropy/cuda/launches.h"
#include "linear_cross_entropy/cuda/products.h"
#include "linear_cross_entropy/vocab_parallel.h"

namespace masked_loss_ext::cuda {
namespace {

// What a call's chunks add up to.
class CudaLosses {
 public:
  CudaLosses(const char* op, const RowProblem& q, const Tensor& like)
      : op_(op),
        q_(q),
        like_(like),
        row_losses_(like, q.counted.rows) {}

  // Before sweep(): the denominator, which labels and class weights tell.
  void count() {
    count_rows(op_, q_, like_);
    counted_ = true;
  }

  void forward(const RowProblem& chunk, int64_t first) {
    forward_rows(op_, chunk, like_, losses_from(first));
  }
  void sweep(const RowProblem& chunk, int64_t first) { sweep_rows(op_, chunk, like_, losses_from(first)); }
  void finish() { add_rows(op_, q_, like_, losses_from(0), counted_); }

 private:
  double* losses_from(int64_t first) { return row_losses_.data() + first; }

  const char* const op_;
  const RowProblem& q_;
  const Tensor& like_;
  const Scratch<double> row_losses_;
  bool counted_ = false;
};

RowCopy row_copy(const void* from, const Tensor& to, const KeptRows& kept) {
  const auto* index = static_cast<const int64_t*>(kept.index.const_data_ptr());
  return {from, to.mutable_data_ptr(), index, kept.count, 0, {}, size_of(kind_of(to))};
}

struct Linear : ShardedRows {
  using Products = CudaProducts;
  using Losses = CudaLosses;

  // Two launches. How many there are the host reads where num_valid does not say it, but while a graph is
  // captured, which cannot wait: then all rows take part, those that do not count as zeros.
  static KeptRows kept_rows(const char* op, const RowProblem& q, const Tensor& like,
                            std::optional<int64_t> num_valid, bool receiving) {
    const int64_t rows = q.counted.rows;
    if (rows == 0) return {device_empty(like, {0}, ScalarType::Long), 0, true};
    const bool waits = !num_valid && !is_capturing(op, like);
    KeptPlaces places = {};
    places.most = num_valid.value_or(rows);
    places.count = std::min(std::max<int64_t>(places.most, 1), rows);  // one at least, to say that it is bad
    const Tensor index = device_empty(like, {places.count}, ScalarType::Long);
    const Scratch<int64_t> total(like, 1);
    places.index = static_cast<int64_t*>(index.mutable_data_ptr());
    places.total = waits ? total.data() : nullptr;
    launch_kept_rows(op, q, like, receiving, places);
    if (!waits) return {index, places.count, false};
    return {index, read_number(op, total.data(), like), true};
  }

  static void take_rows(const char* op, const Tensor& hidden, const KeptRows& kept, const Tensor& out) {
    if (out.numel() == 0) return;
    const Tensor from = has_contiguous_rows(hidden) ? hidden : contiguous_copy(hidden);
    RowCopy copy = row_copy(from.const_data_ptr(), out, kept);
    copy.layout = row_layout(op, from, nullptr);
    launch_take_rows(op, copy, out.size(1), out);
  }

  static void put_rows(const char* op, const Tensor& rows, const KeptRows& kept, const Tensor& out) {
    fill_zero(op, out);
    launch_put_rows(op, row_copy(rows.const_data_ptr(), out, kept), rows.size(1), out);
  }

  static void zero(const Tensor& tensor) { fill_zero(kLinearOp, tensor); }

  static void backward(const char* op, const RowProblem& chunk, const Tensor& like) {
    backward_rows(op, chunk, like);
  }
};

}  // namespace
}  // namespace masked_loss_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(MASKED_LOSS_EXT_CUDA_LIBRARY, MASKED_LOSS_EXT_CUDA_KEY, m) {
  masked_loss_ext::register_linear<masked_loss_ext::cuda::Linear>(m);
  masked_loss_ext::register_vocab_parallel_linear<masked_loss_ext::cuda::Linear>(m);
}
