// SPDX-License-Identifier: BSD-3-Clause
// masked_linear_cross_entropy where each of several ranks has a shard of the classifier's rows, for every
// device: as cross_entropy/vocab_parallel.h, with logits made a chunk at a time, in the backward once more.
// Labels are known to all, so all leave out the same rows.
#pragma once

#include "cross_entropy/vocab_parallel.h"
#include "linear_cross_entropy/call.h"

namespace masked_loss_ext {

constexpr const char* kVocabParallelLinear = "vocab_parallel_linear_cross_entropy";

struct LinearShardArguments : LinearArguments {
  static constexpr const char* kBackward = "_vocab_parallel_linear_cross_entropy_backward";

  explicit LinearShardArguments(Arguments& in) : LinearArguments(in) { rows.take_shard(in); }
};

template <class Device>
struct LinearShardSums {
  const LinearShardArguments in;

  explicit LinearShardSums(Arguments& arguments) : in(arguments) {}

  Tensor run() const {
    RowInputs call(kVocabParallelLinear, in.checked(kVocabParallelLinear).rows, in.like());
    const typename Device::Scope scope(in.hidden);
    ShardMessage<Device> message(call.op, in.rows, in.hidden);
    Device::zero(message.tensor());  // where no row counts
    message.head(call.problem);
    LinearRows<Device> rows(in, call, false, false);
    rows.for_each_chunk(call.problem, [&](RowProblem& chunk, int64_t, Tensor&, const Tensor&) {
      chunk.grad_logits = {};
      message.add(chunk);
    });
    return message.tensor();
  }
};

template <class Device>
struct LinearShardResults {
  const LinearShardArguments in;
  const std::optional<Tensor> messages;

  explicit LinearShardResults(Arguments& arguments)
      : in(arguments), messages(arguments.optional_tensor()) {}

  auto run() const {
    RowInputs call(kVocabParallelLinear, in.checked(kVocabParallelLinear).rows, in.like());
    const typename Device::Scope scope(in.hidden);
    const Shards shards = gathered(call.op, in.rows, messages, in.like());
    call.problem.logits.kind = kind_of(in.hidden);  // of the loss
    const auto results = make_row_results<Device>(in.hidden, call.problem, in.rows, [](const Tensor&) {});
    Device::unite(call.op, call.problem, shards, in.hidden);
    return results;
  }
};

template <class Device, class Library>
void register_vocab_parallel_linear(Library& m) {
  m.impl("_vocab_parallel_linear_cross_entropy_sums", &boxed<LinearShardSums<Device>>);
  m.impl("vocab_parallel_linear_cross_entropy", &boxed<LinearShardResults<Device>>);
  m.impl("_vocab_parallel_linear_cross_entropy_backward", &boxed<LinearBackward<Device, LinearShardArguments>>);
}

}  // namespace masked_loss_ext
