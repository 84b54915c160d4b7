// SPDX-License-Identifier: BSD-3-Clause
// The repetition operators on CUDA. Nothing here waits for the device.
#include "common/cuda/device.h"
#include "repetition/call.h"
#include "repetition/cuda/launches.h"

namespace masked_loss_ext::cuda {
namespace {

struct Rows : Cuda {
  static void count(const char* op, const TokenRows& in, const CountPointers& out, const Tensor& tokens) {
    launch_counts(op, in, out, tokens);
  }

  static void link(const char* op, const TokenRows& in, const LinkPointers& out, const Tensor& tokens) {
    launch_links(op, in, out, tokens);
  }
};

}  // namespace
}  // namespace masked_loss_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(MASKED_LOSS_EXT_CUDA_LIBRARY, MASKED_LOSS_EXT_CUDA_KEY, m) {
  masked_loss_ext::register_repetition<masked_loss_ext::cuda::Rows>(m);
}
