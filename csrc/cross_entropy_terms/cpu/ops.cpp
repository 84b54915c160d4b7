// SPDX-License-Identifier: BSD-3-Clause
// cross_entropy_terms on CPU: rows, cut into chunks for the threads, and the errors for a bad label or class.
#include <torch/csrc/stable/library.h>

#include <stdexcept>
#include <vector>

#include "common/cpu/capability.h"
#include "common/cpu/device.h"
#include "common/cpu/memory.h"
#include "common/cpu/parallel.h"
#include "cross_entropy/cpu/rows.h"
#include "cross_entropy_terms/call.h"
#include "cross_entropy_terms/cpu/kernels.h"

namespace masked_loss_ext {
namespace {

const TermsKernels& kernels() {
  return kernels_of_this_machine<TermsKernels>();
}

TermsProblem whole_rows(const char* op, const RowProblem& rows, const TermRows& terms) {
  TermsProblem q;
  static_cast<RowProblem&>(q) = rows;
  q.rows = terms;
  q.scale = read_scale(op, rows);
  q.chunks = cut(q.counted, true);
  return q;
}

[[noreturn]] void refuse(const TermsProblem& q, const Tensor& logits, BadRow bad) {
  const bool is_label = bad.asked < 0;
  const std::string place = text_of("cross_entropy_terms: ", is_label ? "target" : "classes", " at row ",
                                    row_index(logits, bad.row, 0), " must be ");
  if (is_label) {
    throw std::out_of_range(text_of(place, "in [0, ", q.counted.classes, ") or ignore_index ",
                                    q.counted.ignore_index, ", got ",
                                    read_integer(q.counted.target, bad.row)));
  }
  throw std::out_of_range(text_of(place, "below ", q.counted.classes, " (negative where none is asked for), got ",
                                  read_integer(q.rows.classes, bad.row * q.rows.asked + bad.asked)));
}

struct Terms : Cpu {
  static void forward(const char* op, const RowProblem& rows, const TermRows& terms, const Tensor& logits) {
    TermsProblem q = whole_rows(op, rows, terms);
    std::vector<BadRow> bad(q.chunks.count);
    q.bad = bad.data();
    // Last chunk first: what the model wrote last is still in the cache.
    for_each_chunk(q.chunks.count, [&](int64_t i) { kernels().forward(q, q.chunks.count - 1 - i); });
    for (const BadRow& b : bad) {
      if (b.row >= 0) refuse(q, logits, b);
    }
  }

  static void backward(const char* op, const RowProblem& rows, const TermRows& terms, const Tensor&) {
    TermsProblem q = whole_rows(op, rows, terms);
    const int64_t row_bytes = q.counted.classes * size_of(q.grad_logits.kind);
    const int64_t bytes = q.counted.rows * row_bytes;
    advise_huge_pages(q.grad_logits.data, bytes);
    q.zero_logits = untouched_pages(q.grad_logits.data, bytes);
    for_each_chunk_of_output(q.chunks.count, q.grad_logits.data, q.chunks.rows_per_chunk * row_bytes,
                             [&](int64_t chunk) { kernels().backward(q, chunk); });
  }
};

}  // namespace
}  // namespace masked_loss_ext

STABLE_TORCH_LIBRARY_IMPL(masked_loss_ext, CPU, m) {
  masked_loss_ext::register_terms<masked_loss_ext::Terms>(m);
}
