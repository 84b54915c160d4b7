// SPDX-License-Identifier: BSD-3-Clause
// The passes over rows on CUDA, for this room and for those that have the same rows chunk by chunk. A chunk
// leaves the losses of its rows, which are added once all are there. Nothing here waits for the device.
#pragma once

#include "common/cuda/host.h"
#include "cross_entropy/shards.h"

namespace masked_loss_ext::cuda {

// The results of each row; row_losses [rows] on the device.
void forward_rows(const char* op, const RowProblem& rows, const Tensor& like, double* row_losses);
// The denominator, into totals; what follows from labels, mask and class weights alone.
void count_rows(const char* op, const RowProblem& rows, const Tensor& like);
// The gradients of each row, for the incoming ones and the denominator in totals.
void backward_rows(const char* op, const RowProblem& rows, const Tensor& like);
// Loss and gradient of each row, for an incoming gradient of 1 and the denominator in totals.
void sweep_rows(const char* op, const RowProblem& rows, const Tensor& like, double* row_losses);
// The loss, of all rows; the denominator, too, unless count_rows() has put it into totals.
void add_rows(const char* op, const RowProblem& rows, const Tensor& like, const double* row_losses,
              bool counted);

// A gradient times the incoming one, in place.
void scale_rows(const char* op, const RowProblem& rows, const Tensor& like);

// Rows of a shard of the vocabulary (cross_entropy/vocab_parallel.h).
void shard_rows(const char* op, const RowProblem& rows, ShardFormat format, double* message,
                const Tensor& like);
void head_shard(const char* op, const RowProblem& rows, ShardHeader header, double* place, const Tensor& like);
void unite_shards(const char* op, const RowProblem& rows, const Shards& shards, const Tensor& like);

}  // namespace masked_loss_ext::cuda
