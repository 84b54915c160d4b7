// SPDX-License-Identifier: BSD-3-Clause
#include "linear_cross_entropy/cpu/products.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "common/cpu/capability.h"
#include "common/cpu/convert.h"
#include "common/cpu/device.h"
#include "common/cpu/memory.h"
#include "common/cpu/parallel.h"

namespace masked_loss_ext {
namespace {

constexpr int64_t kChunkBytes = int64_t(128) << 20, kLeastRows = 128;
constexpr int64_t kTileBytes = int64_t(16) << 20;  // of the widened weight

// Where there are no instructions for it ATen multiplies halves many times slower than float32.
bool multiplies(ScalarType type) {
  if (type == ScalarType::BFloat16) return half_products().bfloat16;
  if (type == ScalarType::Half) return half_products().float16;
  return type == ScalarType::Float || type == ScalarType::Double;
}

// out = start + a b; start may be out, or one row for all.
void add_product(const Tensor& start, const Tensor& a, const Tensor& b, const Tensor& out) {
  // The stable ABI has no numbers of the type Scalar, which aten::addmm takes.
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), start.get(), a.get(), b.get(), 1, 1));
}

void add_elements(const Tensor& from, const Tensor& into) {
  constexpr int64_t kPiece = 1 << 16;
  const int64_t n = from.numel();
  auto* sum = static_cast<float*>(into.mutable_data_ptr());
  const Array values = array_of(from);
  for_each_chunk((n + kPiece - 1) / kPiece, [&](int64_t piece) {
    const int64_t begin = piece * kPiece, count = std::min(kPiece, n - begin);
    with_type(values, begin, [&](const auto* value) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) sum[begin + i] += static_cast<float>(widen(value[i]));
    });
  });
}

Tensor widened(const Tensor& tensor) { return torch::stable::to(tensor, ScalarType::Float); }

}  // namespace

CpuProducts::CpuProducts(const LinearArguments& in)
    : in_(in),
      wide_(size_of(kind_of(in.hidden)) == 2 && (in.fp32_logits || !multiplies(in.hidden.scalar_type()))),
      weight_(in.linear_weight.stride(1) == 1 || in.linear_weight.stride(0) == 1
                  ? in.linear_weight
                  : torch::stable::contiguous(in.linear_weight)) {
  if (in.bias) bias_ = wide_ ? widened(*in.bias) : *in.bias;
}

int64_t CpuProducts::rows_at_a_time(int64_t rows, bool sums_weight) const {
  const int64_t logit = size_of(kind_of(in_.hidden)), counted = std::max<int64_t>(logit, sizeof(float));
  const int64_t chunk = rows_per_chunk(rows, in_.classes(), counted, kChunkBytes, kLeastRows);
  const bool half = logit == 2 && !wide_;
  const bool in_one = sums_weight && half && is_smaller_in_one(rows, chunk, logit, in_.width());
  return in_one ? std::max<int64_t>(rows, 1) : chunk;
}

template <class F>
void CpuProducts::for_each_tile(const F& f) const {
  const int64_t classes = in_.classes();
  const int64_t most = std::max<int64_t>(kTileBytes / (4 * std::max<int64_t>(in_.width(), 1)), 64);
  for (int64_t first = 0; first < classes; first += most) {
    const int64_t count = std::min(most, classes - first);
    f(widened(rows_from(weight_, first, count)), first, count);
  }
}

void CpuProducts::logits(const Tensor& hidden, const Tensor& logits) const {
  if (!wide_) {
    if (bias_) return add_product(*bias_, hidden, transposed(weight_), logits);
    return product(hidden, transposed(weight_), logits);
  }
  const Tensor h = widened(hidden);
  for_each_tile([&](const Tensor& tile, int64_t first, int64_t count) {
    const Tensor out = columns_from(logits, first, count);
    if (bias_) return add_product(rows_from(*bias_, first, count), h, transposed(tile), out);
    product(h, transposed(tile), out);
  });
}

void CpuProducts::add_hidden(const Tensor& g, const Tensor& grad) const {
  if (!wide_) return product(g, weight_, grad);
  const Tensor sum = empty_tensor(grad, {grad.size(0), grad.size(1)}, ScalarType::Float);
  for_each_tile([&](const Tensor& tile, int64_t first, int64_t count) {
    const Tensor part = columns_from(g, first, count);
    if (first == 0) return product(part, tile, sum);
    add_product(sum, part, tile, sum);
  });
  Tensor result = grad;
  torch::stable::copy_(result, sum);
}

void CpuProducts::begin(ChunkSum& sum, const Tensor& result, bool in_place) {
  begin_sum<Cpu>(sum, result, in_place);
  advise_huge_pages(sum.into->mutable_data_ptr(),
                    static_cast<size_t>(sum.into->numel() * size_of(kind_of(*sum.into))));
}

void CpuProducts::end(ChunkSum& sum) {
  if (sum.is_empty) {
    torch::stable::zero_(*sum.result);
  } else if (sum.into->get() != sum.result->get()) {
    torch::stable::copy_(*sum.result, *sum.into);
  }
}

void CpuProducts::begin_weight(const Tensor& grad, bool one_chunk) {
  begin(weight_sum_, grad, one_chunk && !wide_);
}

void CpuProducts::add_weight(const Tensor& g, const Tensor& hidden) {
  const Tensor& into = *weight_sum_.into;
  const Tensor h = wide_ ? widened(hidden) : hidden;
  const bool first = weight_sum_.is_empty;
  weight_sum_.is_empty = false;
  if (first && into.scalar_type() == g.scalar_type()) return product(transposed(g), h, into);
  if (into.scalar_type() == g.scalar_type()) return add_product(into, transposed(g), h, into);
  // Halves: each chunk's own sum is rounded, their sum is not.
  if (first) torch::stable::zero_(*weight_sum_.into);
  const int64_t most = std::max<int64_t>(kTileBytes / (2 * std::max<int64_t>(in_.width(), 1)), 64);
  for (int64_t c = 0; c < in_.classes(); c += most) {
    const int64_t count = std::min(most, in_.classes() - c);
    const Tensor part = empty_tensor(g, {count, in_.width()}, g.scalar_type());
    product(transposed(columns_from(g, c, count)), h, part);
    add_elements(part, rows_from(into, c, count));
  }
}

void CpuProducts::end_weight() { end(weight_sum_); }

void CpuProducts::begin_bias(const Tensor& grad) { begin(bias_sum_, grad, false); }

void CpuProducts::add_bias(const Tensor& g) {
  Tensor& into = *bias_sum_.into;
  const int64_t columns[] = {0};
  const bool first = bias_sum_.is_empty;
  bias_sum_.is_empty = false;
  Tensor sum = first ? into : empty_tensor(into, {into.size(0)}, into.scalar_type());
  torch::stable::sum_out(sum, g, torch::headeronly::IntHeaderOnlyArrayRef(columns, 1), false,
                         into.scalar_type());
  if (first) return;
  if (into.scalar_type() == ScalarType::Double) {
    auto* total = static_cast<double*>(into.mutable_data_ptr());
    const auto* part = static_cast<const double*>(sum.const_data_ptr());
    for (int64_t i = 0; i < into.numel(); ++i) total[i] += part[i];
  } else {
    add_elements(sum, into);
  }
}

void CpuProducts::end_bias() { end(bias_sum_); }

}  // namespace masked_loss_ext
