// SPDX-License-Identifier: BSD-3-Clause
// cross_entropy_terms on CUDA: launches. Nothing here waits for the device.
#include "cross_entropy_terms/cuda/backward.cuh"

#include <type_traits>

#include "cross_entropy/cuda/launch.cuh"
#include "cross_entropy_terms/cuda/launches.h"

namespace masked_loss_ext::cuda {
namespace {

constexpr int64_t kMaxPacks = 2048;  // of a part in the backward, as in cross_entropy/cuda/backward.cu

TermParams term_params(const RowProblem& rows, const TermRows& terms, int64_t max_packs) {
  TermParams q;
  static_cast<CrossEntropyParams&>(q) = params_of(rows, max_packs);
  q.terms = terms;
  return q;
}

// Calls f(sums at temperature 1 are needed, sums at T are) with constants.
template <class F>
void with_sums(const TermParams& q, F f) {
  if (!has_unscaled(q.terms)) return f(std::false_type{}, std::true_type{});
  if (sums_apart(q)) return f(std::true_type{}, std::true_type{});
  f(std::true_type{}, std::false_type{});
}

}  // namespace

void launch_terms(const char* op, const RowProblem& rows, const TermRows& terms, const Tensor& logits) {
  if (rows.counted.rows == 0) return;
  const TermParams q = term_params(rows, terms, 0);
  const Grid grid = grid_of(op, q), per_row = row_grid(op, rows.counted.rows);
  const bool later = q.parts > 1 || terms.context_before != nullptr;
  const Scratch<TermPart> buffer(logits, later ? rows.counted.rows * q.parts : 0);
  TermPart* parts = later ? buffer.data() : nullptr;
  const cudaStream_t stream = current_stream(logits);
  with_logits_type(q, [&](auto value) {
    using T = decltype(value);
    with_sums(q, [&](auto one, auto scaled) {
      const auto kernel =
          cross_entropy_terms_sums_kernel<T, decltype(one)::value, decltype(scaled)::value>;
      check_launch(op, launch(stream, dim3(grid.blocks), dim3(grid.threads), 0, kernel, q, parts));
    });
    if (!later) return;
    check_launch(op, launch(stream, dim3(per_row.blocks), dim3(per_row.threads), 0,
                            cross_entropy_terms_rows_kernel<T>, q, parts));
  });
}

void launch_term_gradients(const char* op, const RowProblem& rows, const TermRows& terms,
                           const Tensor& logits) {
  if (rows.counted.rows == 0) return;
  const TermParams q = term_params(rows, terms, kMaxPacks);
  const Grid grid = grid_of(op, q), per_row = row_grid(op, rows.counted.rows);
  const Scratch<TermRow> coefficients(logits, rows.counted.rows);
  const cudaStream_t stream = current_stream(logits);
  with_logits_type(q, [&](auto value) {
    using T = decltype(value);
    auto* grad = static_cast<T*>(q.grad_logits.data);
    check_launch(op, launch(stream, dim3(per_row.blocks), dim3(per_row.threads), 0,
                            cross_entropy_terms_coefficients_kernel<T>, q, coefficients.data()));
    check_launch(op, launch(stream, dim3(grid.blocks), dim3(grid.threads), 0,
                            cross_entropy_terms_gradient_kernel<T>, q, coefficients.data(), grad));
    if (terms.context_before == nullptr) return;
    check_launch(op, launch(stream, dim3(per_row.blocks), dim3(per_row.threads), 0,
                            cross_entropy_terms_cells_kernel<T>, q, coefficients.data(), grad));
  });
}

}  // namespace masked_loss_ext::cuda
