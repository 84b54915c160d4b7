// SPDX-License-Identifier: BSD-3-Clause
// repetition_counts and repetition_links, for every device: arguments, checks, results. A Device is Cpu or
// Cuda with count() and link() of rows.
#pragma once

#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "common/layout_builder.h"
#include "common/operator.h"
#include "repetition/formula.h"

namespace masked_loss_ext {

struct TokenArguments {
  const Tensor tokens;
  const std::optional<Tensor> valid;
  const int64_t ngram_size;

  explicit TokenArguments(Arguments& in)
      : tokens(in.tensor()), valid(in.optional_tensor()), ngram_size(in.integer()) {}
};

inline TokenRows checked_rows(const char* op, const TokenArguments& arguments) {
  const auto& [tokens, valid, ngram_size] = arguments;
  check_integer(op, "tokens", tokens, "");
  if (tokens.dim() != 2) fail(op, ": tokens must be [B, S], got ", shape_text(tokens));
  if (tokens.size(1) > kMaxRowLength) {
    fail(op, ": tokens must have at most ", kMaxRowLength, " positions per row, got ",
         shape_text(tokens));
  }
  if (valid) {
    check_mask_type(op, "valid", *valid);
    check_same_shape(op, "valid", *valid, tokens, "tokens");
    check_same_device(op, "valid", *valid, tokens, "tokens");
  }
  check_length(op, "ngram_size", ngram_size, 1, std::numeric_limits<int64_t>::max());
  TokenRows in = {};
  in.tokens = array_of(tokens);
  in.valid = array_of(valid);
  for (int d = 0; d < 2; ++d) {
    in.token_stride[d] = tokens.stride(d);
    in.valid_stride[d] = valid ? valid->stride(d) : 0;
  }
  in.rows = tokens.size(0);
  in.length = tokens.size(1);
  in.ngram = ngram_size > in.length ? in.length + 1 : ngram_size;
  return in;
}

template <class Device>
struct RepetitionCounts {
  const TokenArguments arguments;

  explicit RepetitionCounts(Arguments& in) : arguments(in) {}

  std::tuple<Tensor, Tensor, Tensor, Tensor> run() const {
    constexpr const char* op = "repetition_counts";
    const TokenRows in = checked_rows(op, arguments);
    const typename Device::Scope scope(arguments.tokens);
    const auto one = [&] { return Device::empty(arguments.tokens, {in.rows}, ScalarType::Long); };
    const Tensor pairs = one(), windows = one(), distinct = one(), longest_run = one();
    const CountPointers out = {pairs.mutable_data_ptr<int64_t>(), windows.mutable_data_ptr<int64_t>(),
                               distinct.mutable_data_ptr<int64_t>(),
                               longest_run.mutable_data_ptr<int64_t>()};
    Device::count(op, in, out, arguments.tokens);
    return {pairs, windows, distinct, longest_run};
  }
};

template <class Device>
struct RepetitionLinks {
  const TokenArguments arguments;

  explicit RepetitionLinks(Arguments& in) : arguments(in) {}

  std::tuple<Tensor, Tensor> run() const {
    constexpr const char* op = "repetition_links";
    const TokenRows in = checked_rows(op, arguments);
    const typename Device::Scope scope(arguments.tokens);
    const auto one = [&] { return Device::empty(arguments.tokens, {in.rows, in.length}, ScalarType::Int); };
    const Tensor context_before = one(), ngram_after = one();
    const LinkPointers out = {context_before.mutable_data_ptr<int32_t>(),
                              ngram_after.mutable_data_ptr<int32_t>()};
    Device::link(op, in, out, arguments.tokens);
    return {context_before, ngram_after};
  }
};

template <class Device, class Library>
void register_repetition(Library& m) {
  m.impl("repetition_counts", &boxed<RepetitionCounts<Device>>);
  m.impl("repetition_links", &boxed<RepetitionLinks<Device>>);
}

}  // namespace masked_loss_ext
