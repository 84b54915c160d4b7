// SPDX-License-Identifier: BSD-3-Clause
// masked_squared_error on CUDA. Forward reads each selected element once and leaves one partial sum per
// block; a second, one-block launch adds them in a fixed order (no atomics). Backward reads the selected
// elements once more and writes every element of the gradient once.
#pragma once

#include "elementwise/cuda/items.cuh"
#include "common/cuda/reduce.cuh"

namespace masked_loss_ext::cuda {

// Per multiprocessor: 80 registers a thread. Left to itself ptxas takes 64 and spills.
constexpr int kResidentBlocks = 3;

// One thread's share of the loss. Sums over packs are double, here and per row: thousands of additions
// one after another would lose digits in float, and one double addition per pack hides behind its loads.
struct Share {
  double sum;
  int64_t count;
};

// Adds one item's terms, and writes its losses where the reduction keeps them. Every lane of the warp
// calls it, also those without an item.
template <class Reader, class Tail>
__device__ __forceinline__ void forward_item(const SquaredErrorParams& q, const Item& item, int lane,
                                             Share& share) {
  using A = typename Reader::A;
  const Factors use = {true, false};
  const bool per_element = varies(q, q.loss, kLoss);
  const A factor = item.exists && item.on ? row_factor<A>(q, item, use) : A(0);
  A* loss = static_cast<A*>(q.loss.data);
  const double loss_scale = 1 / q.denominator;
  double sum = 0;
  for_elements<Reader, Tail>(q, item, lane, per_element, [&](auto reader, auto elements, int64_t col) {
    A pack_sum = 0;
    for (int i = 0; i < decltype(reader)::kVector; ++i) {
      A term = 0;
      if (elements.on[i]) {
        term = factor * element_factor<A>(q, item, col + i, use) *
               squared_difference<A>(elements.prediction[i], elements.target[i]);
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
    squared_error_forward_kernel(SquaredErrorParams q) {
  using A = typename Reader::A;
  __shared__ double sums[kMaxWarps];
  __shared__ int64_t counts[kMaxWarps];
  Share share = {0, 0};
  for_items(q, [&](const Item& item, int lane) { forward_item<Reader, Tail>(q, item, lane, share); });
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
__device__ __forceinline__ A backward_scale(const SquaredErrorParams& q) {
  if (q.grad_loss.data == nullptr) return A(1 / q.denominator);
  const int64_t selected = *q.count;
  if (selected == 0) return A(0);
  const double divisor = q.divide_by_count ? double(selected) : q.denominator;
  return A(load<double>(q.grad_loss, 0) / divisor);
}

// grad_weighting of one item. Every lane of the warp calls it.
template <class Reader, class Tail>
__device__ __forceinline__ void weighting_gradient_item(const SquaredErrorParams& q, const Item& item,
                                                        int lane, typename Reader::A scale) {
  using A = typename Reader::A;
  const Factors use = {false, true};
  const bool per_element = q.layout.col_stride[kGradWeighting] != 0;
  const A factor = item.exists && item.on ? row_factor<A>(q, item, use) * scale : A(0);
  A* out = static_cast<A*>(q.grad_weighting.data);
  double sum = 0;
  for_elements<Reader, Tail>(q, item, lane, per_element, [&](auto reader, auto elements, int64_t col) {
    A pack_sum = 0;
    for (int i = 0; i < decltype(reader)::kVector; ++i) {
      A term = 0;
      if (elements.on[i]) {
        term = factor * element_factor<A>(q, item, col + i, use) *
               squared_difference<A>(elements.prediction[i], elements.target[i]);
      }
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
    squared_error_backward_kernel(SquaredErrorParams q) {
  using A = typename Reader::A;
  const A scale = backward_scale<A>(q);
  const Factors use = {true, true};
  for_items(q, [&](const Item& item, int lane) {
    const A row = item.exists && item.on ? row_factor<A>(q, item, use) : A(0);
    const A factor = gradient_factor<A>(row, scale);
    if (q.grad_prediction.data != nullptr || q.grad_target.data != nullptr) {
      for_elements<Reader, Tail>(q, item, lane, true, [&](auto reader, auto elements, int64_t col) {
        using R = decltype(reader);
        A grad[R::kVector], negative[R::kVector];
        for (int i = 0; i < R::kVector; ++i) {
          grad[i] = 0;
          if (elements.on[i]) {
            const A k = factor * element_factor<A>(q, item, col + i, use);
            grad[i] = prediction_gradient<A>(elements.prediction[i], elements.target[i], k);
          }
          negative[i] = elements.on[i] ? -grad[i] : A(0);  // not -0
        }
        const int64_t to = item.offset[kGrad] + col;
        if (q.grad_prediction.data != nullptr) R::write(q.grad_prediction, to, grad);
        if (q.grad_target.data != nullptr) R::write(q.grad_target, to, negative);
      });
    }
    if (q.grad_weighting.data != nullptr) {
      weighting_gradient_item<Reader, Tail>(q, item, lane, scale);
    }
  });
}

}  // namespace masked_loss_ext::cuda
