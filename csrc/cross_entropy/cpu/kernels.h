// SPDX-License-Identifier: BSD-3-Clause
// The interface between the host side of masked_cross_entropy and its kernels, of which there is one
// set per instruction-set level. Plain data only: what headers define is not compiled for a level.
#pragma once

#include "common/array.h"
#include "common/cpu/convert.h"
#include "cross_entropy/formula.h"

namespace masked_loss_ext {

// Work is cut by shape only: into chunks of whole rows, or of pieces of one long row. How a row is cut
// depends on V alone, so that its result does not depend on the other rows of the batch.
struct RowChunks {
  int64_t rows_per_chunk = 1, pieces = 1, cols_per_piece = 0, count = 0;
};

// What is added over rows.
struct RowTotals {
  double loss = 0, denominator = 0;
  int64_t bad_row = -1;          // the first with a label outside [0, V)
  int64_t bad_temperature = -1;  // the first row that counts whose own is not positive and finite
};

// A problem in one pass over its rows.
struct CrossEntropyProblem : RowProblem {
  RowChunks chunks;
  double scale = 1;                   // 1 / temperature, where that is one number
  double grad_scale = 0;              // d loss / d row loss, but for what grad_loss holds per row
  double weight_sum = 0;              // of w in a gradient; V without class weights
  RowPart* parts = nullptr;           // [rows, pieces], where rows are cut or their parts are what is asked for
  RowTotals* chunk_totals = nullptr;  // [chunks], or one per kRowsPerFinish rows where they are cut
  double* slopes = nullptr;           // [rows], d z / d logit at the label, where rows are cut
  ByteRange zero_logits;              // where grad_logits is known to be 0 already
};

constexpr int64_t kRowsPerFinish = 256;

struct CrossEntropyKernels {
  void (*forward)(const CrossEntropyProblem&, int64_t chunk);
  void (*finish)(const CrossEntropyProblem&, int64_t group);  // of kRowsPerFinish rows that were cut
  void (*read_slope)(const CrossEntropyProblem&, int64_t row);  // into slopes
  void (*backward)(const CrossEntropyProblem&, int64_t chunk);
  void (*count)(const CrossEntropyProblem&, int64_t chunk);  // of whole rows; into chunk_totals
  void (*sweep)(const CrossEntropyProblem&, int64_t chunk);  // of whole rows
  void (*scale)(const CrossEntropyProblem&, double factor, int64_t chunk);  // of grad_logits
};

}  // namespace masked_loss_ext
