// SPDX-License-Identifier: BSD-3-Clause
// masked_cross_entropy where each of several ranks has a shard of the vocabulary, for every device: two
// operators around the one message of the ranks (shards.h), which the caller gathers. The first reads the
// logits at hand, the second none. The backward of a shard needs no message: RowBackward.
//
// Device::shard(op, problem, format, message, like) writes what the rows at hand come to, each at its place;
// Device::head(op, problem, header, place, like) the header, with the numbers that only the device may know;
// Device::unite(op, problem, shards, like) makes the results of all.
#pragma once

#include <string>

#include "cross_entropy/call.h"
#include "cross_entropy/shards.h"

namespace masked_loss_ext {

inline ShardFormat format_of(const RowArguments& in) {
  return {in.statistics, in.smooths() && in.target.has_value()};
}

// A number of what must be the same on all ranks and is known on the host (FNV-1a, of which a double holds
// 52 bits). What the tensors hold is not looked at.
class KeywordsHash {
 public:
  explicit KeywordsHash(const RowArguments& in, const Tensor& like) {
    static_assert(sizeof(CrossEntropyOptions) % sizeof(double) == 0);  // no bytes between numbers
    add(options_of(in));
    for (int64_t number : {in.ignore_index, in.shift, int64_t{in.statistics}, row_count(like),
                           static_cast<int64_t>(accumulate_type(like))}) {
      add(number);
    }
    add(in.temperature && in.temperature->dim() > 0);
    add(like.dim() > 1 ? like.size(like.dim() - 2) : 0);  // where a shift ends
    for (const auto* tensor : {&in.target, &in.mask, &in.weight, &in.token_weight, &in.segment_ids,
                               &in.temperature, &in.normalizer}) {
      add(tensor->has_value());
    }
    for (char letter : in.reduction) add(letter);
  }

  double value() const { return static_cast<double>(hash_ >> 12); }

 private:
  template <class T>
  void add(const T& value) {
    unsigned char bytes[sizeof(T)];
    memcpy(bytes, &value, sizeof(T));
    for (unsigned char byte : bytes) hash_ = (hash_ ^ byte) * 1099511628211u;
  }

  uint64_t hash_ = 14695981039346656037u;
};

// What a shard tells the others, to be filled.
template <class Device>
class ShardMessage {
 public:
  ShardMessage(const char* op, const RowArguments& in, const Tensor& like)
      : op_(op),
        in_(in),
        like_(like),
        format_(format_of(in)),
        head_(row_count(like) * numbers_of(format_)),
        message_(Device::empty(like, {head_ + kHeaderNumbers}, ScalarType::Double)) {}

  const Tensor& tensor() const { return message_; }
  void add(const RowProblem& rows) { Device::shard(op_, rows, format_, data(), like_); }
  void head(const RowProblem& q) {
    const CountedRows& c = q.counted;
    const ShardHeader header = {double(c.first), double(c.columns), double(c.classes),
                                KeywordsHash(in_, like_).value(), 1, 1};
    Device::head(op_, q, header, data() + head_, like_);
  }

 private:
  double* data() { return static_cast<double*>(message_.mutable_data_ptr()); }

  const char* const op_;
  const RowArguments& in_;
  const Tensor& like_;
  const ShardFormat format_;
  const int64_t head_;
  Tensor message_;
};

// The messages of all ranks, checked for their shape.
inline Shards gathered(const char* op, const RowArguments& in, const std::optional<Tensor>& messages,
                       const RowLike& rows) {
  if (!messages) fail(op, ": messages must be given");
  Shards shards;
  shards.format = format_of(in);
  shards.rows = row_count(rows.like);
  const ScalarType type = type_of(op, "messages", *messages);
  const bool fits = type == ScalarType::Double && messages->dim() == 2 &&
                    messages->size(0) > 0 && messages->size(1) == stride_of(shards) &&
                    messages->is_contiguous();
  if (!fits) {
    fail(op, ": messages must be what all ranks have made, float64 [ranks, ", stride_of(shards), "], got ",
         torch::headeronly::toString(type), " ", shape_text(*messages));
  }
  check_same_device(op, "messages", *messages, rows.like, rows.name);
  shards.messages = static_cast<const double*>(messages->const_data_ptr());
  shards.count = messages->size(0);
  return shards;
}

// --- the operators ------------------------------------------------------------------------------------

constexpr const char* kVocabParallel = "vocab_parallel_cross_entropy";

template <class Device>
struct ShardSums {
  const ShardArguments in;

  explicit ShardSums(Arguments& arguments) : in(arguments) {}

  Tensor run() const {
    RowCall call(kVocabParallel, in);
    const typename Device::Scope scope(in.logits);
    call.set_layout(nullptr);
    ShardMessage<Device> message(call.op, in, in.logits);
    message.add(call.problem);
    message.head(call.problem);
    return message.tensor();
  }
};

template <class Device>
struct ShardResults {
  const ShardArguments in;
  const std::optional<Tensor> messages;

  explicit ShardResults(Arguments& arguments) : in(arguments), messages(arguments.optional_tensor()) {}

  auto run() const {
    RowCall call(kVocabParallel, in);
    const typename Device::Scope scope(in.logits);
    const Shards shards = gathered(call.op, in, messages, in.like());
    const auto results = make_row_results<Device>(in.logits, call.problem, in, [](const Tensor&) {});
    Device::unite(call.op, call.problem, shards, in.logits);
    return results;
  }
};

template <class Device, class Library>
void register_vocab_parallel_forward(Library& m) {
  m.impl("_vocab_parallel_cross_entropy_sums", &boxed<ShardSums<Device>>);
  m.impl("vocab_parallel_cross_entropy", &boxed<ShardResults<Device>>);
}

template <class Device, class Library>
void register_vocab_parallel_backward(Library& m) {
  m.impl("_vocab_parallel_cross_entropy_backward", &boxed<RowBackward<Device, false, ShardArguments>>);
  m.impl("_vocab_parallel_cross_entropy_backward_", &boxed<RowBackward<Device, true, ShardArguments>>);
}

}  // namespace masked_loss_ext
