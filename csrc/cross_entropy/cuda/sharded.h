// SPDX-License-Identifier: BSD-3-Clause
// What is the same of every operator over a shard of the vocabulary on CUDA, see cross_entropy/vocab_parallel.h.
#pragma once

#include "common/cuda/device.h"
#include "cross_entropy/cuda/rows.h"
#include "cross_entropy/vocab_parallel.h"

namespace masked_loss_ext::cuda {

struct ShardedRows : Cuda {
  static void shard(const char* op, const RowProblem& rows, ShardFormat format, double* message,
                    const Tensor& like) {
    shard_rows(op, rows, format, message, like);
  }
  static void head(const char* op, const RowProblem& rows, ShardHeader header, double* place,
                   const Tensor& like) {
    head_shard(op, rows, header, place, like);
  }
  static void unite(const char* op, const RowProblem& rows, const Shards& shards, const Tensor& like) {
    unite_shards(op, rows, shards, like);
  }
};

}  // namespace masked_loss_ext::cuda
