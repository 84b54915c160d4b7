// SPDX-License-Identifier: BSD-3-Clause
// Fresh memory for large outputs.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "common/array.h"

namespace masked_loss_ext {

constexpr uintptr_t kHugePage = uintptr_t(2) << 20;
// Bytes. The C library soon keeps smaller blocks to itself, so that their pages are warm, and then asking
// costs more than it brings.
constexpr size_t kLargeOutput = size_t(16) << 20;

// Asks for huge pages where a freshly allocated output holds any: its first write then faults once per
// 2 MB instead of once per 4 KB, which on a virtual machine costs more than the arithmetic.
inline void advise_huge_pages(void* data, size_t bytes) {
#if defined(MADV_HUGEPAGE)
  if (bytes < kLargeOutput) return;
  const uintptr_t address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (address + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t end = (address + bytes) & ~(kHugePage - 1);
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

// The pages of a freshly allocated output that nobody has ever touched, all or none: they read as 0, so
// rows that the mask drops need not be written there. mincore() knows what is in memory; MADV_FREE drops
// what might have been swapped out, and refuses anything but private anonymous memory, whose untouched
// pages are zero by contract. Where either is not to be had the range is empty.
inline ByteRange untouched_pages(void* data, size_t bytes) {
#if defined(MADV_FREE)
  if (bytes < kLargeOutput) return {};
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (address + page - 1) / page * page, end = (address + bytes) / page * page;
  std::vector<unsigned char> resident((end - begin) / page);
  void* first = reinterpret_cast<void*>(begin);
  if (mincore(first, end - begin, resident.data()) != 0) return {};
  for (unsigned char state : resident) {
    if (state & 1) return {};
  }
  if (madvise(first, end - begin, MADV_FREE) != 0) return {};
  return {begin, end};
#else
  (void)data, (void)bytes;
  return {};
#endif
}

}  // namespace masked_loss_ext
