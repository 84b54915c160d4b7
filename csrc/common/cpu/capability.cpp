// SPDX-License-Identifier: BSD-3-Clause
#include "common/cpu/capability.h"

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

Level cpu_level() {
  static const Level level = chosen_level();
  return level;
}

}  // namespace masked_loss_ext
