// SPDX-License-Identifier: BSD-3-Clause
// How an operator meets PyTorch's dispatcher, for every device and every room.
//
// A call is a struct: its constructor takes the arguments in the order of the schema, and refuses none
// (what has not been taken yet would be lost); run() checks them, allocates and computes. So arguments
// that several operators share are a struct with such a constructor, named once, and a keyword is a field.
//
//   template <class Device>
//   struct Squares {
//     const Tensor x; const double scale;
//     explicit Squares(Arguments& in) : x(in.tensor()), scale(in.number()) {}
//     const Tensor& like() const { return x; }        // on whose device it runs
//     std::tuple<Tensor, Tensor> run() const;         // or Tensor, or void
//   };
//   m.impl("squares", &boxed<Squares<Cpu>>);
//
// TORCH_BOX is not used: it knows one C++ argument per argument of the schema, and up to PyTorch 2.13
// loses some 50 bytes of memory for each string of each call.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <type_traits>

namespace masked_loss_ext {

// The arguments of one call, taken from first to last.
class Arguments {
 public:
  Arguments(StableIValue* stack, uint64_t count) : next_(stack), end_(stack + count) {}

  torch::stable::Tensor tensor() { return take<torch::stable::Tensor>(); }
  std::optional<torch::stable::Tensor> optional_tensor() {
    return take<std::optional<torch::stable::Tensor>>();
  }
  double number() { return take<double>(); }
  int64_t integer() { return take<int64_t>(); }
  std::optional<int64_t> optional_integer() { return take<std::optional<int64_t>>(); }
  bool flag() { return take<bool>(); }
  std::string text() {
    const auto handle = take<StringHandle>();
    size_t length = 0;
    const char* data = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    std::string result(data, length);
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return result;
  }

  bool all_taken() const { return next_ == end_; }

 private:
  template <class T>
  T take() {
    // A schema with fewer arguments than its call is a mistake in this library.
    STD_TORCH_CHECK(next_ < end_, "masked_loss_ext: a call takes more arguments than its schema has");
    return torch::stable::detail::to<T>(*next_++);
  }

  StableIValue* next_;
  StableIValue* const end_;
};

template <class Result>
void put_results(StableIValue* stack, const Result& result) {
  stack[0] = torch::stable::detail::from(result);
}

template <class... Results>
void put_results(StableIValue* stack, const std::tuple<Results...>& results) {
  std::apply(
      [&](const auto&... result) { ((*stack++ = torch::stable::detail::from(result)), ...); },
      results);
}

// What the dispatcher calls.
template <class Call>
void boxed(StableIValue* stack, uint64_t num_args, uint64_t) {
  Arguments arguments(stack, num_args);
  const Call call(arguments);
  STD_TORCH_CHECK(arguments.all_taken(), "masked_loss_ext: a call takes fewer arguments than its schema has");
  if constexpr (std::is_void_v<decltype(call.run())>) {
    call.run();
  } else {
    put_results(stack, call.run());
  }
}

}  // namespace masked_loss_ext
