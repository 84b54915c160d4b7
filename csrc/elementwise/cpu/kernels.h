// SPDX-License-Identifier: BSD-3-Clause
// The interface between the host side of masked_squared_error and its CPU kernels, of which there is one
// set per instruction-set level. Plain data only: these files include nothing that could emit a shared
// (weak) function compiled for a newer processor.
#pragma once

#include "common/cpu/convert.h"
#include "elementwise/formula.h"

namespace masked_loss_ext {

// Work is cut into chunks of whole rows, or of parts of one long row. The cut depends on shapes only,
// so the order of every sum is the same for any number of threads.
struct Chunks {
  int64_t rows_per_chunk = 1, cols_per_chunk = 1, col_chunks = 1, count = 0;
};

struct CpuErrorProblem : ErrorProblem {
  Chunks chunks;
  double delta_value = 1;
  double scale = 1;                  // forward: of `loss`; backward: of every gradient
  double* partial_sum = nullptr;     // [chunks], forward
  int64_t* partial_count = nullptr;  // [chunks], forward
  ByteRange zero_prediction, zero_target;  // where these gradients are known to be 0 already
};

struct SquaredErrorKernels {
  void (*forward)(const CpuErrorProblem&, int64_t chunk);
  void (*backward)(const CpuErrorProblem&, int64_t chunk);
};

}  // namespace masked_loss_ext
