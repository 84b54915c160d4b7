// SPDX-License-Identifier: BSD-3-Clause
// What the CPU and the CUDA side of cross_entropy_terms do before a kernel runs.
#pragma once

#include "cross_entropy_terms/formula.h"
#include "cross_entropy/call.h"

namespace masked_loss_ext {

// Logits, target, mask and temperature are checked and read as masked_cross_entropy does.
struct TermInputs {
  const std::optional<Tensor> target, none;
  const CrossEntropyInputs rows;
  const std::optional<Tensor>&classes, &context_before, &ngram_after;

  TermInputs(const Tensor& logits, const Tensor& labels, const std::optional<Tensor>& mask,
             const std::optional<Tensor>& temperature, const std::optional<Tensor>& asked,
             const std::optional<Tensor>& before, const std::optional<Tensor>& after)
      : target(labels),
        rows{logits, target, mask, none, none, none, temperature},
        classes(asked),
        context_before(before),
        ngram_after(after) {}
  TermInputs(const TermInputs&) = delete;  // rows refers to target and none
};

inline void check_classes(const char* op, const Tensor& classes, const Tensor& logits) {
  check_integer(op, "classes", classes, "");
  bool same = classes.dim() == logits.dim();
  for (int64_t d = 0; same && d + 1 < classes.dim(); ++d) same = classes.size(d) == logits.size(d);
  if (!same) {
    fail(op, ": classes must be [..., K] with the leading dimensions of logits ",
         shape_text(logits), ", got ", shape_text(classes));
  }
  check_same_device(op, "classes", classes, logits, "logits");
}

inline void check_links(const char* op, const char* name, const Tensor& links,
                        const Tensor& logits) {
  if (links.scalar_type() != ScalarType::Int) {
    fail(op, ": ", name, " must be int32, got ", torch::headeronly::toString(links.scalar_type()));
  }
  if (logits.dim() < 2) {
    fail(op, ": logits must be [..., S, V] where links are given, got ", shape_text(logits));
  }
  check_per_row(op, name, links, logits);
}

inline void check_terms(const char* op, const TermInputs& in, bool unscaled) {
  check_inputs(op, in.rows, {}, 0);
  const Tensor& logits = in.rows.logits;
  if (in.classes) check_classes(op, *in.classes, logits);
  if (in.context_before.has_value() != in.ngram_after.has_value()) {
    fail(op, ": links must be a pair (context_before, ngram_after), got one of the two");
  }
  if (in.context_before) {
    check_links(op, "context_before", *in.context_before, logits);
    check_links(op, "ngram_after", *in.ngram_after, logits);
  }
  if (!unscaled && (in.classes || in.context_before)) {
    fail(op, ": classes and links must be None where unscaled is False");
  }
}

// Contiguous copies where the caller's are not.
struct RowInputs {
  Tensor logits;
  std::optional<Tensor> target, mask;

  explicit RowInputs(const CrossEntropyInputs& in)
      : logits(has_contiguous_rows(in.logits) ? in.logits : torch::stable::contiguous(in.logits)),
        target(contiguous(in.target)),
        mask(contiguous(in.mask)) {}

  static std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
    if (!tensor || tensor->is_contiguous()) return tensor;
    return torch::stable::contiguous(*tensor);
  }
};

inline CountedRows counted_rows(const RowInputs& in, int64_t ignore_index, int64_t shift) {
  CountedRows q = counted_rows(in.logits, ignore_index, shift);
  q.target = array_of(in.target);
  q.mask = array_of(in.mask);
  return q;
}

struct TermRowInputs : RowInputs {
  std::optional<Tensor> classes, context_before, ngram_after;

  explicit TermRowInputs(const TermInputs& in)
      : RowInputs(in.rows),
        classes(contiguous(in.classes)),
        context_before(contiguous(in.context_before)),
        ngram_after(contiguous(in.ngram_after)) {}
};

inline TermRows term_rows(const TermRowInputs& in, int64_t ignore_index) {
  TermRows q;
  q.counted = counted_rows(in, ignore_index, 0);
  q.classes = array_of(in.classes);
  q.asked = in.classes ? in.classes->size(in.classes->dim() - 1) : 0;
  if (in.context_before) {
    q.context_before = static_cast<const int32_t*>(in.context_before->const_data_ptr());
    q.ngram_after = static_cast<const int32_t*>(in.ngram_after->const_data_ptr());
  }
  return q;
}

// The results, those that nobody asked for with no elements.
struct TermOutputs {
  Tensor scaled_log_prob, scaled_mean_log_prob, log_prob, entropy, class_log_prob, unlikelihood,
      candidates, sums;
};

// make(sizes, dtype) makes a tensor.
template <class Make>
TermOutputs allocate_terms(const TermInputs& in, bool unscaled, const Make& make) {
  const Tensor& logits = in.rows.logits;
  const ScalarType type = accumulate_type(logits);
  const std::vector<int64_t> rows = row_sizes(logits), none = {0};
  std::vector<int64_t> classes = rows, sums = rows;
  if (in.classes) classes.push_back(in.classes->size(logits.dim() - 1));
  sums.push_back(kTermSums);
  auto empty = [&](bool made, const std::vector<int64_t>& sizes) {
    return make(made ? sizes : none, type);
  };
  const bool linked = in.context_before.has_value();
  return {empty(true, rows),
          empty(true, rows),
          empty(unscaled, rows),
          empty(unscaled, rows),
          empty(in.classes.has_value(), classes),
          empty(linked, rows),
          empty(linked, rows),
          make(sums, ScalarType::Double)};
}

inline TermArrays arrays_of(const TermOutputs& out, const TermInputs& in, bool unscaled) {
  TermArrays a;
  a.scaled_log_prob = array_of(out.scaled_log_prob);
  a.scaled_mean_log_prob = array_of(out.scaled_mean_log_prob);
  if (unscaled) {
    a.log_prob = array_of(out.log_prob);
    a.entropy = array_of(out.entropy);
  }
  if (in.classes) a.class_log_prob = array_of(out.class_log_prob);
  if (in.context_before) {
    a.unlikelihood = array_of(out.unlikelihood);
    a.candidates = array_of(out.candidates);
  }
  return a;
}

// Incoming gradients and the saved sums, contiguous: autograd may hand gradients over expanded, a hook on
// saved tensors the sums.
struct TermGradientInputs {
  std::optional<Tensor> scaled_log_prob, scaled_mean_log_prob, log_prob, entropy, class_log_prob,
      unlikelihood;
  Tensor sums;

  TermGradientInputs(const std::optional<Tensor>& scaled_log_prob,
                     const std::optional<Tensor>& scaled_mean_log_prob,
                     const std::optional<Tensor>& log_prob, const std::optional<Tensor>& entropy,
                     const std::optional<Tensor>& class_log_prob,
                     const std::optional<Tensor>& unlikelihood, const Tensor& sums)
      : scaled_log_prob(RowInputs::contiguous(scaled_log_prob)),
        scaled_mean_log_prob(RowInputs::contiguous(scaled_mean_log_prob)),
        log_prob(RowInputs::contiguous(log_prob)),
        entropy(RowInputs::contiguous(entropy)),
        class_log_prob(RowInputs::contiguous(class_log_prob)),
        unlikelihood(RowInputs::contiguous(unlikelihood)),
        sums(*RowInputs::contiguous(sums)) {}

  TermArrays arrays() const {
    TermArrays a;
    a.scaled_log_prob = array_of(scaled_log_prob);
    a.scaled_mean_log_prob = array_of(scaled_mean_log_prob);
    a.log_prob = array_of(log_prob);
    a.entropy = array_of(entropy);
    a.class_log_prob = array_of(class_log_prob);
    a.unlikelihood = array_of(unlikelihood);
    return a;
  }

  double* read_sums() const { return static_cast<double*>(const_cast<void*>(sums.const_data_ptr())); }
};

inline void check_term_gradients(const char* op, const TermInputs& in, const TermGradientInputs& g) {
  const Tensor& logits = in.rows.logits;
  auto check = [&](const char* name, const std::optional<Tensor>& tensor) {
    if (tensor) check_row_values(op, name, *tensor, logits);
  };
  check("grad_scaled_log_prob", g.scaled_log_prob);
  check("grad_scaled_mean_log_prob", g.scaled_mean_log_prob);
  check("grad_log_prob", g.log_prob);
  check("grad_entropy", g.entropy);
  check("grad_unlikelihood", g.unlikelihood);
  if (g.class_log_prob) {
    check_loss_type(op, "grad_class_log_prob", *g.class_log_prob, logits);
    if (!in.classes) fail(op, ": grad_class_log_prob must be None without classes");
    check_same_shape(op, "grad_class_log_prob", *g.class_log_prob, *in.classes, "classes");
    check_same_device(op, "grad_class_log_prob", *g.class_log_prob, logits, "logits");
  }
  check_row_sums(op, "sums", g.sums, kTermSums, ScalarType::Double, logits);
}

}  // namespace masked_loss_ext
