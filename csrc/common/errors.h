// SPDX-License-Identifier: BSD-3-Clause
// Errors of the operators in words: "<op>: <argument> must <rule>, got <what>". No PyTorch header.
// std::invalid_argument reaches Python as ValueError. Never throw inside parallel_for: the text is lost.
#pragma once

#include <cstdio>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace masked_loss_ext {

// No stream: in a C++ locale that groups digits 1000 would be 1,000.
inline void append(std::string& text, const std::string& part) { text += part; }

template <class Number, class = std::enable_if_t<std::is_arithmetic_v<Number>>>
void append(std::string& text, Number value) {
  if constexpr (std::is_integral_v<Number>) {
    text += std::to_string(value);
  } else {
    char digits[32];
    std::snprintf(digits, sizeof digits, "%g", double(value));
    text += digits;
  }
}

template <class... Parts>
std::string text_of(const Parts&... parts) {
  std::string text;
  (append(text, parts), ...);
  return text;
}

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  throw std::invalid_argument(text_of(parts...));
}

}  // namespace masked_loss_ext
