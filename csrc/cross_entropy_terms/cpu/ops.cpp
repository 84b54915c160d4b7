// SPDX-License-Identifier: BSD-3-Clause
// The host side of cross_entropy_terms on CPU: allocation, the errors for a bad label or class.
#include <torch/csrc/stable/library.h>

#include <stdexcept>
#include <tuple>

#include "common/cpu/device.h"
#include "cross_entropy_terms/cpu/kernels.h"
#include "common/cpu/memory.h"
#include "common/cpu/parallel.h"
#include "cross_entropy/cpu/rows.h"
#include "cross_entropy_terms/call.h"

namespace masked_loss_ext {
namespace {

const TermsKernels& terms_kernels() {
#if defined(__x86_64__)
  switch (cpu_level()) {
    case Level::kAvx512: return terms_avx512;
    case Level::kAvx2: return terms_avx2;
    default: break;
  }
#endif
  return terms_default;
}

// Everything but what is written. `rows` and the inputs must outlive it.
TermsProblem terms_problem(const char* op, const TermInputs& in, const TermRowInputs& rows,
                           const Layout& layout, int64_t ignore_index) {
  TermsProblem q;
  q.scale = in.rows.temperature ? read_scale(op, array_of(*in.rows.temperature)) : 1;
  q.counted = counted_rows(rows, ignore_index, 0);
  q.layout = layout;
  q.logits = array_of(rows.logits);
  q.rows = term_rows(rows, ignore_index);
  q.chunks = cut(q.counted, true);
  return q;
}

[[noreturn]] void refuse(const TermsProblem& q, const Tensor& logits, BadRow bad) {
  const bool is_label = bad.asked < 0;
  std::ostringstream text;
  text << "cross_entropy_terms: " << (is_label ? "target" : "classes") << " at row "
       << row_index(logits, bad.row, 0) << " must be ";
  if (is_label) {
    text << "in [0, " << q.counted.classes << ") or ignore_index " << q.counted.ignore_index
         << ", got " << read_integer(q.counted.target, bad.row);
  } else {
    text << "below " << q.counted.classes << " (negative where none is asked for), got "
         << read_integer(q.rows.classes, bad.row * q.rows.asked + bad.asked);
  }
  throw std::out_of_range(text.str());
}

using EightTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

EightTensors cross_entropy_terms_forward_cpu(
    const Tensor& logits, const Tensor& target, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& temperature, const std::optional<Tensor>& classes,
    const std::optional<Tensor>& context_before, const std::optional<Tensor>& ngram_after,
    int64_t ignore_index, bool unscaled) {
  constexpr const char* op = "cross_entropy_terms";
  const TermInputs in(logits, target, mask, temperature, classes, context_before, ngram_after);
  check_terms(op, in, unscaled);
  TermOutputs out = allocate_terms(in, unscaled, [&](const auto& sizes, ScalarType type) {
    return empty_tensor(logits, sizes, type);
  });
  const TermRowInputs rows(in);
  const Layout layout = row_layout(op, rows.logits, nullptr);
  TermsProblem q = terms_problem(op, in, rows, layout, ignore_index);
  q.unscaled = unscaled;
  q.terms = arrays_of(out, in, unscaled);
  q.sums = static_cast<double*>(out.sums.mutable_data_ptr());
  std::vector<BadRow> bad(q.chunks.count);
  q.bad = bad.data();
  const TermsKernels& kernel = terms_kernels();
  // Last chunk first: see run_forward() of masked_cross_entropy.
  for_each_chunk(q.chunks.count, [&](int64_t i) { kernel.forward(q, q.chunks.count - 1 - i); });
  for (const BadRow& b : bad) {
    if (b.row >= 0) refuse(q, logits, b);
  }
  return {out.scaled_log_prob, out.scaled_mean_log_prob, out.log_prob,   out.entropy,
          out.class_log_prob,  out.unlikelihood,         out.candidates, out.sums};
}

Tensor cross_entropy_terms_backward_cpu(
    const std::optional<Tensor>& grad_scaled_log_prob,
    const std::optional<Tensor>& grad_scaled_mean_log_prob,
    const std::optional<Tensor>& grad_log_prob, const std::optional<Tensor>& grad_entropy,
    const std::optional<Tensor>& grad_class_log_prob,
    const std::optional<Tensor>& grad_unlikelihood, const Tensor& logits, const Tensor& target,
    const std::optional<Tensor>& mask, const std::optional<Tensor>& temperature,
    const std::optional<Tensor>& classes, const std::optional<Tensor>& context_before,
    const std::optional<Tensor>& ngram_after, const Tensor& sums, int64_t ignore_index) {
  constexpr const char* op = "_cross_entropy_terms_backward";
  const TermInputs in(logits, target, mask, temperature, classes, context_before, ngram_after);
  check_terms(op, in, true);
  const TermGradientInputs gradients(grad_scaled_log_prob, grad_scaled_mean_log_prob, grad_log_prob,
                                     grad_entropy, grad_class_log_prob, grad_unlikelihood, sums);
  check_term_gradients(op, in, gradients);
  std::vector<int64_t> sizes = row_sizes(logits);
  sizes.push_back(logits.size(logits.dim() - 1));
  Tensor grad_logits = empty_tensor(logits, sizes, logits.scalar_type());
  const TermRowInputs rows(in);
  const Layout layout = row_layout(op, rows.logits, &grad_logits);
  TermsProblem q = terms_problem(op, in, rows, layout, ignore_index);
  q.terms = gradients.arrays();
  q.sums = gradients.read_sums();
  q.grad_logits = array_of(grad_logits);
  const size_t bytes = grad_logits.numel() * grad_logits.element_size();
  advise_huge_pages(grad_logits.mutable_data_ptr(), bytes);
  q.zero_logits = untouched_pages(grad_logits.mutable_data_ptr(), bytes);
  const TermsKernels& kernel = terms_kernels();
  for_each_chunk_of_output(
      q.chunks.count, grad_logits.const_data_ptr(),
      q.chunks.rows_per_chunk * q.counted.classes * grad_logits.element_size(),
      [&](int64_t chunk) { kernel.backward(q, chunk); });
  return grad_logits;
}

}  // namespace
}  // namespace masked_loss_ext

STABLE_TORCH_LIBRARY_IMPL(masked_loss_ext, CPU, m) {
  m.impl("cross_entropy_terms", TORCH_BOX(&masked_loss_ext::cross_entropy_terms_forward_cpu));
  m.impl("_cross_entropy_terms_backward",
         TORCH_BOX(&masked_loss_ext::cross_entropy_terms_backward_cpu));
}
