// SPDX-License-Identifier: BSD-3-Clause
// The repetition operators on CUDA: launches. Nothing here waits for the device.
#include "repetition/cuda/kernels.cuh"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>

#include "common/cuda/runtime.cuh"
#include "repetition/call.h"

namespace masked_loss_ext::cuda {
namespace {

constexpr int64_t kMaxBlocks = 1024;         // kernels take what is beyond in steps of the grid
constexpr int64_t kSharedBytes = 40 * 1024;  // beside a kernel's own; 2048 tokens to count, 1024 to link

// One block per row, its scratch in shared memory where that is large enough.
template <class Pointers>
void launch_rows(const char* op, const TokenRows& in, const Tensor& tokens, bool contexts,
                 void (*kernel)(TokenRows, uint8_t*, Pointers), const Pointers& out) {
  if (in.rows == 0) return;
  const int64_t blocks = std::min(in.rows, kMaxBlocks), bytes = scratch_bytes(in.length, contexts);
  const bool shared = bytes <= kSharedBytes;
  Tensor global = device_empty(tokens, {shared ? 0 : blocks * bytes}, ScalarType::Byte);
  uint8_t* scratch = shared ? nullptr : static_cast<uint8_t*>(global.mutable_data_ptr());
  check_launch(op, launch(current_stream(tokens), dim3(static_cast<unsigned>(blocks)),
                          dim3(kRepetitionThreads), shared ? static_cast<size_t>(bytes) : 0, kernel, in,
                          scratch, out));
}

struct Rows : Cuda {
  static void count(const char* op, const TokenRows& in, const CountPointers& out, const Tensor& tokens) {
    launch_rows(op, in, tokens, false, repetition_counts_kernel, out);
  }

  static void link(const char* op, const TokenRows& in, const LinkPointers& out, const Tensor& tokens) {
    launch_rows(op, in, tokens, true, repetition_links_kernel, out);
  }
};

}  // namespace
}  // namespace masked_loss_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(MASKED_LOSS_EXT_CUDA_LIBRARY, MASKED_LOSS_EXT_CUDA_KEY, m) {
  masked_loss_ext::register_repetition<masked_loss_ext::cuda::Rows>(m);
}
