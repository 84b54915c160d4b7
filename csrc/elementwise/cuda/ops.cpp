// SPDX-License-Identifier: BSD-3-Clause
// masked_squared_error on CUDA. Nothing here waits for the device.
#include <vector>

#include "common/cuda/device.h"
#include "elementwise/call.h"
#include "elementwise/cuda/launches.h"

namespace masked_loss_ext::cuda {
namespace {

struct Errors : Cuda {
  static Tensor allocate(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type) {
    return empty(like, sizes, type);
  }

  static void forward(const char* op, const ErrorProblem& problem, bool whole_rows, const Tensor& like,
                      Tensor& loss, Tensor& count) {
    void* loss_data = problem.one_loss ? loss.mutable_data_ptr() : nullptr;
    launch_errors(op, problem, whole_rows, like, loss_data, count.mutable_data_ptr<int64_t>());
  }

  static void backward(const char* op, const ErrorProblem& problem, bool whole_rows, const Tensor& like,
                       const Tensor& grad_loss, const Tensor& count) {
    const Array incoming = problem.one_loss ? array_of(grad_loss) : Array{};
    launch_error_gradients(op, problem, whole_rows, like, incoming, count.const_data_ptr<int64_t>());
  }
};

}  // namespace
}  // namespace masked_loss_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(MASKED_LOSS_EXT_CUDA_LIBRARY, MASKED_LOSS_EXT_CUDA_KEY, m) {
  masked_loss_ext::register_squared_error<masked_loss_ext::cuda::Errors>(m);
}
