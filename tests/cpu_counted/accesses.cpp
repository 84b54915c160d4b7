// SPDX-License-Identifier: BSD-3-Clause
// How often each byte is read and written by the CPU library, whose sources are compiled with
// -fsanitize=thread and linked with --wrap for memcpy, memmove and memset. For one thread.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <unordered_map>

namespace cpu_counted {
namespace {

constexpr uintptr_t kLine = 64;

struct Line {
  uint8_t counts[2][kLine];  // read, written
};

bool counting = false;
uintptr_t last_line = 0;
Line* last = nullptr;

std::unordered_map<uintptr_t, Line>& lines() {
  static auto* map = new std::unordered_map<uintptr_t, Line>;
  return *map;
}

void note(const void* address, size_t bytes, bool write) {
  if (!counting) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(address);
  for (uintptr_t at = begin; at < begin + bytes; ++at) {
    if (last == nullptr || at / kLine != last_line) {
      last_line = at / kLine;
      last = &lines().try_emplace(last_line, Line{}).first->second;
    }
    uint8_t& count = last->counts[write][at % kLine];
    count += count < 0xff;
  }
}

}  // namespace
}  // namespace cpu_counted

#define ACCESS_NAMESPACE cpu_counted
#include "../cuda_sim/tsan.inc"

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED void cpu_counted_start() {
  cpu_counted::lines().clear();
  cpu_counted::last = nullptr;
  cpu_counted::counting = true;
}

EXPORTED void cpu_counted_stop() { cpu_counted::counting = false; }

EXPORTED void cpu_counted_counts(const void* data, size_t bytes, uint8_t* reads, uint8_t* writes) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  for (size_t i = 0; i < bytes; ++i) {
    const auto found = cpu_counted::lines().find((begin + i) / cpu_counted::kLine);
    const bool there = found != cpu_counted::lines().end();
    const size_t place = (begin + i) % cpu_counted::kLine;
    reads[i] = there ? found->second.counts[0][place] : 0;
    writes[i] = there ? found->second.counts[1][place] : 0;
  }
}

extern "C" {
void* __real_memcpy(void*, const void*, size_t);
void* __real_memmove(void*, const void*, size_t);
void* __real_memset(void*, int, size_t);

void* __wrap_memcpy(void* to, const void* from, size_t bytes) {
  cpu_counted::note(from, bytes, false);
  cpu_counted::note(to, bytes, true);
  return __real_memcpy(to, from, bytes);
}

void* __wrap_memmove(void* to, const void* from, size_t bytes) {
  cpu_counted::note(from, bytes, false);
  cpu_counted::note(to, bytes, true);
  return __real_memmove(to, from, bytes);
}

void* __wrap_memset(void* to, int value, size_t bytes) {
  cpu_counted::note(to, bytes, true);
  return __real_memset(to, value, bytes);
}
}
