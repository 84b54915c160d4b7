// SPDX-License-Identifier: BSD-3-Clause
// An operator whose launch can be made to fail: more than 1024 threads in a block.
#include "common/cuda/device.h"
#include "common/cuda/launch.cuh"

namespace {

using masked_loss_ext::cuda::check_launch;
using torch::stable::Tensor;

// grid: 1; block: any. Each element of `out` becomes its place, from `count` on nothing.
__global__ void number_kernel(float* out, int64_t count) {
  const int64_t i = threadIdx.x;
  if (i < count) out[i] = static_cast<float>(i);
}

Tensor number(const Tensor& like, int64_t threads) {
  const masked_loss_ext::cuda::DeviceScope scope(like);
  Tensor out = masked_loss_ext::cuda::device_empty(like, {like.numel()}, like.scalar_type());
  check_launch("number", masked_loss_ext::launch(
                             masked_loss_ext::cuda::current_stream(like), dim3(1),
                             dim3(static_cast<unsigned>(threads)), 0, number_kernel,
                             static_cast<float*>(out.mutable_data_ptr()), like.numel()));
  return out;
}

}  // namespace

#ifdef MASKED_LOSS_EXT_CUDA_SIM  // beside the one that a GPU runs, in the same process
#define PROBE masked_loss_ext_probe_sim
#else
#define PROBE masked_loss_ext_probe
#endif

STABLE_TORCH_LIBRARY(PROBE, m) { m.def("number(Tensor like, int threads) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(PROBE, MASKED_LOSS_EXT_CUDA_KEY, m) { m.impl("number", TORCH_BOX(&number)); }
