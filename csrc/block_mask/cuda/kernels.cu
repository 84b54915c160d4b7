// SPDX-License-Identifier: BSD-3-Clause
// The block-mask operators on CUDA: launches. Nothing here waits for the device.
#include "block_mask/cuda/kernels.cuh"

#include <algorithm>

#include "block_mask/cuda/launches.h"
#include "common/cuda/launch.cuh"

namespace masked_loss_ext::cuda {
namespace {

constexpr int64_t kMaxBlocks = 1 << 16;  // kernels take what is beyond in steps of the grid

dim3 blocks_for(int64_t items, int64_t per_block) {
  return dim3(static_cast<unsigned>(std::min((items + per_block - 1) / per_block, kMaxBlocks)));
}

}  // namespace

void launch_packed_rows(const char* op, const PackedRows& p, const Tensor& like) {
  if (p.rows == 0) return;
  check_launch(op, launch(current_stream(like), blocks_for(p.rows, kBlockMaskThreads), dim3(kBlockMaskThreads),
                          0, packed_rows_kernel, p));
}

void launch_block_lists(const char* op, const IntervalRows& in, const BlockGrid& grid, const ListPointers& kv,
                        const ListPointers* q, const PackedRows* packed, const Tensor& like) {
  const int64_t rows = in.batch * grid.q_blocks, lists = rows + (q ? in.batch * grid.kv_blocks : 0);
  if (lists == 0) return;
  const Scratch<uint8_t> classes(like, rows * grid.kv_blocks);
  const cudaStream_t stream = current_stream(like);
  if (rows > 0 && grid.kv_blocks > 0) {
    check_launch(op, launch(stream, blocks_for(rows, 1), dim3(kBlockMaskThreads), 0, block_classes_kernel, in,
                            packed ? *packed : PackedRows{}, grid, classes.data()));
  }
  check_launch(op, launch(stream, blocks_for(lists, kWarpsPerBlock), dim3(kBlockMaskThreads), 0,
                          block_lists_kernel, classes.data(), in.batch, grid, kv, q ? *q : ListPointers{},
                          q != nullptr));
}

}  // namespace masked_loss_ext::cuda
