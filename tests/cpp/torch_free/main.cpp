// SPDX-License-Identifier: BSD-3-Clause
// Every operator of the library with 1, 2, 3 and 8 threads, without PyTorch: the same bits from each, every
// byte of the results written, no byte of an excluded row read. Sanitizers see all of it.
//
//   main LIBRARY [--small] [--only ROOM]     --small leaves out what is large, for slow instruments
//   main LIBRARY --wrong race | overflow | undefined | uninitialised     one wrong line, to be reported
#include <dlfcn.h>

#include <cstdio>
#include <string>
#include <thread>

#include "common/cpu/parallel.h"
#include "rooms.h"

namespace torch_free {
namespace {

constexpr uint32_t kThreads[] = {1, 2, 3, 8};
int failures = 0;

// Of all bytes: what was not written is reported by the branch on it.
stand_in::ByName<std::string> bytes_of(const Results& results) {
  stand_in::ByName<std::string> found;
  for (const auto& [name, tensor] : results) {
    const auto size = static_cast<size_t>(tensor.numel()) * tensor.element_size();
    found[name] = size ? std::string(tensor.get()->data(), size) : "";
    unsigned sum = 0;
    for (char byte : found[name]) sum += static_cast<unsigned char>(byte);
    if (sum == 0xffffffff) std::puts("");
  }
  return found;
}

void check(const Case& one) {
  stand_in::ByName<std::string> first;
  for (uint32_t threads : kThreads) {
    stand_in::set_num_threads(threads);
    generator().seed(1);
    const auto found = bytes_of(one.run());
    if (threads == 1) first = found;
    for (const auto& [name, bytes] : found) {
      if (bytes == first.at(name)) continue;
      std::printf("FAIL %s, %s: %s differs with %u threads\n", one.room.c_str(), one.name.c_str(),
                  name.c_str(), threads);
      ++failures;
    }
  }
}

int run_all(bool large, const std::string& only) {
  stand_in::ByName<int> done;
  const auto run = [&](const std::vector<Case>& cases) {
    for (const Case& one : cases) {
      if (!only.empty() && one.room != only) continue;
      check(one);
      ++done[one.room];
    }
  };
  run(elementwise_cases(large));
  run(cross_entropy_cases(large));
  run(linear_cases());
  run(shard_cases());
  run(terms_cases());
  run(layout_cases());
  int64_t calls = 0;
  for (const auto& [name, op] : stand_in::operators()) {
    calls += op.calls;
    if (op.calls > 0 || !only.empty()) continue;
    std::printf("FAIL %s is never called\n", name.c_str());
    ++failures;
  }
  for (const auto& [room, count] : done) std::printf("%s: %d cases\n", room.c_str(), count);
  std::printf("%lld calls, %d failures\n", static_cast<long long>(calls), failures);
  return failures == 0 ? 0 : 1;
}

int wrong(const std::string& kind) {
  volatile int64_t size = 40;
  std::vector<int> memory(static_cast<size_t>(size));
  int64_t sum = 0;
  stand_in::set_num_threads(4);
  if (kind == "race") {
    masked_loss_ext::for_each_chunk(100, [&](int64_t i) {
      sum += i;
      std::this_thread::yield();
    });
  }
  if (kind == "overflow") sum = memory.data()[size];
  if (kind == "undefined") sum = 1 << size;
  if (kind == "uninitialised") {
    const Tensor fresh = empty({4});
    if (stand_in::get(*fresh.get(), 0) > 1) sum = 1;
  }
  std::printf("not reported (%lld)\n", static_cast<long long>(sum));
  return 0;
}

}  // namespace
}  // namespace torch_free

int main(int count, char** words) {
  if (count < 2 || dlopen(words[1], RTLD_NOW) == nullptr) {
    std::fprintf(stderr, "usage: %s LIBRARY [--small] [--only ROOM] [--wrong KIND]: %s\n", words[0],
                 count < 2 ? "no library" : dlerror());
    return 2;
  }
  bool large = true;
  std::string only;
  for (int i = 2; i < count; ++i) {
    const std::string word = words[i];
    if (word == "--small") large = false;
    if (word == "--only" && i + 1 < count) only = words[++i];
    if (word == "--wrong" && i + 1 < count) return torch_free::wrong(words[++i]);
  }
  return torch_free::run_all(large, only);
}
