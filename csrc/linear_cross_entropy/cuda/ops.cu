// SPDX-License-Identifier: BSD-3-Clause
// The logit-free cross entropy on CUDA: which rows take part, their copies, the passes over their logits.
// Nothing here waits for the device but kept_rows(), for 8 bytes, where the number of rows is not given.
#include <torch/csrc/stable/library.h>

#include "cross_entropy/cuda/rows.cuh"
#include "linear_cross_entropy/cuda/products.cuh"
#include "linear_cross_entropy/vocab_parallel.h"

namespace masked_loss_ext::cuda {
namespace {

bool is_capturing(const char* op, cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_launch(op, cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

// Waits for the device.
int64_t read_number(const char* op, const Tensor& number, cudaStream_t stream) {
  int64_t value = 0;
  check_launch(op, cudaMemcpyAsync(&value, number.const_data_ptr(), sizeof value, cudaMemcpyDeviceToHost,
                                   stream));
  check_launch(op, cudaStreamSynchronize(stream));
  return value;
}

// What a call's chunks add up to.
class CudaLosses {
 public:
  CudaLosses(const char* op, const RowProblem& q, const Tensor& like)
      : op_(op),
        q_(q),
        like_(like),
        row_losses_(device_empty(like, {q.counted.rows}, ScalarType::Double)) {}

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
  double* losses_from(int64_t first) {
    return static_cast<double*>(row_losses_.mutable_data_ptr()) + first;
  }

  const char* const op_;
  const RowProblem& q_;
  const Tensor& like_;
  const Tensor row_losses_;
  bool counted_ = false;
};

// Calls f with a value of what can be moved at once where all of these are multiples of its size.
template <class F>
void with_unit(int64_t multiples, const F& f) {
  if (multiples % 16 == 0) return f(uint4{});
  if (multiples % 8 == 0) return f(uint2{});
  if (multiples % 4 == 0) return f(uint32_t{});
  f(uint16_t{});
}

// The lowest bits that are set in an address, or in the bytes from one row to the next, decide.
int64_t multiples_of(const RowCopy& c, int64_t row_bytes) {
  int64_t bits = row_bytes | static_cast<int64_t>(reinterpret_cast<uintptr_t>(c.from)) |
                 static_cast<int64_t>(reinterpret_cast<uintptr_t>(c.to));
  bits |= c.layout.col_stride[kPrediction] * c.element;
  for (int d = 0; d < c.layout.outer; ++d) bits |= c.layout.outer_stride[d][kPrediction] * c.element;
  return bits;
}

template <class Kernels>
void copy_rows(const char* op, RowCopy c, int64_t width, const Tensor& like, const Kernels& kernel_of) {
  const int64_t bytes = width * c.element;
  if (c.count == 0 || bytes == 0) return;
  with_unit(multiples_of(c, bytes), [&](auto unit) {
    c.units = bytes / static_cast<int64_t>(sizeof unit);
    const dim3 grid(static_cast<unsigned>(ceil_div(c.count, kWarpsOfBlock)));
    check_launch(op, launch(current_stream(like), grid, dim3(kThreads), 0, kernel_of(unit), c));
  });
}

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
    const cudaStream_t stream = current_stream(like);
    const bool waits = !num_valid && !is_capturing(op, stream);
    KeptPlaces places = {};
    places.most = num_valid.value_or(rows);
    places.count = std::min(std::max<int64_t>(places.most, 1), rows);  // one at least, to say that it is bad
    const Tensor index = device_empty(like, {places.count}, ScalarType::Long);
    const Tensor total = device_empty(like, {1}, ScalarType::Long);
    places.index = static_cast<int64_t*>(index.mutable_data_ptr());
    places.total = waits ? static_cast<int64_t*>(total.mutable_data_ptr()) : nullptr;
    fill_places(op, q, like, receiving, places);
    if (!waits) return {index, places.count, false};
    return {index, read_number(op, total, stream), true};
  }

  static void take_rows(const char* op, const Tensor& hidden, const KeptRows& kept, const Tensor& out) {
    if (out.numel() == 0) return;
    const Tensor from = has_contiguous_rows(hidden) ? hidden : contiguous_copy(hidden);
    RowCopy copy = row_copy(from.const_data_ptr(), out, kept);
    copy.layout = row_layout(op, from, nullptr);
    copy_rows(op, copy, out.size(1), out,
              [](auto unit) { return linear_take_rows_kernel<decltype(unit)>; });
  }

  static void put_rows(const char* op, const Tensor& rows, const KeptRows& kept, const Tensor& out) {
    fill_zero(op, out);
    copy_rows(op, row_copy(rows.const_data_ptr(), out, kept), rows.size(1), out,
              [](auto unit) { return linear_put_rows_kernel<decltype(unit)>; });
  }

  static void zero(const Tensor& tensor) { fill_zero(kLinearOp, tensor); }

  static void backward(const char* op, const RowProblem& chunk, const Tensor& like) {
    backward_rows(op, chunk, like);
  }

 private:
  static void fill_places(const char* op, const RowProblem& q, const Tensor& like, bool receiving,
                          const KeptPlaces& places) {
    const int64_t blocks = ceil_div(q.counted.rows, kRowsOfBlock);
    const dim3 grid(static_cast<unsigned>(blocks));
    const Tensor buffer = device_empty(like, {blocks}, ScalarType::Long);
    auto* counts = static_cast<int64_t*>(buffer.mutable_data_ptr());
    const cudaStream_t stream = current_stream(like);
    const dim3 block(kThreads);
    check_launch(op, launch(stream, grid, block, 0, linear_kept_counts_kernel, q, receiving, counts));
    check_launch(op, launch(stream, grid, block, 0, linear_kept_rows_kernel, q, receiving, counts, places));
  }
};

}  // namespace
}  // namespace masked_loss_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(MASKED_LOSS_EXT_CUDA_LIBRARY, MASKED_LOSS_EXT_CUDA_KEY, m) {
  masked_loss_ext::register_linear<masked_loss_ext::cuda::Linear>(m);
  masked_loss_ext::register_vocab_parallel_linear<masked_loss_ext::cuda::Linear>(m);
}
