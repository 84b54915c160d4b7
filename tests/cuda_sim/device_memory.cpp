// SPDX-License-Identifier: BSD-3-Clause
#include "device_memory.h"

#include "accesses.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <stdexcept>

namespace cuda_sim {
namespace {

constexpr size_t kAlignment = 16;
// A NaN in every floating format, as the poison is, but no value that a kernel is likely to write.
constexpr unsigned char kSlackPattern[2] = {0xff, 0x7f};
constexpr int kPoison = 0xff;

size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

unsigned char slack_byte(const char* address) {
  return kSlackPattern[reinterpret_cast<uintptr_t>(address) & 1];
}

}  // namespace

void Buffer::protect(int protection) const {
  if (page_bytes && mprotect(pages, page_bytes, protection) != 0)
    throw std::runtime_error("cuda_sim: mprotect failed");
}

void Buffer::fill_slack() const {
  for (char* p = pages; p < data; ++p) *p = static_cast<char>(slack_byte(p));
  for (char* p = data + bytes; p < pages + page_bytes; ++p) *p = static_cast<char>(slack_byte(p));
}

bool Buffer::slack_intact() const {
  const auto intact = [](const char* p) { return static_cast<unsigned char>(*p) == slack_byte(p); };
  for (const char* p = pages; p < data; ++p)
    if (!intact(p)) return false;
  for (const char* p = data + bytes; p < pages + page_bytes; ++p)
    if (!intact(p)) return false;
  return true;
}

DeviceMemory& DeviceMemory::instance() {
  static auto* memory = new DeviceMemory;  // never destroyed: tensors may outlive static objects
  return *memory;
}

DeviceMemory::DeviceMemory() : page_(static_cast<size_t>(sysconf(_SC_PAGESIZE))) {
  // Addresses are not used again before they run out, so a stale pointer faults. Where the address space
  // is limited, less has to do.
  for (size_t size = size_t{1} << 38; size >= size_t{1} << 30; size /= 2) {
    void* p = mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) continue;
    begin_ = static_cast<char*>(p);
    end_ = begin_ + size;
    next_ = begin_ + page_;
    return;
  }
  throw std::runtime_error("cuda_sim: no address space for device memory");
}

Buffer& DeviceMemory::allocate(size_t bytes, bool writable, BufferKind kind) {
  const size_t rounded = round_up(bytes, kAlignment), page_bytes = round_up(rounded, page_);
  if (next_ + page_bytes + page_ > end_) {
    const bool idle = std::none_of(buffers_.begin(), buffers_.end(), [](auto& b) { return b.live; });
    if (!idle || begin_ + page_bytes + 2 * page_ > end_)
      throw std::runtime_error("cuda_sim: out of device memory");
    buffers_.clear();
    next_ = begin_ + page_;
  }
  Buffer b;
  b.bytes = bytes;
  b.pages = next_;
  b.page_bytes = page_bytes;
  b.data = next_ + page_bytes - rounded;
  b.kind = kind;
  b.writable = writable;
  next_ += page_bytes + page_;
  b.protect(PROT_READ | PROT_WRITE);
  std::memset(b.data, kPoison, b.bytes);
  b.fill_slack();
  if (kind == BufferKind::kGlobal) b.protect(PROT_NONE);
  buffers_.push_back(b);
  return buffers_.back();
}

void DeviceMemory::skip(size_t bytes) {
  const size_t page_bytes = round_up(bytes, page_);
  if (page_bytes > static_cast<size_t>(end_ - next_))
    throw std::runtime_error("cuda_sim: out of addresses for device memory");
  next_ += page_bytes;
}

Buffer* DeviceMemory::find(const void* address) {
  const auto* p = static_cast<const char*>(address);
  auto after = std::upper_bound(buffers_.begin(), buffers_.end(), p,
                                [](const char* a, const Buffer& b) { return a < b.data; });
  if (after == buffers_.begin()) return nullptr;
  Buffer& b = *--after;
  return b.live && p <= b.data + b.bytes ? &b : nullptr;
}

void DeviceMemory::release(void* data) {
  Buffer* b = find(data);
  if (!b || b->data != data) return;  // released by reset() before its tensor went
  b->live = false;
  if (b->page_bytes)  // gives the pages back and leaves the addresses unmapped
    mmap(b->pages, b->page_bytes, PROT_NONE,
         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
}

void DeviceMemory::release_all() {
  for (Buffer& b : buffers_)
    if (b.live && b.kind == BufferKind::kGlobal) release(b.data);
  const auto gone = [](const Buffer& b) { return !b.live; };
  buffers_.erase(std::remove_if(buffers_.begin(), buffers_.end(), gone), buffers_.end());
}

void DeviceMemory::open() {
  forget_last_buffer();
  for (const Buffer& b : buffers_)
    if (b.live && b.kind == BufferKind::kGlobal)
      b.protect(b.writable ? PROT_READ | PROT_WRITE : PROT_READ);
}

std::string DeviceMemory::close() {
  std::string damage;
  for (const Buffer& b : buffers_) {
    if (!b.live) continue;
    if (damage.empty() && !b.slack_intact())
      damage = "a write just outside a buffer of " + std::to_string(b.bytes) + " bytes of " +
               (b.kind == BufferKind::kShared ? "shared memory" : "device memory");
    if (b.kind == BufferKind::kGlobal) b.protect(PROT_NONE);
  }
  return damage;
}

Buffer* DeviceMemory::covering(void* data, size_t bytes) {
  Buffer* b = find(data);
  if (!b || static_cast<char*>(data) + bytes > b->data + b->bytes)
    throw std::runtime_error("cuda_sim: copy outside device memory");
  return b;
}

void DeviceMemory::write(void* to, const void* from, size_t bytes) {
  Buffer* b = covering(to, bytes);
  b->protect(PROT_READ | PROT_WRITE);
  std::memcpy(to, from, bytes);
  b->protect(PROT_NONE);
}

void DeviceMemory::read(void* to, const void* from, size_t bytes) {
  Buffer* b = covering(const_cast<void*>(from), bytes);
  b->protect(PROT_READ);
  std::memcpy(to, from, bytes);
  b->protect(PROT_NONE);
}

void DeviceMemory::fill(void* to, int byte, size_t bytes) {
  Buffer* b = covering(to, bytes);
  if (!b->writable) throw std::runtime_error("cuda_sim: a read-only buffer is to be filled");
  b->protect(PROT_READ | PROT_WRITE);
  std::memset(to, byte, bytes);
  b->protect(PROT_NONE);
}

bool DeviceMemory::contains(const void* address) const {
  return address >= begin_ && address < end_;
}

void DeviceMemory::describe(const void* address, char* text, size_t size) const {
  const auto* p = static_cast<const char*>(address);
  const Buffer* before = nullptr;  // the last that starts at or below, and the first above
  const Buffer* above = nullptr;
  for (const Buffer& b : buffers_) {
    if (b.data <= p) before = &b;
    if (!above && b.data > p) above = &b;
  }
  const auto kind = [](const Buffer* b) {
    return b->kind == BufferKind::kShared ? "shared memory" : "device memory";
  };
  if (before && !before->live && p < before->data + before->bytes)
    snprintf(text, size, "a released buffer of %zu bytes", before->bytes);
  else if (before && p < before->data + before->bytes)
    snprintf(text, size, "byte %td of a%s buffer of %zu bytes of %s", p - before->data,
             before->writable ? "" : " read-only", before->bytes, kind(before));
  else if (above && (!before || above->data - p < p - (before->data + before->bytes)))
    snprintf(text, size, "%td bytes before a buffer of %zu bytes of %s", above->data - p,
             above->bytes, kind(above));
  else if (before)
    snprintf(text, size, "%td bytes beyond the end of a buffer of %zu bytes of %s",
             p - (before->data + before->bytes), before->bytes, kind(before));
  else
    snprintf(text, size, "device memory without a buffer");
}

void* device_allocate(size_t bytes, bool writable) {
  return DeviceMemory::instance().allocate(bytes, writable).data;
}

bool is_device_pointer(const void* pointer) {
  return DeviceMemory::instance().find(pointer) != nullptr;
}

}  // namespace cuda_sim
