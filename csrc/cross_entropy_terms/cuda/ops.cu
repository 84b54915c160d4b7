// SPDX-License-Identifier: BSD-3-Clause
// cross_entropy_terms on CUDA: launches. Nothing here waits for the device.
#include "cross_entropy_terms/cuda/backward.cuh"

#include <torch/csrc/stable/library.h>

#include <type_traits>

#include "cross_entropy/cuda/launch.cuh"
#include "cross_entropy_terms/call.h"

namespace masked_loss_ext::cuda {
namespace {

constexpr int64_t kMaxPacks = 2048;  // of a part in the backward, as in cross_entropy/cuda/backward.cu

TermParams term_params(const RowProblem& rows, const TermRows& terms, int64_t max_packs) {
  TermParams q;
  static_cast<CrossEntropyParams&>(q) = params_of(rows, max_packs);
  q.terms = terms;
  return q;
}

// Room for `count` of them; it lives as long as the tensor.
template <class Item>
Item* room_for(Tensor& buffer, const Tensor& like, int64_t count) {
  static_assert(sizeof(Item) % sizeof(double) == 0);
  buffer = device_empty(like, {count * int64_t{sizeof(Item) / sizeof(double)}}, ScalarType::Double);
  return static_cast<Item*>(buffer.mutable_data_ptr());
}

// Calls f(sums at temperature 1 are needed, sums at T are) with constants.
template <class F>
void with_sums(const TermParams& q, F f) {
  if (!has_unscaled(q.terms)) return f(std::false_type{}, std::true_type{});
  if (sums_apart(q)) return f(std::true_type{}, std::true_type{});
  f(std::true_type{}, std::false_type{});
}

struct Terms : Cuda {
  // One launch; a second where a row has several parts, and where there are links, whose walk by one thread
  // would hold its block.
  static void forward(const char* op, const RowProblem& rows, const TermRows& terms, const Tensor& logits) {
    if (rows.counted.rows == 0) return;
    const TermParams q = term_params(rows, terms, 0);
    const Grid grid = grid_of(op, q), per_row = row_grid(op, rows.counted.rows);
    const bool later = q.parts > 1 || terms.context_before != nullptr;
    Tensor buffer;
    TermPart* parts = later ? room_for<TermPart>(buffer, logits, rows.counted.rows * q.parts) : nullptr;
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

  // Two launches, three where there are links.
  static void backward(const char* op, const RowProblem& rows, const TermRows& terms, const Tensor& logits) {
    if (rows.counted.rows == 0) return;
    const TermParams q = term_params(rows, terms, kMaxPacks);
    const Grid grid = grid_of(op, q), per_row = row_grid(op, rows.counted.rows);
    Tensor buffer;
    TermRow* coefficients = room_for<TermRow>(buffer, logits, rows.counted.rows);
    const cudaStream_t stream = current_stream(logits);
    with_logits_type(q, [&](auto value) {
      using T = decltype(value);
      auto* grad = static_cast<T*>(q.grad_logits.data);
      check_launch(op, launch(stream, dim3(per_row.blocks), dim3(per_row.threads), 0,
                              cross_entropy_terms_coefficients_kernel<T>, q, coefficients));
      check_launch(op, launch(stream, dim3(grid.blocks), dim3(grid.threads), 0,
                              cross_entropy_terms_gradient_kernel<T>, q, coefficients, grad));
      if (terms.context_before == nullptr) return;
      check_launch(op, launch(stream, dim3(per_row.blocks), dim3(per_row.threads), 0,
                              cross_entropy_terms_cells_kernel<T>, q, coefficients, grad));
    });
  }
};

}  // namespace
}  // namespace masked_loss_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(MASKED_LOSS_EXT_CUDA_LIBRARY, MASKED_LOSS_EXT_CUDA_KEY, m) {
  masked_loss_ext::register_terms<masked_loss_ext::cuda::Terms>(m);
}
