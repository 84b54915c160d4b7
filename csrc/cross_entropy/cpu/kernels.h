// SPDX-License-Identifier: BSD-3-Clause
// The interface between the host side of masked_cross_entropy and its kernels, of which there is one
// set per instruction-set level. Plain data only, see masked_squared_error_cpu.h.
#pragma once

#include "common/array.h"
#include "common/cpu/convert.h"
#include "cross_entropy/formula.h"

namespace masked_loss_ext {

struct Layout;

// Work is cut by shape only: into chunks of whole rows, or of pieces of one long row. How a row is cut
// depends on V alone, so that its result does not depend on the other rows of the batch.
struct RowChunks {
  int64_t rows_per_chunk = 1, pieces = 1, cols_per_piece = 0, count = 0;
};

// What a piece of a row comes to.
struct RowPart {
  RowSums<double> sums;
  double highest = -INFINITY;  // of s but for the label's; sums.max is its multiple by scale
  double label = 0;            // s at the label, where the piece holds it
};

// One entry per chunk of the last step of the forward.
struct ChunkTotals {
  double loss = 0, denominator = 0;
  int64_t bad_row = -1;  // the first with a label outside [0, V)
};

struct CrossEntropyProblem {
  const Layout* layout = nullptr;  // where rows begin
  RowChunks chunks;
  CountedRows counted;
  CrossEntropyOptions options;
  Array logits, weight, token_weight;
  double scale = 1;       // 1 / temperature
  double weight_sum = 0;  // V without class weights
  bool statistics = false;
  // per row: results of the forward, input of the backward
  Array lse, entropy, log_prob, smooth_distance, hit;
  Array row_sums;  // [rows, kRowSums]
  // forward
  Array loss;                     // per row; absent for scalar reductions
  RowPart* parts = nullptr;       // [rows, pieces], where rows are cut
  ChunkTotals* totals = nullptr;  // [chunks], or [finish_chunks] where rows are cut
  // backward
  Array grad_loss, grad_lse, grad_entropy, grad_log_prob;  // per row, or absent
  double grad_scale = 0;  // d loss / d row loss, but for what grad_loss holds per row
  Array grad_logits, grad_token_weight;
  double* slopes = nullptr;  // [rows], d z / d logit at the label, where rows are cut
  ByteRange zero_logits;  // where grad_logits is known to be 0 already
};

constexpr int64_t kRowsPerFinish = 256;

struct CrossEntropyKernels {
  void (*forward)(const CrossEntropyProblem&, int64_t chunk);
  void (*finish)(const CrossEntropyProblem&, int64_t group);  // of kRowsPerFinish rows that were cut
  void (*read_slope)(const CrossEntropyProblem&, int64_t row);  // into slopes
  void (*backward)(const CrossEntropyProblem&, int64_t chunk);
  void (*count)(const CrossEntropyProblem&, int64_t chunk);  // of rows; into totals
  void (*both)(const CrossEntropyProblem&, int64_t chunk);   // of whole rows
  void (*scale)(const CrossEntropyProblem&, double factor, int64_t chunk);  // of grad_logits
};

}  // namespace masked_loss_ext
