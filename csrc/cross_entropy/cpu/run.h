// SPDX-License-Identifier: BSD-3-Clause
// The passes of masked_cross_entropy on CPU, for the operators that make one of them or both, and the
// errors that no kernel can raise.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "cross_entropy/cpu/setup.h"

namespace masked_loss_ext {

// A gradient of as many rows is cut by rows alone, so that chunks lie one after another in the output.
constexpr int64_t kManyRows = 64;

[[noreturn]] inline void refuse_label(const CrossEntropyProblem& q, const Tensor& logits, int64_t row) {
  const int64_t label = read_integer(q.counted.target, row + q.counted.shift);
  std::ostringstream text;
  text << "masked_cross_entropy: target at row " << row_index(logits, row, q.counted.shift)
       << " must be in [0, " << q.counted.classes << ") or ignore_index " << q.counted.ignore_index
       << ", got " << label;
  throw std::out_of_range(text.str());
}

// Added in order, `per_group` neighbours first.
inline ChunkTotals sum_of(const std::vector<ChunkTotals>& totals, int64_t per_group) {
  ChunkTotals all;
  const int64_t count = static_cast<int64_t>(totals.size());
  for (int64_t first = 0; first < count; first += per_group) {
    ChunkTotals group;
    for (int64_t i = first; i < first + per_group && i < count; ++i) {
      group.loss += totals[i].loss;
      group.denominator += totals[i].denominator;
      if (group.bad_row < 0) group.bad_row = totals[i].bad_row;
    }
    all.loss += group.loss;
    all.denominator += group.denominator;
    if (all.bad_row < 0) all.bad_row = group.bad_row;
  }
  return all;
}

inline ChunkTotals run_forward(CrossEntropyProblem& q) {
  const CrossEntropyKernels& kernel = cross_entropy_kernels();
  q.chunks = cut(q.counted, false);
  const bool is_cut = q.chunks.pieces > 1;
  const int64_t groups = (q.counted.rows + kRowsPerFinish - 1) / kRowsPerFinish;
  std::vector<RowPart> parts(is_cut ? q.chunks.count : 0);
  std::vector<ChunkTotals> totals(is_cut ? groups : q.chunks.count);
  q.parts = is_cut ? parts.data() : nullptr;
  q.totals = totals.data();
  // Last chunk first: what the model wrote last is still in the cache, and what is read last here is
  // what the backward, which goes upwards, reads first.
  for_each_chunk(q.chunks.count,
                 [&](int64_t i) { kernel.forward(q, q.chunks.count - 1 - i); });
  if (is_cut) for_each_chunk(groups, [&](int64_t group) { kernel.finish(q, group); });
  return sum_of(totals, 1);
}

inline void run_backward(CrossEntropyProblem& q, const Tensor* grad_logits, bool in_place) {
  const CrossEntropyKernels& kernel = cross_entropy_kernels();
  q.chunks = cut(q.counted, q.counted.rows >= kManyRows);
  std::vector<double> slopes(q.chunks.pieces > 1 ? q.counted.rows : 0);
  q.slopes = slopes.empty() ? nullptr : slopes.data();
  for (int64_t row = 0; q.slopes != nullptr && row < q.counted.rows; ++row) {
    kernel.read_slope(q, row);
  }
  if (grad_logits == nullptr || in_place) {
    return for_each_chunk(q.chunks.count, [&](int64_t chunk) { kernel.backward(q, chunk); });
  }
  const int64_t bytes =
      q.chunks.rows_per_chunk * q.chunks.cols_per_piece * grad_logits->element_size();
  for_each_chunk_of_output(q.chunks.count, grad_logits->const_data_ptr(), bytes,
                           [&](int64_t chunk) { kernel.backward(q, chunk); });
}

// What follows from labels, mask and class weights alone.
inline ChunkTotals run_count(CrossEntropyProblem& q) {
  q.chunks = cut(q.counted, false);
  if (q.chunks.pieces > 1) q.chunks.rows_per_chunk = kRowsPerFinish;  // as run_forward() adds them
  const int64_t chunks = (q.counted.rows + q.chunks.rows_per_chunk - 1) / q.chunks.rows_per_chunk;
  std::vector<ChunkTotals> totals(chunks);
  q.totals = totals.data();
  for_each_chunk(chunks, [&](int64_t chunk) { cross_entropy_kernels().count(q, chunk); });
  return sum_of(totals, 1);
}

// Forward and backward of one row after another, so that the second read of a row is from the cache;
// with few long rows, one after the other over all. The same bits as the two.
inline ChunkTotals run_both(CrossEntropyProblem& q, const Tensor& grad_logits, bool in_place) {
  const CrossEntropyKernels& kernel = cross_entropy_kernels();
  q.chunks = cut(q.counted, false);
  const bool is_cut = q.chunks.pieces > 1;
  if (is_cut && q.counted.rows < kManyRows) {
    const ChunkTotals totals = run_forward(q);
    run_backward(q, &grad_logits, in_place);
    return totals;
  }
  const int64_t chunks = q.chunks.count / q.chunks.pieces;
  std::vector<ChunkTotals> totals(chunks);
  q.totals = totals.data();
  if (in_place) {
    // Last chunk first: what the model wrote last is still in the cache.
    for_each_chunk(chunks, [&](int64_t i) { kernel.both(q, chunks - 1 - i); });
  } else {
    const int64_t bytes =
        q.chunks.rows_per_chunk * q.counted.classes * grad_logits.element_size();
    for_each_chunk_of_output(chunks, grad_logits.const_data_ptr(), bytes,
                             [&](int64_t chunk) { kernel.both(q, chunk); });
  }
  return sum_of(totals, is_cut ? kRowsPerFinish : 1);
}

}  // namespace masked_loss_ext
