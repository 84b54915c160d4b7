// SPDX-License-Identifier: BSD-3-Clause
// What the sources with kernels include to launch them.
#pragma once

#include <stdexcept>
#include <string>

#include "common/cuda/compat.cuh"
#include "common/cuda/host.h"

namespace masked_loss_ext::cuda {

inline void check_launch(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(op) + ": CUDA launch failed: " + cudaGetErrorString(error));
}

}  // namespace masked_loss_ext::cuda
