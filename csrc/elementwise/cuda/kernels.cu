// SPDX-License-Identifier: BSD-3-Clause
// masked_squared_error on CUDA: launches. Nothing here waits for the device.
#include "elementwise/cuda/kernels.cuh"

#include <algorithm>

#include "common/cuda/launch.cuh"
#include "elementwise/cuda/launches.h"

namespace masked_loss_ext::cuda {
namespace {

constexpr int64_t kMaxBlocks = 2048;      // fills 132 multiprocessors; fixed, so that sums are too
constexpr int64_t kItemColumns = 4096;    // longest stretch of a row for one group of lanes
constexpr int kPackBytes = 16;

struct Tag {};  // carries types into generic lambdas
template <class Reader, class Tail>
struct Readers : Tag {
  using Main = Reader;
  using Rest = Tail;
};

bool divisible(int64_t bytes) { return bytes % kPackBytes == 0; }

// 16-byte packs of `operand` are aligned in every row.
bool packs_align(const Layout& layout, Operand operand, const Array& array) {
  if (array.data == nullptr) return true;
  bool aligned = divisible(reinterpret_cast<int64_t>(array.data));
  for (int d = 0; d < layout.outer; ++d) {
    aligned = aligned && divisible(layout.outer_stride[d][operand] * size_of(array.kind));
  }
  return aligned;
}

bool is_direct(const CudaErrorProblem& q) {
  const Layout& l = q.layout;
  return q.prediction.kind == q.target.kind &&
         (l.cols <= 1 || (l.col_stride[kPrediction] == 1 && l.col_stride[kTarget] == 1));
}

bool has_packs(const CudaErrorProblem& q) {
  const Layout& l = q.layout;
  return l.cols * size_of(q.prediction.kind) >= kPackBytes &&
         packs_align(l, kPrediction, q.prediction) && packs_align(l, kTarget, q.target) &&
         packs_align(l, kGrad, q.grad_prediction) && packs_align(l, kGrad, q.grad_target);
}

// Calls f with the readers that fit.
template <class T, class F>
void with_direct(const CudaErrorProblem& q, F f) {
  using One = DirectReader<T, 1>;
  if (has_packs(q)) {
    f(Readers<DirectReader<T, kVectorOf<T>>, One>{});
  } else {
    f(Readers<One, One>{});
  }
}

template <class F>
void with_readers(const CudaErrorProblem& q, F f) {
  if (!is_direct(q)) {
    const bool wide = q.prediction.kind == Kind::kDouble || q.target.kind == Kind::kDouble;
    if (wide) return f(Readers<AnyReader<double>, AnyReader<double>>{});
    return f(Readers<AnyReader<float>, AnyReader<float>>{});
  }
  switch (q.prediction.kind) {
    case Kind::kDouble: return with_direct<double>(q, f);
    case Kind::kHalf: return with_direct<c10::Half>(q, f);
    case Kind::kBFloat16: return with_direct<c10::BFloat16>(q, f);
    default: return with_direct<float>(q, f);
  }
}

// whole_rows: something is written once per row, so a row must not be cut, nor passed over where it has
// no columns: its sum is 0.
void cut(CudaErrorProblem& q, bool whole_rows) {
  const Layout& l = q.layout;
  q.cols_per_item = whole_rows ? l.cols : std::min(l.cols, kItemColumns);
  q.col_items = whole_rows ? 1 : l.cols > 0 ? (l.cols + q.cols_per_item - 1) / q.cols_per_item : 0;
  q.items = l.rows * q.col_items;
  const int64_t pack = is_direct(q) && has_packs(q) ? kPackBytes / size_of(q.prediction.kind) : 1;
  q.lanes = 1;
  while (q.lanes < kWarpSize && q.lanes * pack < q.cols_per_item) q.lanes *= 2;
}

unsigned block_count(const CudaErrorProblem& q) {
  const int64_t items_per_block = kThreads / q.lanes;
  const int64_t blocks = (q.items + items_per_block - 1) / items_per_block;
  return static_cast<unsigned>(std::clamp<int64_t>(blocks, 1, kMaxBlocks));
}

CudaErrorProblem cuda_problem(const ErrorProblem& problem, bool whole_rows) {
  CudaErrorProblem q = {};
  static_cast<ErrorProblem&>(q) = problem;
  cut(q, whole_rows);
  return q;
}

}  // namespace

void launch_errors(const char* op, const ErrorProblem& problem, bool whole_rows, const Tensor& like, void* loss,
                   int64_t* count) {
  CudaErrorProblem q = cuda_problem(problem, whole_rows);
  const unsigned blocks = block_count(q);
  const Scratch<double> sums(like, blocks);
  const Scratch<int64_t> counts(like, blocks);
  q.partial_sum = sums.data();
  q.partial_count = counts.data();
  const cudaStream_t stream = current_stream(like);
  with_readers(q, [&](auto readers) {
    using R = decltype(readers);
    using A = typename R::Main::A;
    check_launch(op, launch(stream, dim3(blocks), dim3(kThreads), 0,
                            squared_error_forward_kernel<typename R::Main, typename R::Rest>, q));
    A* loss_data = q.one_loss ? static_cast<A*>(loss) : nullptr;
    check_launch(op, launch(stream, dim3(1), dim3(kThreads), 0, squared_error_finish_kernel<A>,
                            q.partial_sum, q.partial_count, int(blocks), q.denominator, q.divide_by_count,
                            loss_data, count));
  });
}

void launch_error_gradients(const char* op, const ErrorProblem& problem, bool whole_rows, const Tensor& like,
                            const Array& grad_loss, const int64_t* count) {
  CudaErrorProblem q = cuda_problem(problem, whole_rows);
  if (q.items == 0) return;
  if (q.one_loss) q.grad_loss = grad_loss;
  q.count = count;
  const cudaStream_t stream = current_stream(like);
  with_readers(q, [&](auto readers) {
    using R = decltype(readers);
    check_launch(op, launch(stream, dim3(block_count(q)), dim3(kThreads), 0,
                            squared_error_backward_kernel<typename R::Main, typename R::Rest>, q));
  });
}

}  // namespace masked_loss_ext::cuda
