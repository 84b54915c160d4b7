// SPDX-License-Identifier: BSD-3-Clause
// The few operators of PyTorch that the library calls, one element after another.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/stableivalue_conversions.h>

#include "dispatcher.h"
#include "tensor.h"

namespace {

namespace detail = torch::stable::detail;
using Handle = std::unique_ptr<AtenTensorOpaque>;

Handle taken(StableIValue value) { return Handle(detail::to<AtenTensorHandle>(value)); }
StableIValue given(Handle tensor) { return detail::from(tensor.release()); }

// What an optional argument holds; its box is freed.
template <class T>
T opened(StableIValue value, T otherwise) {
  auto* box = detail::to<StableIValue*>(value);
  if (box == nullptr) return otherwise;
  const T found = detail::to<T>(*box);
  delete box;
  return found;
}

void copy(const AtenTensorOpaque& source, const AtenTensorOpaque& target) {
  if (source.sizes != target.sizes) throw std::runtime_error("stand-in: copy_ of another shape");
  stand_in::for_each_element({&source, &target}, [&](const Sizes& at) {
    stand_in::set(target, at[1], stand_in::get(source, at[0]));
  });
}

Handle copied(const AtenTensorOpaque& source, ScalarType type) {
  Handle made(stand_in::new_tensor(source.sizes, stand_in::contiguous_strides(source.sizes), type));
  copy(source, *made);
  return made;
}

// out = start + a b, with a row or all of start, or none; start may be out.
void multiply(const AtenTensorOpaque* start, const AtenTensorOpaque& a, const AtenTensorOpaque& b,
              const AtenTensorOpaque& out) {
  const int64_t rows = a.sizes.at(0), inner = a.sizes.at(1), columns = b.sizes.at(1);
  if (b.sizes[0] != inner || out.sizes != Sizes{rows, columns}) throw std::runtime_error("stand-in: mm");
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      const size_t last = start == nullptr ? 0 : start->sizes.size() - 1;
      double sum = 0;
      if (start != nullptr) {
        sum = stand_in::get(*start, c * start->strides[last] + (last == 1 ? r * start->strides[0] : 0));
      }
      for (int64_t i = 0; i < inner; ++i) {
        sum += stand_in::get(a, r * a.strides[0] + i * a.strides[1]) *
               stand_in::get(b, i * b.strides[0] + c * b.strides[1]);
      }
      stand_in::set(out, r * out.strides[0] + c * out.strides[1], sum);
    }
  }
}

void contiguous(StableIValue* stack) {  // self, memory_format
  Handle self = taken(stack[0]);
  stack[0] = given(self->is_contiguous() ? std::move(self) : copied(*self, self->type));
}

void clone(StableIValue* stack) {  // self, memory_format?
  const Handle self = taken(stack[0]);
  stack[0] = given(copied(*self, self->type));
}

void view(StableIValue* stack) {  // self, size; of contiguous tensors alone
  Handle self = taken(stack[0]);
  const Sizes sizes = stand_in::taken_list(stack[1]);
  if (!self->is_contiguous()) throw std::runtime_error("stand-in: a view of what is not contiguous");
  const int64_t before = self->numel();
  self->sizes = sizes;
  self->strides = stand_in::contiguous_strides(sizes);
  if (self->numel() != before) throw std::runtime_error("stand-in: a view of another size");
  stack[0] = given(std::move(self));
}

void zero_(StableIValue* stack) {
  Handle self = taken(stack[0]);
  stand_in::for_each_element({self.get()}, [&](const Sizes& at) { stand_in::set(*self, at[0], 0); });
  stack[0] = given(std::move(self));
}

void copy_(StableIValue* stack) {  // self, src, non_blocking
  Handle self = taken(stack[0]);
  copy(*taken(stack[1]), *self);
  stack[0] = given(std::move(self));
}

void transpose(StableIValue* stack) {  // self, dim0, dim1
  Handle self = taken(stack[0]);
  const auto a = static_cast<size_t>(detail::to<int64_t>(stack[1]));
  const auto b = static_cast<size_t>(detail::to<int64_t>(stack[2]));
  std::swap(self->sizes.at(a), self->sizes.at(b));
  std::swap(self->strides.at(a), self->strides.at(b));
  stack[0] = given(std::move(self));
}

void sum_out(StableIValue* stack) {  // self, dim?, keepdim, dtype?, out; over dim 0 of two alone
  const Handle self = taken(stack[0]);
  auto* box = detail::to<StableIValue*>(stack[1]);
  const Sizes over = stand_in::taken_list(*box);
  delete box;
  opened<int32_t>(stack[3], 0);
  Handle out = taken(stack[4]);
  if (over != Sizes{0} || self->sizes.size() != 2) throw std::runtime_error("stand-in: sum");
  for (int64_t c = 0; c < self->sizes[1]; ++c) {
    double sum = 0;
    for (int64_t r = 0; r < self->sizes[0]; ++r) {
      sum += stand_in::get(*self, r * self->strides[0] + c * self->strides[1]);
    }
    stand_in::set(*out, c * out->strides[0], sum);
  }
  stack[0] = given(std::move(out));
}

void mm_out(StableIValue* stack) {  // self, mat2, out
  const Handle a = taken(stack[0]), b = taken(stack[1]);
  Handle out = taken(stack[2]);
  multiply(nullptr, *a, *b, *out);
  stack[0] = given(std::move(out));
}

void to_dtype(StableIValue* stack) {  // self, dtype?, and others that are left as they are
  const Handle self = taken(stack[0]);
  const auto type = static_cast<ScalarType>(opened<int32_t>(stack[1], static_cast<int32_t>(self->type)));
  stack[0] = given(copied(*self, type));
}

void new_empty(StableIValue* stack) {  // self, size, dtype?, and others that are left as they are
  const Handle self = taken(stack[0]);
  const Sizes sizes = stand_in::taken_list(stack[1]);
  const auto type = static_cast<ScalarType>(opened<int32_t>(stack[2], static_cast<int32_t>(self->type)));
  stack[0] = given(Handle(stand_in::new_tensor(sizes, stand_in::contiguous_strides(sizes), type)));
}

}  // namespace

extern "C" {

AOTITorchError aoti_torch_cpu_addmm_out(AtenTensorHandle out, AtenTensorHandle start, AtenTensorHandle a,
                                        AtenTensorHandle b, double, double) {
  multiply(start, *a, *b, *out);
  return 0;
}

AOTITorchError torch_call_dispatcher(const char* name, const char* overload, StableIValue* stack, uint64_t) {
  static const stand_in::ByName<void (*)(StableIValue*)> known = {
      {"aten::contiguous", contiguous}, {"aten::clone", clone},
      {"aten::view", view},             {"aten::zero_", zero_},
      {"aten::copy_", copy_},           {"aten::transpose.int", transpose},
      {"aten::mm.out", mm_out},         {"aten::sum.IntList_out", sum_out},
      {"aten::new_empty", new_empty},   {"aten::to.dtype_layout", to_dtype},
  };
  known.at(*overload ? std::string(name) + "." + overload : name)(stack);
  return 0;
}
}
