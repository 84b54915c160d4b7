// SPDX-License-Identifier: BSD-3-Clause
// What of ATen the logit-free cross entropy uses on CUDA. Under the simulator these are its operators for the
// CPU, which reach the simulated memory while library_call() lets them: here, and nowhere else.
#pragma once

#include "common/cuda/device.h"
#include "linear_cross_entropy/cuda/launches.h"
#include "linear_cross_entropy/products.h"

#ifdef MASKED_LOSS_EXT_CUDA_SIM
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#endif

namespace masked_loss_ext::cuda {

#ifdef MASKED_LOSS_EXT_CUDA_SIM

template <class F>
void call_aten(const char* name, const Tensor& a, const Tensor& b, const F& f) {
  const std::string what = std::string("aten::") + name + " " + shape_text(a) + " " + shape_text(b);
  cuda_sim::library_call(what.c_str(), f);
}

inline AOTITorchError addmm_out(const Tensor& out, const Tensor& start, const Tensor& a, const Tensor& b) {
  return aoti_torch_cpu_addmm_out(out.get(), start.get(), a.get(), b.get(), 1, 1);
}

// The CPU has no product of halves in float32.
inline void wide_product(const Tensor& a, const Tensor& b, const Tensor& out) {
  const auto wide = [](const Tensor& half) { return torch::stable::to(half, ScalarType::Float); };
  masked_loss_ext::product(wide(a), wide(b), out);
}

#else

template <class F>
void call_aten(const char*, const Tensor&, const Tensor&, const F& f) {
  f();
}

// The stable ABI has no numbers of the type Scalar, which aten::addmm takes: hence torch's C shim.
inline AOTITorchError addmm_out(const Tensor& out, const Tensor& start, const Tensor& a, const Tensor& b) {
  using Handle = AtenTensorHandle;
  using Shim = AOTITorchError (*)(Handle, Handle, Handle, Handle, double, double);
  static const auto shim = torch_cuda_function<Shim>("aoti_torch_cuda_addmm_out");
  return shim(out.get(), start.get(), a.get(), b.get(), 1, 1);
}

inline void wide_product(const Tensor& a, const Tensor& b, const Tensor& out) {
  namespace detail = torch::stable::detail;
  StableIValue stack[] = {detail::from(a), detail::from(b), detail::from(out.scalar_type()),
                          detail::from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "dtype_out", stack, TORCH_ABI_VERSION));
  detail::to<Tensor>(stack[0]);  // a second handle of out
}

#endif

// out = a b; of halves in float32 where that is what out is.
inline void product(const Tensor& a, const Tensor& b, const Tensor& out) {
  call_aten("mm", a, b, [&] {
    if (out.scalar_type() == a.scalar_type()) return masked_loss_ext::product(a, b, out);
    wide_product(a, b, out);
  });
}

// out = start + a b; start may be out, or one row for all.
inline void add_product(const Tensor& start, const Tensor& a, const Tensor& b, const Tensor& out) {
  call_aten("addmm", a, b, [&] { TORCH_ERROR_CODE_CHECK(addmm_out(out, start, a, b)); });
}

// to = from, in the type of `to`
inline void convert(Tensor to, const Tensor& from) {
  call_aten("copy_", to, from, [&] { torch::stable::copy_(to, from); });
}

// out = sum of the rows, added up in the type of out
inline void sum_of_rows(const Tensor& matrix, Tensor out) {
  const int64_t rows[] = {0};
  call_aten("sum", matrix, out, [&] {
    torch::stable::sum_out(out, matrix, IntHeaderOnlyArrayRef(rows, 1), false, out.scalar_type());
  });
}

inline Tensor contiguous_copy(const Tensor& tensor) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < tensor.dim(); ++d) sizes.push_back(tensor.size(d));
  const Tensor copy = device_empty(tensor, sizes, tensor.scalar_type());
  convert(copy, tensor);
  return copy;
}

// Of a tensor without gaps.
inline void fill_zero(const char* op, const Tensor& tensor) {
  clear(op, tensor.mutable_data_ptr(), tensor.numel() * static_cast<int64_t>(tensor.element_size()), tensor);
}

}  // namespace masked_loss_ext::cuda
