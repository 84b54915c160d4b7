// SPDX-License-Identifier: BSD-3-Clause
// What the forward and the backward of masked_cross_entropy on CPU share: the choice of kernels, the cut
// into chunks, the inputs.
#pragma once

#include "cross_entropy/call.h"

#include <algorithm>

#include "common/cpu/capability.h"
#include "cross_entropy/cpu/kernels.h"
#include "common/cpu/memory.h"
#include "common/cpu/parallel.h"
#include "common/cpu/scalars.h"

namespace masked_loss_ext {

// Logits of work per chunk, and the longest piece of a row: so few that one long row gives every core
// work, enough to hide the scheduling (some 50 ns).
constexpr int64_t kChunkLogits = 16384;

inline const CrossEntropyKernels& cross_entropy_kernels() {
  return kernels_of_this_machine<CrossEntropyKernels>();
}

inline RowChunks cut(const CountedRows& q, bool whole_rows) {
  RowChunks c;
  c.pieces = whole_rows ? 1 : (q.classes + kChunkLogits - 1) / kChunkLogits;
  c.cols_per_piece = (q.classes + c.pieces - 1) / c.pieces;
  c.rows_per_chunk = std::max<int64_t>(1, kChunkLogits / q.classes);
  c.count = (q.rows + c.rows_per_chunk - 1) / c.rows_per_chunk * c.pieces;
  return c;
}

inline void check_temperature(const char* op, const std::optional<Tensor>& temperature) {
  if (!temperature) return;
  const double value = read_number(*temperature);
  if (!(value > 0 && value < INFINITY)) {
    fail(op, ": temperature must be positive and finite, got ", value);
  }
}

inline double read_normalizer(const char* op, const Tensor& normalizer) {
  const double value = read_number(normalizer);
  check_finite(op, "normalizer", value, false);
  return value;
}

// Everything but what is written. `rows` and the inputs must outlive it.
inline CrossEntropyProblem problem_of(const char* op, const CrossEntropyInputs& in,
                                      const RowInputs& rows, const CrossEntropyOptions& options,
                                      const Layout& layout, int64_t ignore_index, int64_t shift) {
  check_temperature(op, in.temperature);
  CrossEntropyProblem q;
  q.layout = &layout;
  q.counted = counted_rows(rows, ignore_index, shift);
  q.options = options;
  q.logits = array_of(rows.logits);
  q.weight = array_of(rows.weight);
  q.token_weight = array_of(rows.token_weight);
  if (in.temperature) q.scale = 1 / read_number(*in.temperature);
  q.weight_sum = double(q.counted.classes);
  if (in.weight && options.label_smoothing > 0) {
    q.weight_sum = 0;
    for (int64_t c = 0; c < q.counted.classes; ++c) q.weight_sum += read_entry<double>(q.weight, c);
  }
  return q;
}

// Where the label of a row stands in its tensor: [i, j].
inline std::string row_index(const Tensor& logits, int64_t row, int64_t shift) {
  std::string index;
  int64_t rest = row;
  for (int64_t d = logits.dim() - 2; d >= 0; --d) {
    int64_t i = rest % logits.size(d);
    rest /= logits.size(d);
    if (d == logits.dim() - 2) i += shift;
    index = std::to_string(i) + (index.empty() ? "" : ", " + index);
  }
  return "[" + index + "]";
}

// An output that is made, or nothing.
inline Array array_where(bool made, const Tensor& tensor) { return made ? array_of(tensor) : Array{}; }

}  // namespace masked_loss_ext
