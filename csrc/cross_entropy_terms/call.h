// SPDX-License-Identifier: BSD-3-Clause
// cross_entropy_terms and its backward, for every device: arguments, checks, results. A Device is Cpu or
// Cuda with forward() and backward() of a RowProblem and its TermRows.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "common/operator.h"
#include "cross_entropy/call.h"
#include "cross_entropy_terms/formula.h"

namespace masked_loss_ext {

// Rows are given, checked and read as masked_cross_entropy does.
struct TermArguments : CrossEntropyInputs {
  std::optional<Tensor> classes, context_before, ngram_after;

  explicit TermArguments(Arguments& in)
      : CrossEntropyInputs{in.tensor(), in.tensor(), in.optional_tensor(), {}, {}, {}, in.optional_tensor(),
                           {}},
        classes(in.optional_tensor()),
        context_before(in.optional_tensor()),
        ngram_after(in.optional_tensor()) {}

  // Before what the rows of masked_cross_entropy may have is read.
  const TermArguments& with_one_temperature(const char* op) const {
    check_logits(op, logits);
    check_number(op, "temperature", temperature, logits);
    return *this;
  }

  void check(const char* op) const {
    if (classes) check_classes(op);
    if (context_before.has_value() != ngram_after.has_value()) {
      fail(op, ": links must be a pair (context_before, ngram_after), got one of the two");
    }
    if (context_before) {
      check_links(op, "context_before", *context_before);
      check_links(op, "ngram_after", *ngram_after);
    }
  }

 private:
  void check_classes(const char* op) const {
    check_integer(op, "classes", *classes, "");
    bool same = classes->dim() == logits.dim();
    for (int64_t d = 0; same && d + 1 < logits.dim(); ++d) same = classes->size(d) == logits.size(d);
    if (!same) {
      fail(op, ": classes must be [..., K] with the leading dimensions of logits ", shape_text(logits),
           ", got ", shape_text(*classes));
    }
    check_same_device(op, "classes", *classes, logits, "logits");
  }

  void check_links(const char* op, const char* name, const Tensor& links) const {
    const ScalarType type = type_of(op, name, links);
    if (type != ScalarType::Int) {
      fail(op, ": ", name, " must be int32, got ", torch::headeronly::toString(type));
    }
    if (logits.dim() < 2) {
      fail(op, ": logits must be [..., S, V] where links are given, got ", shape_text(logits));
    }
    check_per_row(op, name, links, logits);
  }
};

struct TermCall : RowCall {
  TermRows terms;

  TermCall(const char* name, const TermArguments& in, int64_t ignore_index)
      : RowCall(name, in.with_one_temperature(name), ignore_index, 0) {
    in.check(name);
    terms.counted = problem.counted;
    terms.classes = read(in.classes);
    terms.asked = in.classes ? in.classes->size(in.classes->dim() - 1) : 0;
    terms.context_before = static_cast<const int32_t*>(read(in.context_before).data);
    terms.ngram_after = static_cast<const int32_t*>(read(in.ngram_after).data);
  }
};

template <class Device>
struct TermsForward {
  const TermArguments in;
  const int64_t ignore_index;
  const bool unscaled;

  explicit TermsForward(Arguments& arguments)
      : in(arguments), ignore_index(arguments.integer()), unscaled(arguments.flag()) {}

  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> run() const {
    TermCall call("cross_entropy_terms", in, ignore_index);
    const bool asked = in.classes.has_value(), linked = in.context_before.has_value();
    if (!unscaled && (asked || linked)) {
      fail(call.op, ": classes and links must be None where unscaled is False");
    }
    const typename Device::Scope scope(in.logits);
    TermArrays& a = call.terms.terms;
    const std::vector<int64_t> rows = row_sizes(in.logits);
    const auto make = [&](Array& place, bool made, const std::vector<int64_t>& sizes) {
      return make_result<Device>(in.logits, place, made, sizes, accumulate_type(in.logits));
    };
    const Tensor scaled_log_prob = make(a.scaled_log_prob, true, rows);
    const Tensor scaled_mean_log_prob = make(a.scaled_mean_log_prob, true, rows);
    const Tensor log_prob = make(a.log_prob, unscaled, rows);
    const Tensor entropy = make(a.entropy, unscaled, rows);
    const Tensor class_log_prob = make(a.class_log_prob, asked, row_sizes(in.logits, call.terms.asked));
    const Tensor unlikelihood = make(a.unlikelihood, linked, rows);
    const Tensor candidates = make(a.candidates, linked, rows);
    const Tensor sums =
        Device::empty(in.logits, row_sizes(in.logits, kTermSums), ScalarType::Double);
    call.terms.sums = sums.mutable_data_ptr<double>();
    call.set_layout(nullptr);
    Device::forward(call.op, call.problem, call.terms, in.logits);
    return {scaled_log_prob, scaled_mean_log_prob, log_prob,   entropy,
            class_log_prob,  unlikelihood,         candidates, sums};
  }
};

template <class Device>
struct TermsBackward {
  const std::optional<Tensor> grad_scaled_log_prob, grad_scaled_mean_log_prob, grad_log_prob, grad_entropy,
      grad_class_log_prob, grad_unlikelihood;
  const TermArguments in;
  const Tensor sums;
  const int64_t ignore_index;

  explicit TermsBackward(Arguments& arguments)
      : grad_scaled_log_prob(arguments.optional_tensor()),
        grad_scaled_mean_log_prob(arguments.optional_tensor()),
        grad_log_prob(arguments.optional_tensor()),
        grad_entropy(arguments.optional_tensor()),
        grad_class_log_prob(arguments.optional_tensor()),
        grad_unlikelihood(arguments.optional_tensor()),
        in(arguments),
        sums(arguments.tensor()),
        ignore_index(arguments.integer()) {}

  Tensor run() const {
    TermCall call("_cross_entropy_terms_backward", in, ignore_index);
    const typename Device::Scope scope(in.logits);
    put_gradients(call);
    check_row_sums(call.op, "sums", sums, kTermSums, ScalarType::Double, in.logits);
    call.terms.sums = static_cast<double*>(call.read(sums).data);
    const Tensor grad_logits =
        Device::empty(in.logits, row_sizes(in.logits, call.terms.counted.classes), in.logits.scalar_type());
    call.set_layout(&grad_logits);
    Device::backward(call.op, call.problem, call.terms, in.logits);
    return grad_logits;
  }

 private:
  void put_gradients(TermCall& call) const {
    TermArrays& g = call.terms.terms;
    const auto put = [&](Array& place, const char* name, const std::optional<Tensor>& gradient) {
      if (gradient) check_row_values(call.op, name, *gradient, in.logits);
      place = call.read(gradient);
    };
    put(g.scaled_log_prob, "grad_scaled_log_prob", grad_scaled_log_prob);
    put(g.scaled_mean_log_prob, "grad_scaled_mean_log_prob", grad_scaled_mean_log_prob);
    put(g.log_prob, "grad_log_prob", grad_log_prob);
    put(g.entropy, "grad_entropy", grad_entropy);
    put(g.unlikelihood, "grad_unlikelihood", grad_unlikelihood);
    if (!grad_class_log_prob) return;
    constexpr const char* name = "grad_class_log_prob";
    check_loss_type(call.op, name, *grad_class_log_prob, in.logits);
    if (!in.classes) fail(call.op, ": ", name, " must be None without classes");
    check_same_shape(call.op, name, *grad_class_log_prob, *in.classes, "classes");
    check_same_device(call.op, name, *grad_class_log_prob, in.logits, "logits");
    g.class_log_prob = call.read(grad_class_log_prob);
  }
};

template <class Device, class Library>
void register_terms(Library& m) {
  m.impl("cross_entropy_terms", &boxed<TermsForward<Device>>);
  m.impl("_cross_entropy_terms_backward", &boxed<TermsBackward<Device>>);
}

}  // namespace masked_loss_ext
