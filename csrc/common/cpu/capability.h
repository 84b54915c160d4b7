// SPDX-License-Identifier: BSD-3-Clause
// Which of the instruction-set levels the CPU kernels run at.
#pragma once

namespace masked_loss_ext {

enum class Level { kDefault, kAvx2, kAvx512 };

// The best level of this machine, or the lower one that MASKED_LOSS_EXT_CPU_CAPABILITY
// (default | avx2 | avx512) asks for; std::invalid_argument for any other word. Read once.
Level cpu_level();
const char* level_name(Level level);

}  // namespace masked_loss_ext
