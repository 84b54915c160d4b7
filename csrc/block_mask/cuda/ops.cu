// SPDX-License-Identifier: BSD-3-Clause
// The block-mask operators on CUDA: launches. Nothing here waits for the device.
#include "block_mask/cuda/kernels.cuh"

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "block_mask/call.h"
#include "common/cuda/runtime.cuh"

namespace masked_loss_ext::cuda {
namespace {

constexpr int64_t kMaxBlocks = 1 << 16;  // kernels take what is beyond in steps of the grid

dim3 blocks_for(int64_t items, int64_t per_block) {
  return dim3(static_cast<unsigned>(std::min((items + per_block - 1) / per_block, kMaxBlocks)));
}

struct Masks : Cuda {
  static void check_offsets(const char*, const PackedRows&) {}  // the host cannot look at them

  static void fill_rows(const char* op, const PackedRows& p, const Tensor& like) {
    if (p.rows == 0) return;
    check_launch(op, launch(current_stream(like), blocks_for(p.rows, kBlockMaskThreads),
                            dim3(kBlockMaskThreads), 0, packed_rows_kernel, p));
  }

  // Two launches: classes (and with `packed` the rows that they are of), then all lists.
  static void fill_lists(const char* op, const IntervalRows& in, const BlockGrid& grid,
                         const ListPointers& kv, const ListPointers* q, const PackedRows* packed,
                         const Tensor& like) {
    const int64_t rows = in.batch * grid.q_blocks, lists = rows + (q ? in.batch * grid.kv_blocks : 0);
    if (lists == 0) return;
    Tensor classes = device_empty(like, {rows * grid.kv_blocks}, ScalarType::Byte);
    uint8_t* class_data = static_cast<uint8_t*>(classes.mutable_data_ptr());
    const cudaStream_t stream = current_stream(like);
    if (rows > 0 && grid.kv_blocks > 0) {
      check_launch(op, launch(stream, blocks_for(rows, 1), dim3(kBlockMaskThreads), 0,
                              block_classes_kernel, in, packed ? *packed : PackedRows{}, grid, class_data));
    }
    check_launch(op, launch(stream, blocks_for(lists, kWarpsPerBlock), dim3(kBlockMaskThreads), 0,
                            block_lists_kernel, class_data, in.batch, grid, kv, q ? *q : ListPointers{},
                            q != nullptr));
  }
};

}  // namespace
}  // namespace masked_loss_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(MASKED_LOSS_EXT_CUDA_LIBRARY, MASKED_LOSS_EXT_CUDA_KEY, m) {
  masked_loss_ext::register_block_mask<masked_loss_ext::cuda::Masks>(m);
}
