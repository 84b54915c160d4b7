// SPDX-License-Identifier: BSD-3-Clause
// masked_squared_error on CUDA. A group of 1 to 32 neighbouring lanes takes one item (a row, or a part of
// a long one) at a time and reads it by packs of 16 bytes, where dtype, strides and alignment allow, or by
// elements. An item that the mask drops is not read.
//
// Forward reads each selected element once and leaves one partial sum per block; a second, one-block launch
// adds them in a fixed order (no atomics). Backward reads the selected elements once more and writes every
// element of the gradient once.
#pragma once

#include "common/cuda/elements.cuh"
#include "common/cuda/reduce.cuh"
#include "elementwise/formula.h"

namespace masked_loss_ext::cuda {

constexpr int kThreads = 256;
// Per multiprocessor: 80 registers a thread. Left to itself ptxas takes 64 and spills.
constexpr int kResidentBlocks = 3;

struct CudaErrorProblem : ErrorProblem {
  int64_t cols_per_item, col_items, items;  // items = rows * col_items
  int lanes;                                // per item, a power of two
  double* partial_sum;                      // [blocks], forward
  int64_t* partial_count;                   // [blocks], forward
  Array grad_loss;                          // [], backward of scalar reductions
  const int64_t* count;                     // [], backward
};

struct ReadEntry {
  template <class A>
  static __device__ __forceinline__ A number(const Array& array, int64_t i) { return load<A>(array, i); }
  static __device__ __forceinline__ bool is_on(const Array& array, int64_t i) {
    return cuda::is_on(array, i);
  }
};

// Where one item lies.
struct Item {
  int64_t offset[kOperands];  // of its row
  int64_t begin, end;         // columns
  bool exists, on;            // on: the mask does not drop the whole row
};

__device__ __forceinline__ Item item_at(const CudaErrorProblem& q, int64_t index) {
  Item item = {};
  item.exists = index < q.items;
  if (!item.exists) return item;
  const Layout& layout = q.layout;
  int64_t row = q.col_items == 1 ? index : index / q.col_items;
  item.begin = (index - row * q.col_items) * q.cols_per_item;
  item.end = min(item.begin + q.cols_per_item, layout.cols);
  for (int d = layout.outer - 1; d >= 0; --d) {
    // The slowest dimension needs no division, so the usual one or two row dimensions need one at most.
    const int64_t quotient = d > 0 ? row / layout.outer_size[d] : 0;
    const int64_t i = row - quotient * layout.outer_size[d];
    for (int o = 0; o < kOperands; ++o) item.offset[o] += i * layout.outer_stride[d][o];
    row = quotient;
  }
  if (item.begin == item.end) return item;  // no columns: what the row shares may not exist either
  item.on = q.mask.data == nullptr || varies(q, q.mask, kMask) || is_on(q.mask, item.offset[kMask]);
  return item;
}

// Product of the factors that a row shares, or of those of one element that it does not.
template <class A>
__device__ __forceinline__ A row_factor(const ErrorProblem& q, const Item& item, Factors use) {
  return item.exists && item.on ? factor_of<A, ReadEntry>(q, item.offset, use, true) : A(0);
}

template <class A>
__device__ __forceinline__ A element_factor(const ErrorProblem& q, const Item& item, int64_t col,
                                            Factors use) {
  return factor_of<A, ReadEntry>(q, item.offset, use, false, col);
}

// What every thread keeps of the element loss: one of them for a whole launch, so nothing diverges.
template <class A>
struct Loss {
  ElementLoss kind;
  A delta;

  __device__ __forceinline__ explicit Loss(const ErrorProblem& q)
      : kind(q.element_loss), delta(q.delta.data == nullptr ? A(1) : load<A>(q.delta, 0)) {}

  // Of the elements of a pack.
  template <class Elements>
  __device__ __forceinline__ void values(const Elements& e, A* out) const {
    with_loss(kind, [&](auto loss) {
      for (int i = 0; i < Elements::kCount; ++i) out[i] = loss.value(e.prediction[i] - e.target[i], delta);
    });
  }

  template <class Elements>
  __device__ __forceinline__ void slopes(const Elements& e, A* out) const {
    with_loss(kind, [&](auto loss) {
      for (int i = 0; i < Elements::kCount; ++i) out[i] = loss.slope(e.prediction[i] - e.target[i], delta);
    });
  }
};

// Reads kVector neighbouring elements. T: the dtype that prediction and target share, with unit column
// stride and, for kVector > 1, aligned rows.
template <class T, int kVectorLength>
struct DirectReader {
  using A = accumulate_t<T>;
  using Output = T;
  static constexpr int kVector = kVectorLength;
  static __device__ __forceinline__ void read(const Array& array, int64_t offset, A* out) {
    using P = Pack<T, kVector>;
    const P pack = *reinterpret_cast<const P*>(static_cast<const T*>(array.data) + offset);
    for (int i = 0; i < kVector; ++i) out[i] = widen(pack.value[i]);
  }
  static __device__ __forceinline__ void write(const Array& array, int64_t offset, const A* values) {
    using P = Pack<T, kVector>;
    P pack;
    for (int i = 0; i < kVector; ++i) pack.value[i] = static_cast<T>(values[i]);
    *reinterpret_cast<P*>(static_cast<T*>(array.data) + offset) = pack;
  }
};

// Any dtypes and strides, one element at a time.
template <class Accumulator>
struct AnyReader {
  using A = Accumulator;
  static constexpr int kVector = 1;
  static __device__ __forceinline__ void read(const Array& array, int64_t offset, A* out) {
    *out = load<A>(array, offset);
  }
  static __device__ __forceinline__ void write(const Array& array, int64_t offset, const A* values) {
    switch (array.kind) {
      case Kind::kDouble: static_cast<double*>(array.data)[offset] = *values; break;
      case Kind::kHalf: static_cast<c10::Half*>(array.data)[offset] = static_cast<float>(*values); break;
      case Kind::kBFloat16:
        static_cast<c10::BFloat16*>(array.data)[offset] = static_cast<float>(*values);
        break;
      default: static_cast<float*>(array.data)[offset] = static_cast<float>(*values);
    }
  }
};

// The elements of one load, with their masks.
template <class Reader>
struct Elements {
  static constexpr int kCount = Reader::kVector;
  typename Reader::A prediction[Reader::kVector], target[Reader::kVector];
  bool on[Reader::kVector];
};

template <class Reader>
__device__ __forceinline__ Elements<Reader> read_elements(const CudaErrorProblem& q, const Item& item,
                                                          int64_t col) {
  const int64_t* stride = q.layout.col_stride;
  Elements<Reader> e = {};
  bool any = false;
  for (int i = 0; i < Reader::kVector; ++i) {
    e.on[i] = item.on && (!varies(q, q.mask, kMask) ||
                          is_on(q.mask, item.offset[kMask] + (col + i) * stride[kMask]));
    any = any || e.on[i];
  }
  if (any) {
    Reader::read(q.prediction, item.offset[kPrediction] + col * stride[kPrediction], e.prediction);
    Reader::read(q.target, item.offset[kTarget] + col * stride[kTarget], e.target);
  }
  return e;
}

// One lane's walk over the packs of its item; the last columns of a row that fill no pack are left to
// `Tail`, which reads one element at a time. f is called with the reader, the elements and the column.
template <class Reader, class Tail, class F>
__device__ __forceinline__ void for_elements(const CudaErrorProblem& q, const Item& item, int lane,
                                             bool read_dropped, F f) {
  if (!item.exists || !(item.on || read_dropped)) return;
  const int64_t whole = item.begin + (item.end - item.begin) / Reader::kVector * Reader::kVector;
  const int64_t step = int64_t(q.lanes) * Reader::kVector;
  for (int64_t col = item.begin + int64_t(lane) * Reader::kVector; col < whole; col += step) {
    f(Reader{}, read_elements<Reader>(q, item, col), col);
  }
  if constexpr (Reader::kVector > 1) {
    for (int64_t col = whole + lane; col < item.end; col += q.lanes) {
      f(Tail{}, read_elements<Tail>(q, item, col), col);
    }
  }
}

// Calls f(item, lane) for the items of this warp's groups, the same number of times in every lane.
template <class F>
__device__ __forceinline__ void for_items(const CudaErrorProblem& q, F f) {
  const int lane = threadIdx.x % q.lanes;
  const int64_t groups_per_warp = kWarpSize / q.lanes;
  const int64_t warp = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / kWarpSize;
  const int64_t warps = int64_t(gridDim.x) * blockDim.x / kWarpSize;
  const int64_t group = threadIdx.x % kWarpSize / q.lanes;
  for (int64_t first = warp * groups_per_warp; first < q.items; first += warps * groups_per_warp) {
    f(item_at(q, first + group), lane);
  }
}

// One thread's share of the loss. Sums over packs are double, here and per row: thousands of additions
// one after another would lose digits in float, and one double addition per pack hides behind its loads.
struct Share {
  double sum;
  int64_t count;
};

// Adds one item's terms, and writes its losses where the reduction keeps them. Every lane of the warp
// calls it, also those without an item.
template <class Reader, class Tail>
__device__ __forceinline__ void forward_item(const CudaErrorProblem& q, const Item& item, int lane,
                                             const Loss<typename Reader::A>& element_loss, Share& share) {
  using A = typename Reader::A;
  const Factors use = {true, false};
  const bool per_element = varies(q, q.loss, kLoss);
  const A factor = row_factor<A>(q, item, use);
  A* loss = static_cast<A*>(q.loss.data);
  const double loss_scale = 1 / q.denominator;
  double sum = 0;
  for_elements<Reader, Tail>(q, item, lane, per_element, [&](auto reader, auto elements, int64_t col) {
    A pack_sum = 0, value[decltype(reader)::kVector];
    element_loss.values(elements, value);
    for (int i = 0; i < decltype(reader)::kVector; ++i) {
      A term = 0;
      if (elements.on[i]) {
        term = factor * element_factor<A>(q, item, col + i, use) * value[i];
        ++share.count;
      }
      // by element: reduction none, or token with one channel; both divide by 1
      if (per_element) loss[item.offset[kLoss] + (col + i) * q.layout.col_stride[kLoss]] = term;
      pack_sum += term;
    }
    sum += pack_sum;
  });
  share.sum += sum;
  if (q.loss.data != nullptr && !per_element) {
    sum = group_sum(sum, q.lanes);
    if (item.exists && lane == 0) loss[item.offset[kLoss]] = A(sum * loss_scale);
  }
}

// grid: any; block: kThreads. Writes partial_sum and partial_count of each block.
template <class Reader, class Tail>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    squared_error_forward_kernel(CudaErrorProblem q) {
  using A = typename Reader::A;
  __shared__ double sums[kMaxWarps];
  __shared__ int64_t counts[kMaxWarps];
  const Loss<A> element_loss(q);
  Share share = {0, 0};
  for_items(q, [&](const Item& item, int lane) {
    forward_item<Reader, Tail>(q, item, lane, element_loss, share);
  });
  const double sum = block_sum(share.sum, sums);
  const int64_t count = block_sum(share.count, counts);
  if (threadIdx.x == 0) {
    q.partial_sum[blockIdx.x] = sum;
    q.partial_count[blockIdx.x] = count;
  }
}

// grid: 1; block: kThreads. Adds the blocks' shares; `loss` is null where the losses are kept apart.
template <class A>
__global__ void __launch_bounds__(kThreads)
    squared_error_finish_kernel(const double* partial_sum,    // [blocks]
                                const int64_t* partial_count,  // [blocks]
                                int blocks, double denominator, bool divide_by_count,
                                A* loss,         // []
                                int64_t* count)  // []
{
  __shared__ double sums[kMaxWarps];
  __shared__ int64_t counts[kMaxWarps];
  double sum = 0;
  int64_t selected = 0;
  for (int i = threadIdx.x; i < blocks; i += kThreads) {
    sum += partial_sum[i];
    selected += partial_count[i];
  }
  sum = block_sum(sum, sums);
  selected = block_sum(selected, counts);
  if (threadIdx.x != 0) return;
  *count = selected;
  if (loss == nullptr) return;
  const double divisor = divide_by_count ? double(selected) : denominator;
  *loss = selected > 0 ? A(sum / divisor) : A(0);
}

// d loss / d term, but for what grad_loss itself holds per token or element.
template <class A>
__device__ __forceinline__ A backward_scale(const CudaErrorProblem& q) {
  if (q.grad_loss.data == nullptr) return A(1 / q.denominator);
  const int64_t selected = *q.count;
  if (selected == 0) return A(0);
  const double divisor = q.divide_by_count ? double(selected) : q.denominator;
  return A(load<double>(q.grad_loss, 0) / divisor);
}

// grad_weighting of one item. Every lane of the warp calls it.
template <class Reader, class Tail>
__device__ __forceinline__ void weighting_gradient_item(const CudaErrorProblem& q, const Item& item,
                                                        int lane, const Loss<typename Reader::A>& loss,
                                                        typename Reader::A scale) {
  using A = typename Reader::A;
  const Factors use = {false, true};
  const bool per_element = q.layout.col_stride[kGradWeighting] != 0;
  const A factor = row_factor<A>(q, item, use) * scale;
  A* out = static_cast<A*>(q.grad_weighting.data);
  double sum = 0;
  for_elements<Reader, Tail>(q, item, lane, per_element, [&](auto reader, auto elements, int64_t col) {
    A pack_sum = 0, value[decltype(reader)::kVector];
    loss.values(elements, value);
    for (int i = 0; i < decltype(reader)::kVector; ++i) {
      const A term =
          elements.on[i] ? factor * element_factor<A>(q, item, col + i, use) * value[i] : A(0);
      if (per_element) out[item.offset[kGradWeighting] + col + i] = term;
      pack_sum += term;
    }
    sum += pack_sum;
  });
  if (per_element) return;
  sum = group_sum(sum, q.lanes);
  if (item.exists && lane == 0) out[item.offset[kGradWeighting]] = A(sum);
}

// grid: any; block: kThreads. Writes each needed gradient once, 0 where the mask is off.
template <class Reader, class Tail>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    squared_error_backward_kernel(CudaErrorProblem q) {
  using A = typename Reader::A;
  const A scale = backward_scale<A>(q);
  const Loss<A> loss(q);
  const Factors use = {true, true};
  for_items(q, [&](const Item& item, int lane) {
    const A factor = row_factor<A>(q, item, use) * scale;
    if (q.grad_prediction.data != nullptr || q.grad_target.data != nullptr) {
      for_elements<Reader, Tail>(q, item, lane, true, [&](auto reader, auto elements, int64_t col) {
        using R = decltype(reader);
        A grad[R::kVector], negative[R::kVector];
        loss.slopes(elements, grad);
        for (int i = 0; i < R::kVector; ++i) {
          grad[i] = elements.on[i] ? factor * element_factor<A>(q, item, col + i, use) * grad[i] : A(0);
          negative[i] = elements.on[i] ? -grad[i] : A(0);  // not -0
        }
        const int64_t to = item.offset[kGrad] + col;
        if (q.grad_prediction.data != nullptr) R::write(q.grad_prediction, to, grad);
        if (q.grad_target.data != nullptr) R::write(q.grad_target, to, negative);
      });
    }
    if (q.grad_weighting.data != nullptr) {
      weighting_gradient_item<Reader, Tail>(q, item, lane, loss, scale);
    }
  });
}

}  // namespace masked_loss_ext::cuda
