// SPDX-License-Identifier: BSD-3-Clause
// The logit-free cross entropy on CUDA: launches. Nothing here waits for the device but read_number().
#include "linear_cross_entropy/cuda/kernels.cuh"

#include <algorithm>

namespace masked_loss_ext::cuda {
namespace {

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

}  // namespace

void launch_kept_rows(const char* op, const RowProblem& q, const Tensor& like, bool receiving,
                      const KeptPlaces& places) {
  const int64_t blocks = ceil_div(q.counted.rows, kRowsOfBlock);
  const Scratch<int64_t> counts(like, blocks);
  const cudaStream_t stream = current_stream(like);
  const dim3 grid(static_cast<unsigned>(blocks)), block(kThreads);
  check_launch(op, launch(stream, grid, block, 0, linear_kept_counts_kernel, q, receiving, counts.data()));
  check_launch(op, launch(stream, grid, block, 0, linear_kept_rows_kernel, q, receiving, counts.data(), places));
}

void launch_take_rows(const char* op, const RowCopy& copy, int64_t width, const Tensor& like) {
  copy_rows(op, copy, width, like, [](auto unit) { return linear_take_rows_kernel<decltype(unit)>; });
}

void launch_put_rows(const char* op, const RowCopy& copy, int64_t width, const Tensor& like) {
  copy_rows(op, copy, width, like, [](auto unit) { return linear_put_rows_kernel<decltype(unit)>; });
}

void launch_add(const char* op, Array sum, Array part, int64_t count, const Tensor& like) {
  constexpr int64_t kMostBlocks = 1 << 14;  // kernels take what is beyond in steps of the grid
  const auto add = [&](auto value) {
    using T = decltype(value);
    const int64_t packs = ceil_div(count, kVectorOf<T>);
    const dim3 grid(static_cast<unsigned>(std::min(ceil_div(packs, kThreads), kMostBlocks)));
    check_launch(op, launch(current_stream(like), grid, dim3(kThreads), 0, linear_add_kernel<T>,
                            static_cast<T*>(sum.data), static_cast<const T*>(part.data), count));
  };
  if (count == 0) return;
  part.kind == Kind::kDouble ? add(double{}) : add(float{});
}

void launch_add_bias(const char* op, float* logits, Array bias, int64_t rows, int64_t classes,
                     const Tensor& like) {
  constexpr int64_t kMostRows = 1024;  // of the grid
  const dim3 grid(static_cast<unsigned>(ceil_div(classes, kThreads)),
                  static_cast<unsigned>(std::min(rows, kMostRows)));
  check_launch(op, launch(current_stream(like), grid, dim3(kThreads), 0, linear_add_bias_kernel, logits, bias,
                          rows, classes));
}

bool is_capturing(const char* op, const Tensor& like) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_launch(op, cudaStreamIsCapturing(current_stream(like), &status));
  return status != cudaStreamCaptureStatusNone;
}

int64_t read_number(const char* op, const int64_t* number, const Tensor& like) {
  const cudaStream_t stream = current_stream(like);
  int64_t value = 0;
  check_launch(op, cudaMemcpyAsync(&value, number, sizeof value, cudaMemcpyDeviceToHost, stream));
  check_launch(op, cudaStreamSynchronize(stream));
  return value;
}

void clear(const char* op, void* data, int64_t bytes, const Tensor& like) {
  if (bytes == 0) return;
  check_launch(op, cudaMemsetAsync(data, 0, static_cast<size_t>(bytes), current_stream(like)));
}

}  // namespace masked_loss_ext::cuda
