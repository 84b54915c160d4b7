// SPDX-License-Identifier: BSD-3-Clause
// The block-mask operators on CUDA. Nothing here waits for the device.
#include "block_mask/call.h"
#include "block_mask/cuda/launches.h"
#include "common/cuda/device.h"

namespace masked_loss_ext::cuda {
namespace {

struct Masks : Cuda {
  static void check_offsets(const char*, const PackedRows&) {}  // the host cannot look at them

  static void fill_rows(const char* op, const PackedRows& p, const Tensor& like) {
    launch_packed_rows(op, p, like);
  }

  static void fill_lists(const char* op, const IntervalRows& in, const BlockGrid& grid,
                         const ListPointers& kv, const ListPointers* q, const PackedRows* packed,
                         const Tensor& like) {
    launch_block_lists(op, in, grid, kv, q, packed, like);
  }
};

}  // namespace
}  // namespace masked_loss_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(MASKED_LOSS_EXT_CUDA_LIBRARY, MASKED_LOSS_EXT_CUDA_KEY, m) {
  masked_loss_ext::register_block_mask<masked_loss_ext::cuda::Masks>(m);
}
