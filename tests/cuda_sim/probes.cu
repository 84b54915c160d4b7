// SPDX-License-Identifier: BSD-3-Clause
// Operators that launch a probe by name, written as the product's own launchers are.
#include "probes.h"

#include <string>

#include "common/cuda/compat.cuh"
#include "common/cuda/device.h"
#include "common/cuda/launch.cuh"

namespace masked_loss_ext {
namespace {

using cuda::Tensor;

const Probe& find(const std::string& name) {
  for (const auto* probes : {&memory_probes(), &order_probes(), &warp_probes()})
    for (const Probe& p : *probes)
      if (name == p.name) return p;
  throw std::runtime_error("no probe named " + name);
}

dim3 extent(const std::vector<int64_t>& v) {
  return dim3(static_cast<unsigned>(v[0]), static_cast<unsigned>(v[1]), static_cast<unsigned>(v[2]));
}

void run(std::string name, const Tensor& x, Tensor y, int64_t n, std::vector<int64_t> grid,
         std::vector<int64_t> block, int64_t smem_bytes) {
  cuda::DeviceScope scope(x);
  cuda::check_launch(name.c_str(),
                     launch(cuda::current_stream(x), extent(grid), extent(block),
                            static_cast<size_t>(smem_bytes), find(name).kernel,
                            static_cast<const float*>(x.const_data_ptr()),
                            static_cast<float*>(y.mutable_data_ptr()), static_cast<int>(n)));
}

void run_without_scope(const Tensor& x, Tensor y) {
  cuda::check_launch("copy", launch(cuda::current_stream(x), dim3(1), dim3(1), 0, find("copy").kernel,
                                    static_cast<const float*>(x.const_data_ptr()),
                                    static_cast<float*>(y.mutable_data_ptr()), 1));
}

void run_on_default_stream(const Tensor& x, Tensor y) {
  cuda::DeviceScope scope(x);
  cuda::check_launch("copy", launch(nullptr, dim3(1), dim3(1), 0, find("copy").kernel,
                                    static_cast<const float*>(x.const_data_ptr()),
                                    static_cast<float*>(y.mutable_data_ptr()), 1));
}

struct Arguments {
  const float* x;
  float* y;
  double factor;
  int64_t n;
};

__global__ void scale_by_struct(Arguments a) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < a.n) a.y[i] = static_cast<float>(a.factor) * a.x[i];
}

void run_by_struct(const Tensor& x, Tensor y) {
  cuda::DeviceScope scope(x);
  const Arguments a{static_cast<const float*>(x.const_data_ptr()),
                    static_cast<float*>(y.mutable_data_ptr()), 2.0, x.numel()};
  cuda::check_launch("scale", launch(cuda::current_stream(x), dim3(2), dim3(64), 0, scale_by_struct, a));
}

Tensor empty(const Tensor& like, std::vector<int64_t> sizes) {
  cuda::DeviceScope scope(like);
  return cuda::device_empty(like, sizes, like.scalar_type());
}

}  // namespace
}  // namespace masked_loss_ext

STABLE_TORCH_LIBRARY(cuda_sim_probe, m) {
  m.def("run(str name, Tensor x, Tensor(a!) y, int n, int[] grid, int[] block, int smem_bytes) -> ()");
  m.def("run_without_scope(Tensor x, Tensor(a!) y) -> ()");
  m.def("run_on_default_stream(Tensor x, Tensor(a!) y) -> ()");
  m.def("run_by_struct(Tensor x, Tensor(a!) y) -> ()");
  m.def("empty(Tensor like, int[] sizes) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(cuda_sim_probe, CPU, m) {
  m.impl("run", TORCH_BOX(&masked_loss_ext::run));
  m.impl("run_without_scope", TORCH_BOX(&masked_loss_ext::run_without_scope));
  m.impl("run_on_default_stream", TORCH_BOX(&masked_loss_ext::run_on_default_stream));
  m.impl("run_by_struct", TORCH_BOX(&masked_loss_ext::run_by_struct));
  m.impl("empty", TORCH_BOX(&masked_loss_ext::empty));
}
