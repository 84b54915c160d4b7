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

CountTensors repetition_counts_cuda(const Tensor& tokens, const std::optional<Tensor>& valid,
                                    int64_t ngram_size) {
  constexpr const char* op = "repetition_counts";
  const TokenRows in = token_rows(op, tokens, valid, ngram_size);
  const DeviceScope scope(tokens);
  const CountTensors counts = allocate_counts(device_empty, in, tokens);
  launch_rows(op, in, tokens, false, repetition_counts_kernel, pointers_of(counts));
  return counts;
}

LinkTensors repetition_links_cuda(const Tensor& tokens, const std::optional<Tensor>& valid,
                                  int64_t ngram_size) {
  constexpr const char* op = "repetition_links";
  const TokenRows in = token_rows(op, tokens, valid, ngram_size);
  const DeviceScope scope(tokens);
  const LinkTensors links = allocate_links(device_empty, in, tokens);
  launch_rows(op, in, tokens, true, repetition_links_kernel, pointers_of(links));
  return links;
}

}  // namespace
}  // namespace masked_loss_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(MASKED_LOSS_EXT_CUDA_LIBRARY, MASKED_LOSS_EXT_CUDA_KEY, m) {
  m.impl("repetition_counts", TORCH_BOX(&masked_loss_ext::cuda::repetition_counts_cuda));
  m.impl("repetition_links", TORCH_BOX(&masked_loss_ext::cuda::repetition_links_cuda));
}
