// SPDX-License-Identifier: BSD-3-Clause
// masked_squared_error on CPU: the cut into chunks, the final sum.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <cstring>

#include "common/cpu/capability.h"
#include "common/cpu/device.h"
#include "common/cpu/memory.h"
#include "common/cpu/parallel.h"
#include "common/cpu/scalars.h"
#include "elementwise/call.h"
#include "elementwise/cpu/kernels.h"

namespace masked_loss_ext {
namespace {

// Elements of work per chunk: large enough to hide the scheduling (some 50 ns), small enough to balance.
constexpr int64_t kChunkElements = 32768;

const SquaredErrorKernels& kernels() {
  return kernels_of_this_machine<SquaredErrorKernels>();
}

// whole_rows: something is written once per row, so a row must not be cut.
Chunks cut(const Layout& layout, bool whole_rows) {
  Chunks chunks;
  if (layout.rows == 0 || layout.cols == 0) return chunks;
  chunks.cols_per_chunk = whole_rows ? layout.cols : std::min(layout.cols, kChunkElements);
  chunks.col_chunks = (layout.cols + chunks.cols_per_chunk - 1) / chunks.cols_per_chunk;
  chunks.rows_per_chunk = std::max<int64_t>(1, kChunkElements / layout.cols);
  chunks.count =
      (layout.rows + chunks.rows_per_chunk - 1) / chunks.rows_per_chunk * chunks.col_chunks;
  return chunks;
}

CpuErrorProblem cpu_problem(const char* op, const ErrorProblem& problem, bool whole_rows) {
  CpuErrorProblem q;
  static_cast<ErrorProblem&>(q) = problem;
  q.chunks = cut(q.layout, whole_rows);
  q.delta_value = q.delta.data ? read_entry<double>(q.delta, 0) : 1;
  const bool may_be_zero = q.element_loss == ElementLoss::kSmoothL1;
  if (!(q.delta_value > 0 || (may_be_zero && q.delta_value == 0)) || std::isinf(q.delta_value)) {
    fail(op, ": delta must be finite and ", may_be_zero ? "not negative" : "positive", ", got ",
         q.delta_value);
  }
  return q;
}

struct Errors : Cpu {
  static Tensor allocate(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type) {
    Tensor tensor = empty(like, sizes, type);
    const size_t bytes = tensor.numel() * tensor.element_size();
    advise_huge_pages(tensor.mutable_data_ptr(), bytes);
    // Without channels there are still tokens, but no kernel comes to write their 0.
    if (like.numel() == 0 && bytes > 0) std::memset(tensor.mutable_data_ptr(), 0, bytes);
    return tensor;
  }

  static void forward(const char* op, const ErrorProblem& problem, bool whole_rows, const Tensor&,
                      Tensor& loss, Tensor& count) {
    CpuErrorProblem q = cpu_problem(op, problem, whole_rows);
    const int64_t chunks = q.chunks.count;
    std::vector<double> sums(chunks);
    std::vector<int64_t> counts(chunks);
    q.partial_sum = sums.data();
    q.partial_count = counts.data();
    q.scale = 1 / q.denominator;
    const auto kernel = kernels().forward;
    // Last chunk first: what the model wrote last is still in the cache, and what is read last here is
    // what the backward, which goes upwards, reads first.
    for_each_chunk(chunks, [&](int64_t i) { kernel(q, chunks - 1 - i); });

    double sum = 0;
    int64_t selected = 0;
    for (int64_t i = 0; i < chunks; ++i) {
      sum += sums[i];
      selected += counts[i];
    }
    *count.mutable_data_ptr<int64_t>() = selected;
    if (q.one_loss) {
      const double divisor = q.divide_by_count ? double(selected) : q.denominator;
      write_number(loss, selected > 0 ? sum / divisor : 0.0);
    }
  }

  // d loss / d term, but for what grad_loss itself holds per token or element.
  static double backward_scale(const ErrorProblem& q, const Tensor& grad_loss, const Tensor& count) {
    if (!q.one_loss) return 1 / q.denominator;
    const int64_t selected = *count.const_data_ptr<int64_t>();
    if (selected == 0) return 0;
    return read_number(grad_loss) / (q.divide_by_count ? double(selected) : q.denominator);
  }

  static void backward(const char* op, const ErrorProblem& problem, bool whole_rows, const Tensor&,
                       const Tensor& grad_loss, const Tensor& count) {
    CpuErrorProblem q = cpu_problem(op, problem, whole_rows);
    const int64_t elements = q.layout.rows * q.layout.cols;
    const auto untouched = [&](const Array& grad) {
      return grad.data ? untouched_pages(grad.data, elements * size_of(grad.kind)) : ByteRange{};
    };
    q.zero_prediction = untouched(q.grad_prediction);
    q.zero_target = untouched(q.grad_target);
    q.scale = backward_scale(q, grad_loss, count);
    const Array& output = q.grad_prediction.data ? q.grad_prediction : q.grad_target;
    const int64_t bytes = q.chunks.rows_per_chunk * q.chunks.cols_per_chunk * size_of(output.kind);
    const auto kernel = kernels().backward;
    for_each_chunk_of_output(q.chunks.count, output.data, bytes, [&](int64_t i) { kernel(q, i); });
  }
};

}  // namespace
}  // namespace masked_loss_ext

STABLE_TORCH_LIBRARY_IMPL(masked_loss_ext, CPU, m) {
  masked_loss_ext::register_squared_error<masked_loss_ext::Errors>(m);
}
