// SPDX-License-Identifier: BSD-3-Clause
// The passes over rows on CPU, for this room and for those that have the same rows chunk by chunk: what a
// chunk comes to is added by the caller. Numbers are read and refused here; labels, and temperatures of which
// each row has its own, by the caller.
#pragma once

#include <algorithm>
#include <string>

#include "common/cpu/capability.h"
#include "common/cpu/device.h"
#include "common/cpu/scalars.h"
#include "cross_entropy/call.h"
#include "cross_entropy/cpu/kernels.h"
#include "cross_entropy/shards.h"

namespace masked_loss_ext {

// The results of each row; returns what they add up to.
RowTotals forward_rows(const char* op, const RowProblem& rows);
// What follows from labels, mask and class weights alone.
RowTotals count_rows(const RowProblem& rows);
// The gradients of each row. grad_scale: d loss / d row loss, but for what grad_loss holds per row.
void backward_rows(const char* op, const RowProblem& rows, double grad_scale);
// Both, row after row, so that the second read of a row is from the cache; the same bits.
RowTotals sweep_rows(const char* op, const RowProblem& rows, double grad_scale);

// Rows of a shard of the vocabulary (vocab_parallel.h).
struct ShardedRows : Cpu {
  static void shard(const char* op, const RowProblem& rows, ShardFormat format, double* message,
                    const Tensor& like);
  static void head(const char* op, const RowProblem& q, ShardHeader header, double* place, const Tensor& like);
  static void unite(const char* op, const RowProblem& rows, const Shards& shards, const Tensor& like);
};

// The numbers of a call, around its passes: what the sum of losses is divided by, as far as it is given,
// and with the totals of all rows; the sum of class weights, into totals; the loss and the denominator.
double given_denominator(const char* op, const RowProblem& q);
double denominator_of(const RowProblem& q, const RowTotals& totals, double given);
void put_class_weights(const RowProblem& q);
void put_loss(const RowProblem& q, const RowTotals& totals, double denominator);
// d loss / d row loss, but for what grad_loss holds per row.
double grad_scale_of(const RowProblem& q);
// An IndexError; like: what the rows are of.
[[noreturn]] void refuse_label(const char* op, const RowProblem& q, const Tensor& like, int64_t row);
// What the backward reads of each row, for a sweep: made here, put into the problem, kept by the caller.
Tensor sweep_buffer(RowProblem& q, const Tensor& like, int64_t rows);

// Logits of work per chunk, and the longest piece of a row: so few that one long row gives every core
// work, enough to hide the scheduling (some 50 ns).
constexpr int64_t kChunkLogits = 16384;

inline RowChunks cut(const CountedRows& q, bool whole_rows) {
  RowChunks c;
  const int64_t columns = std::max<int64_t>(q.columns, 1);  // a shard may have none
  c.pieces = whole_rows ? 1 : (columns + kChunkLogits - 1) / kChunkLogits;
  c.cols_per_piece = (columns + c.pieces - 1) / c.pieces;
  c.rows_per_chunk = std::max<int64_t>(1, kChunkLogits / columns);
  c.count = (q.rows + c.rows_per_chunk - 1) / c.rows_per_chunk * c.pieces;
  return c;
}

// What label_of() reads by, outside of the kernels.
struct HostElements {
  static int64_t integer(const Array& array, int64_t i) { return read_integer(array, i); }
  static bool is_on(const Array& array, int64_t i) {
    bool on = false;
    with_type(array, i, [&](const auto* p) { on = widen(*p) != 0; });
    return on;
  }
};

// 1 / temperature; 1 where each row has its own, which the kernels read and check.
inline double read_scale(const char* op, const RowProblem& rows) {
  if (rows.temperature.data == nullptr || rows.temperature_per_row) return 1;
  const double value = read_entry<double>(rows.temperature, 0);
  if (!(value > 0 && value < INFINITY)) {
    fail(op, ": temperature must be positive and finite, got ", value);
  }
  return 1 / value;
}

// Where a row stands in its tensor, with its shift where its label does: [i, j].
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

// A row's own temperature, where each has one and this counts; like: what the rows are of.
inline void check_temperature_of(const char* op, const RowProblem& rows, const Tensor& like, int64_t row) {
  if (!rows.temperature_per_row) return;
  const double value = read_entry<double>(rows.temperature, row);
  if (value > 0 && value < INFINITY) return;
  fail(op, ": temperature at row ", row_index(like, row, 0), " must be positive and finite, got ", value);
}

}  // namespace masked_loss_ext
