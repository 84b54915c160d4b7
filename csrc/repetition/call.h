// SPDX-License-Identifier: BSD-3-Clause
// What the CPU and the CUDA side of the repetition operators do before a kernel runs: check, allocate,
// describe. `Allocate` is (like, sizes, dtype) -> Tensor.
#pragma once

#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "common/layout_builder.h"
#include "repetition/formula.h"

namespace masked_loss_ext {

using CountTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using LinkTensors = std::tuple<Tensor, Tensor>;

inline TokenRows token_rows(const char* op, const Tensor& tokens, const std::optional<Tensor>& valid,
                            int64_t ngram_size) {
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

template <class Allocate>
CountTensors allocate_counts(const Allocate& allocate, const TokenRows& in, const Tensor& like) {
  const std::vector<int64_t> sizes = {in.rows};
  const auto one = [&] { return allocate(like, sizes, ScalarType::Long); };
  return {one(), one(), one(), one()};
}

inline CountPointers pointers_of(const CountTensors& t) {
  return {std::get<0>(t).mutable_data_ptr<int64_t>(), std::get<1>(t).mutable_data_ptr<int64_t>(),
          std::get<2>(t).mutable_data_ptr<int64_t>(), std::get<3>(t).mutable_data_ptr<int64_t>()};
}

template <class Allocate>
LinkTensors allocate_links(const Allocate& allocate, const TokenRows& in, const Tensor& like) {
  const std::vector<int64_t> sizes = {in.rows, in.length};
  const auto one = [&] { return allocate(like, sizes, ScalarType::Int); };
  return {one(), one()};
}

inline LinkPointers pointers_of(const LinkTensors& t) {
  return {std::get<0>(t).mutable_data_ptr<int32_t>(), std::get<1>(t).mutable_data_ptr<int32_t>()};
}

}  // namespace masked_loss_ext
