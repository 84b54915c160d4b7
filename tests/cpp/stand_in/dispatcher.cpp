// SPDX-License-Identifier: BSD-3-Clause
// Registration, strings, lists and threads.
#include "dispatcher.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <thread>

namespace detail = torch::stable::detail;

struct StringOpaque {
  std::string text;
};
struct StableListOpaque {
  std::vector<StableIValue> items;
};

namespace stand_in {
namespace {

uint32_t threads_wanted = 1;

// At the commas that are in no bracket and no string.
std::vector<std::string> pieces(const std::string& text) {
  std::vector<std::string> found(1);
  int depth = 0;
  for (char c : text) {
    depth += c == '(' ? 1 : c == ')' ? -1 : 0;
    if (c == ',' && depth == 0) {
      found.emplace_back();
    } else if (c != ' ' || !found.back().empty()) {
      found.back() += c;
    }
  }
  if (found.back().empty()) found.pop_back();
  return found;
}

Value default_of(const std::string& type, const std::string& text) {
  if (text.empty() || text == "None") return {};
  if (type == "float") return std::stod(text);
  if (type == "bool") return text == "True";
  if (type == "str") return text.substr(1, text.size() - 2);
  return static_cast<int64_t>(std::stoll(text));
}

Argument argument_of(const std::string& text) {
  const size_t space = text.find(' '), equal = text.find('=');
  Argument made{text.substr(0, space), text.substr(space + 1, equal - space - 1), {}};
  made.type = made.type.substr(0, made.type.find('('));  // Tensor(a!) is a Tensor
  if (equal != std::string::npos) made.otherwise = default_of(made.type, text.substr(equal + 1));
  return made;
}

void define(const std::string& schema) {
  const size_t open = schema.find('('), arrow = schema.find(") -> ");
  Operator& op = operators()[schema.substr(0, open)];
  for (const auto& one : pieces(schema.substr(open + 1, arrow - open - 1))) {
    op.arguments.push_back(argument_of(one));
  }
  std::string results = schema.substr(arrow + 5);
  op.returns_text = results == "str";
  if (results.front() == '(') results = results.substr(1, results.size() - 2);
  for (const auto& one : pieces(results)) {
    const size_t space = one.find(' ');
    op.results.push_back(space == std::string::npos ? "" : one.substr(space + 1));
  }
}

template <class T>
StableIValue optional_of(const Value& value) {
  const T* held = std::get_if<T>(&value);
  return detail::from(held ? std::optional<T>(*held) : std::optional<T>());
}

StableIValue boxed(const Argument& argument, const Value& value) {
  const std::string& type = argument.type;
  try {
    if (type == "Tensor") return detail::from(std::get<Tensor>(value));
    if (type == "Tensor?") return optional_of<Tensor>(value);
    if (type == "int?" || type == "SymInt?") return optional_of<int64_t>(value);
    if (type == "int" || type == "SymInt") return detail::from(std::get<int64_t>(value));
    if (type == "float") return detail::from(std::get<double>(value));
    if (type == "bool") return detail::from(std::get<bool>(value));
    if (type == "str") return detail::from(new StringOpaque{std::get<std::string>(value)});
  } catch (const std::bad_variant_access&) {
  }
  throw std::runtime_error("stand-in: no " + type + " for " + argument.name);
}

}  // namespace

ByName<Operator>& operators() {
  static auto* found = new ByName<Operator>;
  return *found;
}

ByName<Tensor> call(const std::string& name, const Named& given) {
  Operator& op = operators().at(name);
  std::vector<StableIValue> stack;
  for (const auto& argument : op.arguments) {
    const Value* found = given.find(argument.name);
    stack.push_back(boxed(argument, found ? *found : argument.otherwise));
  }
  const uint64_t count = stack.size();
  stack.resize(std::max(stack.size(), op.results.size()));
  op.function(stack.data(), count, op.results.size());
  ++op.calls;
  ByName<Tensor> results;
  if (op.returns_text) {
    delete detail::to<StringHandle>(stack[0]);
    return results;
  }
  for (size_t i = 0; i < op.results.size(); ++i) results.add(op.results[i], detail::to<Tensor>(stack[i]));
  return results;
}

Sizes taken_list(StableIValue value) {
  const std::unique_ptr<StableListOpaque> list(detail::to<StableListHandle>(value));
  Sizes sizes;
  for (StableIValue item : list->items) sizes.push_back(detail::to<int64_t>(item));
  return sizes;
}

void set_num_threads(uint32_t threads) { threads_wanted = threads; }

}  // namespace stand_in

// --- what the library calls ----------------------------------------------------------------------

extern "C" {

uint64_t aoti_torch_abi_version() { return TORCH_ABI_VERSION; }

AOTITorchError aoti_torch_library_init_def(const char*, const char*, uint32_t, TorchLibraryHandle* made) {
  *made = nullptr;
  return 0;
}
AOTITorchError aoti_torch_library_init_impl(const char*, const char*, const char*, uint32_t,
                                            TorchLibraryHandle* made) {
  *made = nullptr;
  return 0;
}
AOTITorchError aoti_torch_delete_library_object(TorchLibraryHandle) { return 0; }
AOTITorchError aoti_torch_library_def(TorchLibraryHandle, const char* schema) {
  stand_in::define(schema);
  return 0;
}
AOTITorchError torch_library_impl(TorchLibraryHandle, const char* name,
                                  void (*function)(StableIValue*, uint64_t, uint64_t), uint64_t) {
  stand_in::operators()[name].function = function;
  return 0;
}

AOTITorchError torch_new_string_handle(const char* data, size_t length, StringHandle* made) {
  *made = new StringOpaque{{data, length}};
  return 0;
}
AOTITorchError torch_delete_string(StringHandle text) {
  delete text;
  return 0;
}
AOTITorchError torch_string_length(StringHandle text, size_t* length) {
  *length = text->text.size();
  return 0;
}
AOTITorchError torch_string_c_str(StringHandle text, const char** data) {
  *data = text->text.c_str();
  return 0;
}

AOTITorchError torch_new_list_reserve_size(size_t size, StableListHandle* made) {
  *made = new StableListOpaque;
  (*made)->items.reserve(size);
  return 0;
}
AOTITorchError torch_list_push_back(StableListHandle list, StableIValue item) {
  list->items.push_back(item);
  return 0;
}
AOTITorchError torch_delete_list(StableListHandle list) {
  delete list;
  return 0;
}

AOTITorchError torch_get_num_threads(uint32_t* threads) {
  *threads = stand_in::threads_wanted;
  return 0;
}

// Equal shares, as PyTorch's; new threads each time, which begin together, or the first would take all chunks
// before there is another.
AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain, ParallelFunc f, void* context) {
  const int64_t most = (end - begin + grain - 1) / std::max<int64_t>(grain, 1);
  const int64_t threads = std::max<int64_t>(1, std::min<int64_t>(most, stand_in::threads_wanted));
  const int64_t share = (end - begin + threads - 1) / threads;
  std::atomic<int64_t> waiting{threads};
  const auto work = [&](int64_t i) {
    --waiting;
    while (waiting > 0) std::this_thread::yield();
    const int64_t first = begin + i * share, last = std::min(end, first + share);
    if (first < last) f(first, last, context);
  };
  std::vector<std::thread> others;
  for (int64_t i = 1; i < threads; ++i) others.emplace_back(work, i);
  work(0);
  for (auto& thread : others) thread.join();
  return 0;
}
}
