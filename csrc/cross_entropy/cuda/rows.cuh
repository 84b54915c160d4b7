// SPDX-License-Identifier: BSD-3-Clause
// What masked_cross_entropy on CUDA makes of the sums over a row: statistics, loss, and the reduction of
// the losses in a fixed order (no atomics). A thread per row.
#pragma once

#include "cross_entropy/cuda/items.cuh"

namespace masked_loss_ext::cuda {

// What is added over rows.
struct Totals {
  double loss, denominator;
  int64_t bad;  // rows with a label outside [0, V)
};

enum class Denominator { kOne, kCounted, kGiven };

template <class A>
struct RowOutputs {
  A *lse, *entropy, *log_prob, *smooth_distance;  // [rows] or null
  A* row_sums;                                    // [rows, kRowSums]
  bool* hit;                                      // [rows] or null
  A* row_loss;                                    // [rows], reduction none, or null
  A* loss;                                        // [], the other reductions, or null
  double* denominator;                            // []
  Denominator rule;
  Array normalizer;          // [], kGiven
  const double* weight_sum;  // [], where there are class weights and label smoothing, or null
};

// Sums of the parts of one row, still in u. All parts are scaled to the largest maximum at once, so that
// their exponentials do not wait for each other.
__device__ __forceinline__ RowSums<double> merge_parts(const RowSums<double>* parts, int64_t count,
                                                       double scale) {
  double largest = -INFINITY;
  for (int64_t i = 0; i < count; ++i) largest = max(largest, parts[i].max);
  RowSums<double> total;
  for (int64_t i = 0; i < count; ++i) {
    RowSums<double> part = parts[i];
    rescale(part, largest, exp(scale * (part.max - largest)));
    total.ties += part.ties;
    total.sum += part.sum;
    total.distance += part.distance;
    total.weighted += part.weighted;
    total.before = max(total.before, part.before);
  }
  total.max = largest;
  return total;
}

// sums: of a whole row, in u. label_u: u at the label, where there is one.
__device__ __forceinline__ RowResult finish_sums(RowSums<double> sums, double scale, bool has_label,
                                                 double label_u, double weight_sum) {
  const RowLogits logits = {sums.max, label_u, scale};
  sums.max *= scale;
  sums.distance *= scale;
  sums.weighted *= scale;
  sums.before *= scale;
  return row_result(sums, logits, has_label, weight_sum);
}

__device__ __forceinline__ RowResult not_a_number() {
  RowResult r;
  r.highest = r.log_sum = r.lse = r.entropy = r.log_prob = r.smooth_distance = r.loss = NAN;
  return r;
}

template <class A>
__device__ __forceinline__ RowResult result_of(const CrossEntropyParams& q, const RowOutputs<A>& out,
                                               const RowSums<double>* parts, int64_t row,
                                               int64_t label) {
  if (label == kNotCounted) return {};
  if (label == kBadLabel) return not_a_number();
  const bool has_label = label >= 0;
  const double weight_sum = sum_of_weights(q, out.weight_sum);
  const double scale = scale_of<double>(q);
  RowResult r = finish_sums(merge_parts(parts + row * q.parts, q.parts, scale), scale, has_label,
                            has_label ? unit_at<A>(q, row, label) : 0, weight_sum);
  if (has_label) {
    r.loss = token_weight_at(q, row) * row_loss(q.options, r, weight_at(q, label), q.rows.classes);
  }
  return r;
}

template <class A>
__device__ __forceinline__ void write_row(const RowOutputs<A>& out, const RowResult& r, int64_t row) {
  put_row_sums(out.row_sums, row, r);
  out.lse[row] = A(r.lse);
  if (out.entropy != nullptr) out.entropy[row] = A(r.entropy);
  if (out.log_prob != nullptr) out.log_prob[row] = A(r.log_prob);
  if (out.smooth_distance != nullptr) out.smooth_distance[row] = A(r.smooth_distance);
  if (out.hit != nullptr) out.hit[row] = r.hit;
  if (out.row_loss != nullptr) out.row_loss[row] = A(r.loss);
}

// Every thread of the block calls it; valid in thread 0.
__device__ __forceinline__ Totals block_totals(Totals mine) {
  __shared__ double losses[kMaxWarps], denominators[kMaxWarps];
  __shared__ int64_t bad[kMaxWarps];
  return {block_sum(mine.loss, losses), block_sum(mine.denominator, denominators),
          block_sum(mine.bad, bad)};
}

// A bad label shows even where the denominator is 0.
template <class A>
__device__ __forceinline__ void finish(const RowOutputs<A>& out, Totals totals) {
  double denominator = 1;
  if (out.rule == Denominator::kCounted) denominator = totals.denominator;
  if (out.rule == Denominator::kGiven) denominator = load<double>(out.normalizer, 0);
  *out.denominator = denominator;
  if (out.loss == nullptr) return;
  double loss = denominator == 0 ? 0 : totals.loss / denominator;
  if (totals.bad > 0) loss = NAN;
  *out.loss = A(loss);
}

__device__ __forceinline__ Totals totals_of(const CrossEntropyParams& q, int64_t label, double loss) {
  Totals row = {loss, 0, label == kBadLabel};
  if (label == kNotCounted) return row;
  const bool unknown = label == kBadLabel && q.weight.data != nullptr;
  row.denominator = unknown ? 0 : weight_at(q, label);
  return row;
}

// One block finishes by itself, more leave their totals to cross_entropy_finish_kernel.
template <class A>
__device__ __forceinline__ void leave(const RowOutputs<A>& out, Totals mine, Totals* totals) {
  mine = block_totals(mine);
  if (threadIdx.x != 0) return;
  if (gridDim.x == 1) {
    finish(out, mine);
  } else {
    totals[blockIdx.x] = mine;
  }
}

// grid: ceil(rows / block), at least 1; block: kThreads.
template <class A>
__global__ void __launch_bounds__(kThreads, kBlocksAtLeast)
    cross_entropy_rows_kernel(CrossEntropyParams q, RowOutputs<A> out,
                              const RowSums<double>* parts,  // [rows, q.parts]
                              Totals* totals)                // [blocks]
{
  const int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  Totals mine = {0, 0, 0};
  if (row < q.rows.rows) {
    const int64_t label = label_at(q, row);
    const RowResult r = result_of(q, out, parts, row, label);
    write_row(out, r, row);
    mine = totals_of(q, label, r.loss);
  }
  leave(out, mine, totals);
}

// grid: 1; block: kThreads.
template <class A>
__global__ void __launch_bounds__(kThreads, kBlocksAtLeast)
    cross_entropy_finish_kernel(RowOutputs<A> out,
                                const Totals* totals,  // [count]
                                int64_t count) {
  Totals mine = {0, 0, 0};
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
    mine.loss += totals[i].loss;
    mine.denominator += totals[i].denominator;
    mine.bad += totals[i].bad;
  }
  mine = block_totals(mine);
  if (threadIdx.x == 0) finish(out, mine);
}

}  // namespace masked_loss_ext::cuda
