// SPDX-License-Identifier: BSD-3-Clause
// masked_cross_entropy of logits = hidden weight^T + bias, never made as a whole, for every device: arguments,
// checks, results, and the loop over chunks of the rows that count.
//
// Rows that do not count are left out before the first product. A chunk's logits lie in one buffer, over
// which the cross entropy writes their gradient; three products (ATen's) do the rest:
//   logits = H W^T (+ bias)     dH = G W     dW += G^T H     dbias += sum of G
// For K rows of D numbers and V classes the sweep takes 6 K D V operations; where what comes in is not known
// before (reduction none, statistics) the backward makes the logits again, 8 K D V, of rows alone into which
// anything flows.
//
// A Device has, besides Scope and empty(),
//   KeptRows kept_rows(op, problem, like, num_valid, receiving)   which rows take part, in order; with
//                                receiving those into which anything flows alone
//   take_rows(problem, hidden, kept, out), put_rows(rows, kept, out)   [N, D] to [K, D] and back
//   zero(tensor)
//   Losses(op, problem, like)    count(), forward(chunk), sweep(chunk), finish(): the passes of a call
//   backward(op, chunk, like)
//   Products(arguments)          the products, with their buffers, and the type and number of the logits
// A row whose place is negative (see place_of()) has hidden states of 0, and gives none.
#pragma once

#include "cross_entropy/call.h"
#include "linear_cross_entropy/flow.h"

namespace masked_loss_ext {

// In the order of the schema.
struct LinearArguments {
  static constexpr const char* kBackward = "_linear_cross_entropy_backward";

  const Tensor hidden, linear_weight;
  const std::optional<Tensor> bias;
  RowArguments rows;
  const std::optional<int64_t> chunk_rows, num_valid;
  const bool fp32_logits;

  explicit LinearArguments(Arguments& in)
      : hidden(in.tensor()),
        linear_weight(in.tensor()),
        bias(in.optional_tensor()),
        rows(hidden, in),
        chunk_rows(in.optional_integer()),
        num_valid(in.optional_integer()),
        fp32_logits(in.flag()) {}

  int64_t width() const { return hidden.size(hidden.dim() - 1); }
  // At hand: a shard's own. Asked for while the checks run, as a call's arguments are evaluated in any order.
  int64_t classes() const { return linear_weight.dim() > 0 ? linear_weight.size(0) : 0; }
  RowLike like() const { return {hidden, classes(), rows.shard}; }

  const LinearArguments& checked(const char* op) const {
    check_floating(op, "hidden", hidden);
    if (hidden.dim() == 0) fail(op, ": hidden must be [..., D], got ", shape_text(hidden));
    if (hidden.dim() > kTorchDims) {
      fail(op, ": hidden must have at most ", kTorchDims, " dimensions, got ", hidden.dim());
    }
    check_floating(op, "weight", linear_weight);
    const Tensor& w = linear_weight;
    if (w.dim() != 2 || (!rows.shard && w.size(0) == 0) || w.size(1) != width()) {
      fail(op, ": weight must be [V, D] with ", rows.shard ? "" : "at least one class and ",
           "the D of hidden ", shape_text(hidden), ", got ", shape_text(w));
    }
    check_shard(op, rows.shard, w.size(0));
    check_as_hidden(op, "weight", w);
    if (bias) {
      check_floating(op, "bias", *bias);
      if (bias->dim() != 1 || bias->size(0) != classes()) {
        fail(op, ": bias must have one entry per class [", classes(), "], got ", shape_text(*bias));
      }
      check_as_hidden(op, "bias", *bias);
    }
    if (chunk_rows) check_length(op, "chunk_rows", *chunk_rows, 1);
    if (num_valid) check_length(op, "num_valid", *num_valid);
    check_rows(op, rows, like());
    return *this;
  }

 private:
  void check_as_hidden(const char* op, const char* name, const Tensor& tensor) const {
    if (tensor.scalar_type() != hidden.scalar_type()) {
      fail(op, ": ", name, " must have the dtype of hidden, ",
           torch::headeronly::toString(hidden.scalar_type()), ", got ",
           torch::headeronly::toString(tensor.scalar_type()));
    }
    check_same_device(op, name, tensor, hidden, "hidden");
  }
};

// The rows that take part, in order; `count` of them at the most.
struct KeptRows {
  Tensor index;  // [count] int64 or more, as CountedRows::index
  int64_t count = 0;
  bool exact = true;  // none of them is negative
};

// Rows at a time: what fits into the budget, at least so many, cut evenly, a multiple of 16.
inline int64_t rows_per_chunk(int64_t rows, int64_t classes, int64_t element, int64_t budget, int64_t least) {
  constexpr int64_t kMultiple = 16;
  const int64_t row = element * std::max<int64_t>(classes, 1);  // a shard may have none
  const int64_t most = std::max(budget / row / kMultiple * kMultiple, least);
  const int64_t chunks = std::max<int64_t>((rows + most - 1) / most, 1);
  const int64_t even = (rows + chunks - 1) / chunks;
  return std::max<int64_t>((even + kMultiple - 1) / kMultiple * kMultiple, 1);
}

// One chunk of all rows needs no float32 sum of the gradient of a half weight, 4 V D bytes, and takes one
// product without additions: where its logits, of so many bytes, take less than that it is smaller and faster.
inline bool is_smaller_in_one(int64_t rows, int64_t chunk, int64_t logit, int64_t width) {
  return rows * logit <= chunk * logit + 4 * width;
}

// The rows of one call that take part, with their hidden states side by side, and the buffer for the logits
// of a chunk of them.
template <class Device>
class LinearRows {
 public:
  // sums_weight: the gradient of the weight is wanted.
  LinearRows(const LinearArguments& in, RowInputs& call, bool receiving, bool sums_weight)
      : in_(in), products_(in) {
    RowProblem& q = call.problem;
    kept_ = Device::kept_rows(call.op, q, in.hidden, in.num_valid, receiving);
    // In place where all rows take part, and each is one stretch of memory beside the last.
    whole_ = kept_.exact && kept_.count == q.counted.rows && in.hidden.is_contiguous();
    chunk_ = in.chunk_rows ? std::min(*in.chunk_rows, std::max<int64_t>(kept_.count, 1))
                           : products_.rows_at_a_time(kept_.count, sums_weight);
    if (whole_) {
      hidden_ = torch::stable::view(in.hidden, {kept_.count, in.width()});
    } else {
      hidden_ = Device::empty(in.hidden, {kept_.count, in.width()}, in.hidden.scalar_type());
      Device::take_rows(call.op, in.hidden, kept_, hidden_);
    }
    q.counted.rows = kept_.count;
    q.counted.index = array_of(kept_.index);
    logits_ = Device::empty(in.hidden, {std::min(chunk_, kept_.count), in.classes()},
                            products_.logits_type());
    q.logits.kind = kind_of(logits_);  // by which the passes know the type of the loss
  }

  int64_t count() const { return kept_.count; }
  bool is_one_chunk() const { return kept_.count <= chunk_; }

  // f(chunk's problem, its first row, its logits [n, V], its hidden states [n, D]). The gradient of the
  // logits is to be written over them.
  template <class F>
  void for_each_chunk(const RowProblem& all, const F& f) {
    for (int64_t first = 0; first < kept_.count; first += chunk_) {
      const int64_t rows = std::min(chunk_, kept_.count - first);
      Tensor logits = torch::stable::narrow(logits_, 0, 0, rows);
      const Tensor hidden = torch::stable::narrow(hidden_, 0, first, rows);
      if (in_.classes() > 0) products_.logits(hidden, logits);
      RowProblem q = all;
      q.counted.rows = rows;
      q.counted.index.data = static_cast<int64_t*>(all.counted.index.data) + first;
      q.logits = q.grad_logits = array_of(logits);
      q.layout = {};
      q.layout.cols = rows;
      q.layout.col_stride[kPrediction] = q.layout.col_stride[kGrad] = in_.classes();
      f(q, first, logits, hidden);
    }
  }

  typename Device::Products& products() { return products_; }

  // Where the gradient of the kept rows' hidden states is to be written, [K, D].
  Tensor rows_of(const Tensor& grad_hidden) const {
    if (whole_) return torch::stable::view(grad_hidden, {kept_.count, in_.width()});
    return Device::empty(grad_hidden, {kept_.count, in_.width()}, grad_hidden.scalar_type());
  }

  // From there to the gradient of all; 0 elsewhere.
  void put_rows(const char* op, const Tensor& rows, const Tensor& grad_hidden) const {
    if (!whole_) Device::put_rows(op, rows, kept_, grad_hidden);
  }

 private:
  const LinearArguments& in_;
  KeptRows kept_;
  bool whole_ = false;
  int64_t chunk_ = 1;
  Tensor hidden_, logits_;
  typename Device::Products products_;
};

// Which gradients are wanted, and the places for them.
template <class Device>
struct LinearGradients {
  const LinearArguments& in;
  const bool of_hidden, of_weight, of_bias, of_token_weight;
  Tensor hidden, weight, bias, token_weight;

  LinearGradients(const LinearArguments& arguments, bool needs_hidden, bool needs_weight, bool needs_bias,
                  bool needs_token_weight)
      : in(arguments),
        of_hidden(needs_hidden),
        of_weight(needs_weight),
        of_bias(needs_bias && in.bias),
        of_token_weight(needs_token_weight && in.rows.token_weight && in.rows.target),
        hidden(make(of_hidden, row_sizes(in.hidden, in.width()), in.hidden.scalar_type())),
        weight(make(of_weight, {in.classes(), in.width()}, in.hidden.scalar_type())),
        bias(make(of_bias, {in.classes()}, in.hidden.scalar_type())),
        token_weight(make(of_token_weight, row_sizes(in.hidden), accumulate_type(in.hidden))) {
    if (of_token_weight) Device::zero(token_weight);
  }

  bool of_logits() const { return of_hidden || of_weight || of_bias; }

  // pass(chunk's problem, its first row) leaves the gradient of the logits in their place.
  template <class Pass>
  void run(const RowInputs& call, LinearRows<Device>& rows, const Pass& pass) {
    RowProblem all = call.problem;
    if (of_token_weight) all.grad_token_weight = array_of(token_weight);
    const Tensor hidden_rows = of_hidden ? rows.rows_of(hidden) : hidden;
    auto& products = rows.products();
    if (of_weight) products.begin_weight(weight, rows.is_one_chunk());
    if (of_bias) products.begin_bias(bias);
    rows.for_each_chunk(all, [&](RowProblem& q, int64_t first, Tensor& logits, const Tensor& h) {
      pass(q, first);
      if (!of_logits()) return;
      const Tensor g = products.gradient_of(logits);
      if (of_hidden) {
        Tensor out = hidden_rows;
        out = torch::stable::narrow(out, 0, first, h.size(0));
        in.classes() > 0 ? products.add_hidden(g, out) : Device::zero(out);
      }
      if (in.classes() == 0) return;
      if (of_weight) products.add_weight(g, h);
      if (of_bias) products.add_bias(g);
    });
    if (of_weight) products.end_weight();
    if (of_bias) products.end_bias();
    if (of_hidden) rows.put_rows(call.op, hidden_rows, hidden);
  }

 private:
  Tensor make(bool wanted, const std::vector<int64_t>& sizes, ScalarType type) const {
    return Device::empty(in.hidden, wanted ? sizes : std::vector<int64_t>{0}, type);
  }
};

// --- the operators --------------------------------------------------------------------------------------

template <class Device>
struct LinearForward {
  const LinearArguments in;

  explicit LinearForward(Arguments& arguments) : in(arguments) {}

  auto run() const {
    constexpr const char* op = "masked_linear_cross_entropy";
    RowInputs call(op, in.checked(op).rows, in.like());
    const typename Device::Scope scope(in.hidden);
    RowProblem& q = call.problem;
    const auto results = make_row_results<Device>(in.hidden, q, in.rows, Device::zero);  // where none counts
    LinearRows<Device> taking_part(in, call, false, false);
    typename Device::Losses losses(op, q, in.hidden);
    taking_part.for_each_chunk(q, [&](RowProblem& chunk, int64_t first, Tensor&, const Tensor&) {
      chunk.grad_logits = {};
      losses.forward(chunk, first);
    });
    losses.finish();
    return results;
  }
};

template <class Device, class Inputs = LinearArguments>
struct LinearBackward {
  const RowGradientArguments gradients;
  const Inputs in;
  const bool needs_hidden, needs_weight, needs_bias, needs_token_weight;

  explicit LinearBackward(Arguments& arguments)
      : gradients(arguments),
        in(arguments),
        needs_hidden(arguments.flag()),
        needs_weight(arguments.flag()),
        needs_bias(arguments.flag()),
        needs_token_weight(arguments.flag()) {}

  std::tuple<Tensor, Tensor, Tensor, Tensor> run() const {
    constexpr const char* op = Inputs::kBackward;
    RowInputs call(op, in.checked(op).rows, in.like());
    gradients.put(call, in.like());
    const typename Device::Scope scope(in.hidden);
    LinearGradients<Device> out(in, needs_hidden, needs_weight, needs_bias, needs_token_weight);
    LinearRows<Device> rows(in, call, true, out.of_weight);
    out.run(call, rows, [&](RowProblem& q, int64_t) {
      if (!out.of_logits()) q.grad_logits = {};
      Device::backward(op, q, in.hidden);
    });
    return {out.hidden, out.weight, out.bias, out.token_weight};
  }
};

// The loss, and its gradients for an incoming gradient of 1; reduction mean or sum.
template <class Device>
struct LinearSweep {
  const LinearArguments in;
  const bool needs_hidden, needs_weight, needs_bias, needs_token_weight;

  explicit LinearSweep(Arguments& arguments)
      : in(arguments),
        needs_hidden(arguments.flag()),
        needs_weight(arguments.flag()),
        needs_bias(arguments.flag()),
        needs_token_weight(arguments.flag()) {}

  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> run() const {
    constexpr const char* op = "masked_linear_cross_entropy";
    RowInputs call(op, in.checked(op).rows, in.like());
    RowProblem& q = call.problem;
    if (!in.rows.target) fail(op, ": target must be given for a gradient");
    if (q.reduction == RowReduction::kNone) {
      fail(op, ": reduction must be mean or sum for a sweep, got ", in.rows.reduction);
    }
    const typename Device::Scope scope(in.hidden);
    q.statistics = false;
    const Tensor loss = make_result<Device>(in.hidden, q.loss, true, {}, accumulate_type(in.hidden));
    const Tensor totals = make_result<Device>(in.hidden, q.totals, true, {2}, ScalarType::Double);
    LinearGradients<Device> out(in, needs_hidden, needs_weight, needs_bias, needs_token_weight);
    LinearRows<Device> rows(in, call, false, out.of_weight);
    typename Device::Losses losses(op, q, in.hidden);
    losses.count();
    out.run(call, rows, [&](const RowProblem& chunk, int64_t first) { losses.sweep(chunk, first); });
    losses.finish();
    return {loss, out.hidden, out.weight, out.bias, out.token_weight};
  }
};

template <class Device, class Library>
void register_linear(Library& m) {
  m.impl("linear_cross_entropy", &boxed<LinearForward<Device>>);
  m.impl("_linear_cross_entropy_backward", &boxed<LinearBackward<Device>>);
  m.impl("_linear_cross_entropy_sweep", &boxed<LinearSweep<Device>>);
}

}  // namespace masked_loss_ext
