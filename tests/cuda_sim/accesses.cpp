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

// The interface that gcc and clang call; atomics do what they are asked for.
extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_read_range(void* p, size_t bytes) { cuda_sim::note(p, bytes, false); }
void __tsan_write_range(void* p, size_t bytes) { cuda_sim::note(p, bytes, true); }

#define CUDA_SIM_ACCESS(bytes)                                                         \
  void __tsan_read##bytes(void* p) { cuda_sim::note(p, bytes, false); }                \
  void __tsan_write##bytes(void* p) { cuda_sim::note(p, bytes, true); }                \
  void __tsan_volatile_read##bytes(void* p) { cuda_sim::note(p, bytes, false); }       \
  void __tsan_volatile_write##bytes(void* p) { cuda_sim::note(p, bytes, true); }       \
  void __tsan_unaligned_read##bytes(void* p) { cuda_sim::note(p, bytes, false); }      \
  void __tsan_unaligned_write##bytes(void* p) { cuda_sim::note(p, bytes, true); }
CUDA_SIM_ACCESS(1)
CUDA_SIM_ACCESS(2)
CUDA_SIM_ACCESS(4)
CUDA_SIM_ACCESS(8)
CUDA_SIM_ACCESS(16)
#undef CUDA_SIM_ACCESS

#define CUDA_SIM_ATOMIC(bits, T)                                                                          \
  T __tsan_atomic##bits##_load(const volatile T* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); } \
  void __tsan_atomic##bits##_store(volatile T* p, T v, int) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); } \
  T __tsan_atomic##bits##_exchange(volatile T* p, T v, int) {                                             \
    return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST);                                                   \
  }                                                                                                       \
  T __tsan_atomic##bits##_fetch_add(volatile T* p, T v, int) {                                            \
    return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);                                                    \
  }                                                                                                       \
  T __tsan_atomic##bits##_fetch_sub(volatile T* p, T v, int) {                                            \
    return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST);                                                    \
  }                                                                                                       \
  int __tsan_atomic##bits##_compare_exchange_strong(volatile T* p, T* expected, T v, int, int) {          \
    return __atomic_compare_exchange_n(p, expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);        \
  }                                                                                                       \
  int __tsan_atomic##bits##_compare_exchange_weak(volatile T* p, T* expected, T v, int, int) {            \
    return __atomic_compare_exchange_n(p, expected, v, true, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);         \
  }
CUDA_SIM_ATOMIC(8, unsigned char)
CUDA_SIM_ATOMIC(32, unsigned)
CUDA_SIM_ATOMIC(64, unsigned long)
#undef CUDA_SIM_ATOMIC
}
