// SPDX-License-Identifier: BSD-3-Clause
// What std::map<std::string, T> is used for here, without the compiled half of it: MemorySanitizer knows
// nothing of what libstdc++ itself has written.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace stand_in {

template <class T>
class ByName {
 public:
  ByName() = default;
  ByName(std::initializer_list<std::pair<std::string, T>> items) : items_(items) {}

  T* find(const std::string& name) {
    for (auto& item : items_) {
      if (item.first == name) return &item.second;
    }
    return nullptr;
  }
  const T* find(const std::string& name) const { return const_cast<ByName*>(this)->find(name); }
  T& at(const std::string& name) {
    T* found = find(name);
    if (found == nullptr) throw std::out_of_range("nothing is called " + name);
    return *found;
  }
  const T& at(const std::string& name) const { return const_cast<ByName*>(this)->at(name); }
  T& operator[](const std::string& name) {
    if (T* found = find(name)) return *found;
    items_.emplace_back(name, T());
    return items_.back().second;
  }
  // Where the name is not taken.
  void add(const std::string& name, const T& value) {
    if (find(name) == nullptr) items_.emplace_back(name, value);
  }
  void add(const ByName& others) {
    for (const auto& item : others) add(item.first, item.second);
  }
  void remove(const std::string& name) {
    for (auto at = items_.begin(); at != items_.end(); ++at) {
      if (at->first == name) return void(items_.erase(at));
    }
  }

  auto begin() { return items_.begin(); }
  auto end() { return items_.end(); }
  auto begin() const { return items_.begin(); }
  auto end() const { return items_.end(); }

 private:
  std::vector<std::pair<std::string, T>> items_;
};

}  // namespace stand_in
