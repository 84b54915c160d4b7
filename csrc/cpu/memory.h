// SPDX-License-Identifier: BSD-3-Clause
// Fresh memory for large outputs.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>

namespace masked_loss_ext {

constexpr uintptr_t kHugePage = uintptr_t(2) << 20;

// Asks for huge pages where a freshly allocated output holds any: its first write then faults once per
// 2 MB instead of once per 4 KB, which on a virtual machine costs more than the arithmetic.
inline void advise_huge_pages(void* data, size_t bytes) {
#if defined(MADV_HUGEPAGE)
  const uintptr_t address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (address + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t end = (address + bytes) & ~(kHugePage - 1);
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace masked_loss_ext
