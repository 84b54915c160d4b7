// SPDX-License-Identifier: BSD-3-Clause
// The symbol table of the library that the simulator is linked into: names of kernels for messages, and
// the places of static __shared__ arrays. Dynamic symbols would not do, kernels are usually local.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace cuda_sim {

struct Symbol {
  size_t value;  // offset in the library, or in its thread-local segment
  size_t size;
  std::string name;  // mangled
};

class Symbols {
 public:
  static const Symbols& instance();

  std::string demangled(const void* address) const;  // name of the function there, or ""
  bool holds_code(const void* address) const;
  size_t offset(const void* address) const;
  const std::string& path() const { return path_; }
  // Poisons every static __shared__ array for the calling thread.
  void poison_static_shared(int byte) const;
  // All of them, one after another, as they are and as they shall be.
  std::vector<char> static_shared() const;
  void set_static_shared(const std::vector<char>& image) const;
  size_t place_in_image(const void* address) const;  // throws where none holds it

 private:
  Symbols();
  void read_table();
  char* thread_local_block() const;

  std::string path_;
  const char* base_ = nullptr;
  size_t tls_module_ = 0;
  std::vector<Symbol> functions_;  // by value
  std::vector<Symbol> shared_;
};

}  // namespace cuda_sim
