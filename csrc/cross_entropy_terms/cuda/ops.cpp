// SPDX-License-Identifier: BSD-3-Clause
// cross_entropy_terms on CUDA. Nothing here waits for the device.
#include "common/cuda/device.h"
#include "cross_entropy_terms/call.h"
#include "cross_entropy_terms/cuda/launches.h"

namespace masked_loss_ext::cuda {
namespace {

struct Terms : Cuda {
  static void forward(const char* op, const RowProblem& rows, const TermRows& terms, const Tensor& logits) {
    launch_terms(op, rows, terms, logits);
  }

  static void backward(const char* op, const RowProblem& rows, const TermRows& terms, const Tensor& logits) {
    launch_term_gradients(op, rows, terms, logits);
  }
};

}  // namespace
}  // namespace masked_loss_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(MASKED_LOSS_EXT_CUDA_LIBRARY, MASKED_LOSS_EXT_CUDA_KEY, m) {
  masked_loss_ext::register_terms<masked_loss_ext::cuda::Terms>(m);
}
