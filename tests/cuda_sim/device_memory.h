// SPDX-License-Identifier: BSD-3-Clause
// Simulated device memory. Every buffer ends right before an unmapped page (16-byte alignment kept; the
// slack holds a pattern that is checked after each launch), and all of it is mapped only during a launch.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "runtime.h"

namespace cuda_sim {

enum class BufferKind { kGlobal, kShared };

struct Buffer {
  char* data = nullptr;
  size_t bytes = 0;
  char* pages = nullptr;  // page_bytes from here hold the buffer; an unmapped page follows
  size_t page_bytes = 0;
  BufferKind kind = BufferKind::kGlobal;
  bool writable = true;
  bool live = true;

  void protect(int protection) const;
  void fill_slack() const;
  bool slack_intact() const;
};

class DeviceMemory {
 public:
  static DeviceMemory& instance();

  Buffer& allocate(size_t bytes, bool writable, BufferKind kind = BufferKind::kGlobal);
  void skip(size_t bytes);  // the next buffer lies at least that much further on
  void release(void* data);
  void release_all();
  Buffer* find(const void* address);  // live buffer that holds it or ends there
  void open();                        // for the kernels of a launch
  std::string close();                // what was written outside a buffer, or empty
  void write(void* to, const void* from, size_t bytes);  // as cudaMemcpy
  void read(void* to, const void* from, size_t bytes);
  void fill(void* to, int byte, size_t bytes);  // as cudaMemset
  bool contains(const void* address) const;
  // For the signal handler: where the address lies, in words.
  void describe(const void* address, char* text, size_t size) const;

 private:
  DeviceMemory();
  Buffer* covering(void* data, size_t bytes);

  char* begin_ = nullptr;
  char* end_ = nullptr;
  char* next_ = nullptr;
  size_t page_ = 4096;
  std::vector<Buffer> buffers_;  // by address; released ones stay, to be named in messages
};

}  // namespace cuda_sim
