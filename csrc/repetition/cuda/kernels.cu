// SPDX-License-Identifier: BSD-3-Clause
// The repetition operators on CUDA: launches. Nothing here waits for the device.
#include "repetition/cuda/kernels.cuh"

#include <algorithm>

#include "common/cuda/launch.cuh"
#include "repetition/cuda/launches.h"

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
  const Scratch<uint8_t> global(tokens, shared ? 0 : blocks * bytes);
  uint8_t* scratch = shared ? nullptr : global.data();
  check_launch(op, launch(current_stream(tokens), dim3(static_cast<unsigned>(blocks)),
                          dim3(kRepetitionThreads), shared ? static_cast<size_t>(bytes) : 0, kernel, in,
                          scratch, out));
}

}  // namespace

void launch_counts(const char* op, const TokenRows& in, const CountPointers& out, const Tensor& tokens) {
  launch_rows(op, in, tokens, false, repetition_counts_kernel, out);
}

void launch_links(const char* op, const TokenRows& in, const LinkPointers& out, const Tensor& tokens) {
  launch_rows(op, in, tokens, true, repetition_links_kernel, out);
}

}  // namespace masked_loss_ext::cuda
