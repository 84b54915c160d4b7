// SPDX-License-Identifier: BSD-3-Clause
// What linear_cross_entropy/cuda/kernels.cu launches, and what it asks of CUDA besides.
#pragma once

#include "common/cuda/host.h"
#include "cross_entropy/formula.h"

namespace masked_loss_ext::cuda {

struct KeptPlaces {
  int64_t* index;  // [count]
  int64_t count;
  int64_t most;    // so many rows may take part: where there are more, the last entry is kOneTooMany
  int64_t* total;  // [1], or null
};

// Two launches: how many rows take part, by each block, then which.
void launch_kept_rows(const char* op, const RowProblem& q, const Tensor& like, bool receiving,
                      const KeptPlaces& places);

struct RowCopy {
  const void* from;
  void* to;
  const int64_t* index;  // [count]
  int64_t count, units;  // units: of a row
  Layout layout;         // where the rows lie that are taken (kPrediction), in elements
  int64_t element;       // bytes of one
};

// Of rows with so many elements; [N, D] of any strides to [count, D], 0 where the place is negative.
void launch_take_rows(const char* op, const RowCopy& copy, int64_t width, const Tensor& like);
// [count, D] to [N, D]; rows in no place stay as they are.
void launch_put_rows(const char* op, const RowCopy& copy, int64_t width, const Tensor& like);

// sum += part, both of one type: float or double.
void launch_add(const char* op, Array sum, Array part, int64_t count, const Tensor& like);
// logits += bias, for every row.
void launch_add_bias(const char* op, float* logits, Array bias, int64_t rows, int64_t classes,
                     const Tensor& like);

bool is_capturing(const char* op, const Tensor& like);
// Waits for the device.
int64_t read_number(const char* op, const int64_t* number, const Tensor& like);
void clear(const char* op, void* data, int64_t bytes, const Tensor& like);

}  // namespace masked_loss_ext::cuda
