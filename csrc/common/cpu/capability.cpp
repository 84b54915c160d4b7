// SPDX-License-Identifier: BSD-3-Clause
#include "common/cpu/capability.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>

namespace masked_loss_ext {
namespace {

Level machine_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512) return Level::kAvx512;
  if (avx2) return Level::kAvx2;
#endif
  return Level::kDefault;
}

// From the bits themselves: __builtin_cpu_supports knows them by name in gcc 12, not in 11, nor in clang 16.
HalfProducts half_products_of_machine() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx512f")) return {false, false};  // or the system keeps no such state
  unsigned a = 0, b = 0, c = 0, d = 0, more = 0, state = 0, upper = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return {false, false};
  const bool fp16 = d >> 23 & 1, amx_bf16 = d >> 22 & 1;
  if (a >= 1) __get_cpuid_count(7, 1, &more, &b, &c, &d);
  const bool avx512_bf16 = more >> 5 & 1;
  __asm__("xgetbv" : "=a"(state), "=d"(upper) : "c"(0));
  const bool keeps_tiles = (state >> 17 & 3) == 3;
  return {avx512_bf16 || (amx_bf16 && keeps_tiles), fp16};
#else
  return {false, false};
#endif
}

Level chosen_level() {
  const Level best = machine_level();
  const char* asked = std::getenv("MASKED_LOSS_EXT_CPU_CAPABILITY");
  if (asked == nullptr || *asked == 0) return best;
  for (Level level : {Level::kDefault, Level::kAvx2, Level::kAvx512}) {
    if (std::strcmp(asked, level_name(level)) == 0) return level < best ? level : best;
  }
  throw std::invalid_argument(
      "MASKED_LOSS_EXT_CPU_CAPABILITY must be avx512, avx2 or default, got '" +
      std::string(asked) + "'");
}

}  // namespace

const char* level_name(Level level) {
  switch (level) {
    case Level::kAvx512: return "avx512";
    case Level::kAvx2: return "avx2";
    default: return "default";
  }
}

HalfProducts half_products() {
  static const HalfProducts found = half_products_of_machine();  // asking takes long on virtual machines
  return found;
}

Level cpu_level() {
  static const Level level = chosen_level();
  return level;
}

}  // namespace masked_loss_ext
