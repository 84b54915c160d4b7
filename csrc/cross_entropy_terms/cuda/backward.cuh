// SPDX-License-Identifier: BSD-3-Clause
// cross_entropy_terms on CUDA, backward: a thread per row makes its coefficients, in double; then one read of
// the rows that count and one write of every row of the gradient, and of the few entries that get more.
#pragma once

#include "cross_entropy_terms/cuda/forward.cuh"

namespace masked_loss_ext::cuda {

// grid: ceil(rows / block); block: kThreads.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksAtLeast)
    cross_entropy_terms_coefficients_kernel(TermParams q,
                                            TermRow* rows)  // [rows], with kNotCounted what has no gradient
{
  const int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= q.counted.rows) return;
  const int64_t label = label_at(q, row);
  TermRow r;
  r.label = label;
  if (label >= 0 && all_banned(term_sums_at(q.terms, row))) {
    r.label = kNotCounted;
  } else if (label >= 0) {
    r = term_row(q.terms, row, label, scale_of<double>(q, row), DeviceTermAccess<T>{row_of<T>(q, row), nullptr});
  }
  rows[row] = r;
}

template <class A>
struct TermExponential {
  Exponential<A> exponential = Exponential<A>(A(1));

  __device__ __forceinline__ A bounded(A x) const { return x < A(-1e30f) ? A(-1e30f) : x; }
  __device__ __forceinline__ A operator()(A x) const { return exponential(x); }
};

// A team shares the single entries of its part.
template <class T>
struct TeamTermAccess : DeviceTermAccess<T> {
  Stretch part;
  int lane, team;

  __device__ __forceinline__ bool writes(int64_t c, int64_t i) const {
    if (i % team != lane) return false;
    if (c < part.head_columns || (c >= part.begin && c < part.end)) return true;
    return c >= part.tail && part.single_columns > part.head_columns;
  }
};

// block: a multiple of q.team; as many blocks as q.parts of all rows need. Where there are links, the single
// entries are left to a thread per row: each team would wait for the walk.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksAtLeast)
    cross_entropy_terms_gradient_kernel(TermParams q,
                                        const TermRow* rows,  // [rows]
                                        T* grad_logits)       // [rows, V]
{
  using A = accumulate_t<T>;
  const RowItem item = item_of(q);
  const TermRow& r = rows[item.exists ? item.row : 0];
  const T* row = row_of<T>(q, item.exists ? item.row : 0);
  T* out = grad_logits + offset_at(q.layout, kGrad, item.exists ? item.row : 0);
  const Stretch s = stretch_of(q, out, item.part);
  const bool counts = item.exists && r.label >= 0;
  if (counts) {
    const TermLoop<A> k = term_loop<A>(r);
    const TermExponential<A> e;
    rewrite<kPacksAtOnce<T, true>>(
        s, item.lane, q.team, RowMemory<T>{row, same_boundaries(row, out)}, out, [&](auto& values, int64_t) {
          for (T& value : values) {  // the branches are the same for a whole row
            value = static_cast<T>(dense_gradient<A>(k, k.both, k.entropy_scale != 0, widen(value), e));
          }
        });
  } else if (item.exists) {
    fill(s, item.lane, q.team, out, static_cast<T>(r.label == kBadLabel ? A(NAN) : A(0)));
  }
  if (q.terms.context_before != nullptr) return;
  if (q.team > kWarpSize) {
    __syncthreads();
  } else {
    __syncwarp();
  }
  if (counts) store_cells(q.terms, r, TeamTermAccess<T>{{row, out}, s, item.lane, q.team});
}

// grid: ceil(rows / block); block: kThreads.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksAtLeast)
    cross_entropy_terms_cells_kernel(TermParams q, const TermRow* rows, T* grad_logits)
{
  const int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= q.counted.rows || rows[row].label < 0) return;
  T* out = grad_logits + offset_at(q.layout, kGrad, row);
  store_cells(q.terms, rows[row], DeviceTermAccess<T>{row_of<T>(q, row), out});
}

}  // namespace masked_loss_ext::cuda
