// SPDX-License-Identifier: BSD-3-Clause
#include "accesses.h"

#include <algorithm>
#include <unordered_map>
#include <vector>

#include "device_memory.h"

namespace cuda_sim {
namespace {

struct Counts {
  std::vector<uint16_t> reads, writes;
};

bool counting = false;
const Buffer* last = nullptr;
Counts* last_counts = nullptr;

std::unordered_map<const char*, Counts>& counted() {
  static auto* map = new std::unordered_map<const char*, Counts>;
  return *map;
}

// What lies beyond the buffer is the business of the unmapped pages.
void note(const void* address, size_t bytes, bool write) {
  if (!counting || !DeviceMemory::instance().contains(address)) return;
  const auto* p = static_cast<const char*>(address);
  if (!last || p < last->data || p >= last->data + last->bytes) {
    last = DeviceMemory::instance().find(address);
    if (!last || last->kind != BufferKind::kGlobal) {
      last = nullptr;
      return;
    }
    last_counts = &counted()[last->data];
    last_counts->reads.resize(last->bytes);
    last_counts->writes.resize(last->bytes);
  }
  auto& counts = write ? last_counts->writes : last_counts->reads;
  const size_t begin = static_cast<size_t>(p - last->data), end = std::min(begin + bytes, last->bytes);
  for (size_t i = begin; i < end; ++i) counts[i] += counts[i] < 0xffff;
}

}  // namespace

void set_counting(bool on) {
  counting = on;
  counted().clear();
  forget_last_buffer();
}

void forget_last_buffer() { last = nullptr; }

void read_counts(const void* data, size_t bytes, uint16_t* reads, uint16_t* writes) {
  std::fill(reads, reads + bytes, 0);
  std::fill(writes, writes + bytes, 0);
  const Buffer* buffer = DeviceMemory::instance().find(data);
  if (!buffer || !counted().count(buffer->data)) return;
  const Counts& counts = counted()[buffer->data];
  const size_t begin = static_cast<size_t>(static_cast<const char*>(data) - buffer->data);
  for (size_t i = 0; i < bytes && begin + i < buffer->bytes; ++i) {
    reads[i] = counts.reads[begin + i];
    writes[i] = counts.writes[begin + i];
  }
}

}  // namespace cuda_sim

#define ACCESS_NAMESPACE cuda_sim
#include "tsan.inc"
