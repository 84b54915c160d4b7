// SPDX-License-Identifier: BSD-3-Clause
#include "symbols.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <link.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <stdexcept>

extern "C" void* __tls_get_addr(size_t module_and_offset[2]);

namespace cuda_sim {
namespace {

int marker;  // its address is in this library

struct Module {
  const char* base;
  size_t tls_module;
};

// For any variable, in an image that malloc() has aligned.
size_t aligned(size_t place) { return (place + 15) / 16 * 16; }

int find_module(dl_phdr_info* info, size_t, void* result) {
  auto* module = static_cast<Module*>(result);
  if (reinterpret_cast<const char*>(info->dlpi_addr) != module->base) return 0;
  module->tls_module = info->dlpi_tls_modid;
  return 1;
}

}  // namespace

const Symbols& Symbols::instance() {
  static const Symbols symbols;
  return symbols;
}

Symbols::Symbols() {
  Dl_info info;
  if (!dladdr(&marker, &info)) throw std::runtime_error("cuda_sim: dladdr failed");
  path_ = info.dli_fname;
  base_ = static_cast<const char*>(info.dli_fbase);
  Module module{base_, 0};
  dl_iterate_phdr(&find_module, &module);
  tls_module_ = module.tls_module;
  read_table();
}

void Symbols::read_table() {
  std::ifstream stream(path_, std::ios::binary);
  const std::string file((std::istreambuf_iterator<char>(stream)), std::istreambuf_iterator<char>());
  if (file.size() < sizeof(Elf64_Ehdr)) throw std::runtime_error("cuda_sim: cannot read " + path_);
  const auto* header = reinterpret_cast<const Elf64_Ehdr*>(file.data());
  const auto* sections = reinterpret_cast<const Elf64_Shdr*>(file.data() + header->e_shoff);
  for (int i = 0; i < header->e_shnum; ++i) {
    if (sections[i].sh_type != SHT_SYMTAB) continue;
    const char* names = file.data() + sections[sections[i].sh_link].sh_offset;
    const auto* symbols = reinterpret_cast<const Elf64_Sym*>(file.data() + sections[i].sh_offset);
    for (size_t k = 0; k < sections[i].sh_size / sizeof(Elf64_Sym); ++k) {
      const Elf64_Sym& s = symbols[k];
      if (s.st_shndx == SHN_UNDEF) continue;
      const char* name = names + s.st_name;
      if (ELF64_ST_TYPE(s.st_info) == STT_FUNC) functions_.push_back({s.st_value, s.st_size, name});
      // _ZZ...: an object local to a function. What torch or the host side keep per thread is not one.
      if (ELF64_ST_TYPE(s.st_info) == STT_TLS && std::strncmp(name, "_ZZ", 3) == 0)
        shared_.push_back({s.st_value, s.st_size, name});
    }
  }
  if (functions_.empty()) throw std::runtime_error("cuda_sim: no symbol table in " + path_);
  std::sort(functions_.begin(), functions_.end(),
            [](const Symbol& a, const Symbol& b) { return a.value < b.value; });
}

size_t Symbols::offset(const void* address) const {
  return static_cast<size_t>(static_cast<const char*>(address) - base_);
}

bool Symbols::holds_code(const void* address) const {
  const size_t at = offset(address);
  return at < functions_.back().value + functions_.back().size;
}

std::string Symbols::demangled(const void* address) const {
  const size_t at = offset(address);
  auto after = std::upper_bound(functions_.begin(), functions_.end(), at,
                                [](size_t a, const Symbol& s) { return a < s.value; });
  if (after == functions_.begin()) return "";
  const Symbol& s = *--after;
  if (at >= s.value + s.size) return "";
  int status = 0;
  char* text = abi::__cxa_demangle(s.name.c_str(), nullptr, nullptr, &status);
  std::string name = status == 0 ? text : s.name;
  std::free(text);
  return name;
}

char* Symbols::thread_local_block() const {
  size_t start[2] = {tls_module_, 0};
  return static_cast<char*>(__tls_get_addr(start));
}

void Symbols::poison_static_shared(int byte) const {
  for (const Symbol& s : shared_) std::memset(thread_local_block() + s.value, byte, s.size);
}

std::vector<char> Symbols::static_shared() const {
  std::vector<char> image;
  for (const Symbol& s : shared_) {
    image.resize(aligned(image.size()));
    const char* begin = thread_local_block() + s.value;
    image.insert(image.end(), begin, begin + s.size);
  }
  return image;
}

void Symbols::set_static_shared(const std::vector<char>& image) const {
  size_t place = 0;
  for (const Symbol& s : shared_) {
    std::memcpy(thread_local_block() + s.value, image.data() + aligned(place), s.size);
    place = aligned(place) + s.size;
  }
}

size_t Symbols::place_in_image(const void* address) const {
  size_t place = 0;
  for (const Symbol& s : shared_) {
    const char* begin = thread_local_block() + s.value;
    const auto* p = static_cast<const char*>(address);
    if (p >= begin && p < begin + s.size) return aligned(place) + static_cast<size_t>(p - begin);
    place = aligned(place) + s.size;
  }
  throw std::runtime_error("another block's memory is asked for by an address that is not __shared__");
}

}  // namespace cuda_sim
