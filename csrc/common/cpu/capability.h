// SPDX-License-Identifier: BSD-3-Clause
// Which of the instruction-set levels the CPU kernels run at.
#pragma once

namespace masked_loss_ext {

enum class Level { kDefault, kAvx2, kAvx512 };

// The best level of this machine, or the lower one that MASKED_LOSS_EXT_CPU_CAPABILITY
// (default | avx2 | avx512) asks for; std::invalid_argument for any other word. Read once.
Level cpu_level();
const char* level_name(Level level);

// Has this machine instructions for products of bfloat16 (AVX512-BF16, AMX), of float16 (AVX512-FP16)?
struct HalfProducts {
  bool bfloat16, float16;
};
HalfProducts half_products();

// A room's table of kernels at one level. csrc/<room>/cpu/kernels.cpp defines it: that file is compiled
// once per level, with the flags of the level and its name in MASKED_LOSS_EXT_LEVEL. What it includes
// defines only static functions and templates that are always inlined: a function that several objects
// emit for the linker to choose from could come from the one with AVX-512.
template <class Kernels, Level level>
const Kernels& kernels_at();

template <class Kernels>
const Kernels& kernels_of_this_machine() {
  switch (cpu_level()) {
#if defined(__x86_64__)
    case Level::kAvx512: return kernels_at<Kernels, Level::kAvx512>();
    case Level::kAvx2: return kernels_at<Kernels, Level::kAvx2>();
#endif
    default: return kernels_at<Kernels, Level::kDefault>();
  }
}

}  // namespace masked_loss_ext
