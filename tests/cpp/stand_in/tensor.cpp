// SPDX-License-Identifier: BSD-3-Clause
// Tensors: sizes, strides and memory of their own, each in an allocation that ends where they end.
#include "tensor.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdlib>

namespace stand_in {

size_t element_size(ScalarType type) {
  switch (type) {
    case ScalarType::Bool:
    case ScalarType::Byte:
    case ScalarType::Char: return 1;
    case ScalarType::Short:
    case ScalarType::Half:
    case ScalarType::BFloat16: return 2;
    case ScalarType::Int:
    case ScalarType::Float: return 4;
    case ScalarType::Long:
    case ScalarType::Double: return 8;
    default: throw std::runtime_error("stand-in: a dtype that it does not know");
  }
}

Sizes contiguous_strides(const Sizes& sizes) {
  Sizes strides(sizes.size());
  int64_t step = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = step;
    step *= sizes[d] > 0 ? sizes[d] : 1;
  }
  return strides;
}

AtenTensorOpaque* new_tensor(const Sizes& sizes, const Sizes& strides, ScalarType type) {
  int64_t last = 0;
  for (size_t d = 0; d < sizes.size(); ++d) last += (sizes[d] - 1) * strides[d];
  auto made = std::make_unique<AtenTensorOpaque>();
  made->sizes = sizes;
  made->strides = strides;
  made->type = type;
  const size_t bytes = made->numel() > 0 ? static_cast<size_t>(last + 1) * element_size(type) : 1;
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, bytes) != 0) throw std::bad_alloc();
  made->storage = std::shared_ptr<void>(memory, &std::free);
  return made.release();
}

namespace {

template <class F>
auto with_element(const AtenTensorOpaque& tensor, int64_t element, const F& f) {
  char* at = tensor.data() + element * static_cast<int64_t>(element_size(tensor.type));
  switch (tensor.type) {
    case ScalarType::Float: return f(reinterpret_cast<float*>(at));
    case ScalarType::Double: return f(reinterpret_cast<double*>(at));
    case ScalarType::BFloat16: return f(reinterpret_cast<torch::headeronly::BFloat16*>(at));
    case ScalarType::Half: return f(reinterpret_cast<torch::headeronly::Half*>(at));
    case ScalarType::Long: return f(reinterpret_cast<int64_t*>(at));
    case ScalarType::Int: return f(reinterpret_cast<int32_t*>(at));
    case ScalarType::Bool: return f(reinterpret_cast<bool*>(at));
    default: throw std::runtime_error("stand-in: no numbers of this dtype");
  }
}

}  // namespace

double get(const AtenTensorOpaque& tensor, int64_t element) {
  return with_element(tensor, element, [](auto* at) { return static_cast<double>(*at); });
}

void set(const AtenTensorOpaque& tensor, int64_t element, double value) {
  with_element(tensor, element, [value](auto* at) {
    *at = static_cast<std::remove_pointer_t<decltype(at)>>(value);
    return 0.0;
  });
}

void fill(const AtenTensorOpaque& tensor, const std::vector<double>& values, size_t first) {
  const int64_t count = tensor.numel();
  if (count == 0) return;
  with_element(tensor, 0, [&](auto* at) {
    for (int64_t i = 0; i < count; ++i, first = first + 1 == values.size() ? 0 : first + 1) {
      at[i] = static_cast<std::remove_pointer_t<decltype(at)>>(values[first]);
    }
    return 0.0;
  });
}

void for_each_element(const std::vector<const AtenTensorOpaque*>& tensors,
                      const std::function<void(const Sizes&)>& f) {
  const Sizes& sizes = tensors[0]->sizes;
  Sizes index(sizes.size()), at(tensors.size());
  for (int64_t left = tensors[0]->numel(); left > 0; --left) {
    f(at);
    for (size_t d = sizes.size(); d-- > 0;) {
      const int64_t back = ++index[d] == sizes[d] ? sizes[d] : 0;
      for (size_t i = 0; i < at.size(); ++i) at[i] += tensors[i]->strides[d] * (1 - back);
      if (back == 0) break;
      index[d] = 0;
    }
  }
}

}  // namespace stand_in

int64_t AtenTensorOpaque::numel() const {
  int64_t product = 1;
  for (int64_t size : sizes) product *= size;
  return product;
}

bool AtenTensorOpaque::is_contiguous() const {
  const Sizes wanted = stand_in::contiguous_strides(sizes);
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] != 1 && strides[d] != wanted[d]) return numel() == 0;
  }
  return true;
}

char* AtenTensorOpaque::data() const {
  if (numel() == 0) return nullptr;
  return static_cast<char*>(storage.get()) + offset * static_cast<int64_t>(stand_in::element_size(type));
}

// --- what the library calls ----------------------------------------------------------------------

extern "C" {

AOTITorchError aoti_torch_new_tensor_handle(AtenTensorHandle from, AtenTensorHandle* made) {
  *made = new AtenTensorOpaque(*from);
  return 0;
}
AOTITorchError aoti_torch_new_uninitialized_tensor(AtenTensorHandle* made) {
  *made = new AtenTensorOpaque;
  return 0;
}
AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle tensor) {
  delete tensor;
  return 0;
}
AOTITorchError aoti_torch_empty_strided(int64_t dim, const int64_t* sizes, const int64_t* strides,
                                        int32_t type, int32_t, int32_t, AtenTensorHandle* made) {
  *made = stand_in::new_tensor({sizes, sizes + dim}, {strides, strides + dim}, static_cast<ScalarType>(type));
  return 0;
}
AOTITorchError aoti_torch_aten_narrow(AtenTensorHandle self, int64_t dim, int64_t start, int64_t length,
                                      AtenTensorHandle* made) {
  const auto d = static_cast<size_t>(dim);
  if (start < 0 || length < 0 || start + length > self->sizes[d]) throw std::out_of_range("narrow");
  *made = new AtenTensorOpaque(*self);
  (*made)->offset += start * self->strides[d];
  (*made)->sizes[d] = length;
  return 0;
}

AOTITorchError aoti_torch_get_dim(AtenTensorHandle tensor, int64_t* dim) {
  *dim = static_cast<int64_t>(tensor->sizes.size());
  return 0;
}
AOTITorchError aoti_torch_get_numel(AtenTensorHandle tensor, int64_t* numel) {
  *numel = tensor->numel();
  return 0;
}
AOTITorchError aoti_torch_get_size(AtenTensorHandle tensor, int64_t d, int64_t* size) {
  *size = tensor->sizes.at(static_cast<size_t>(d < 0 ? d + static_cast<int64_t>(tensor->sizes.size()) : d));
  return 0;
}
AOTITorchError aoti_torch_get_stride(AtenTensorHandle tensor, int64_t d, int64_t* stride) {
  const auto dim = static_cast<int64_t>(tensor->sizes.size());
  *stride = tensor->strides.at(static_cast<size_t>(d < 0 ? d + dim : d));
  return 0;
}
AOTITorchError aoti_torch_get_dtype(AtenTensorHandle tensor, int32_t* type) {
  *type = static_cast<int32_t>(tensor->type);
  return 0;
}
AOTITorchError aoti_torch_get_device_type(AtenTensorHandle, int32_t* type) {
  *type = aoti_torch_device_type_cpu();
  return 0;
}
AOTITorchError aoti_torch_get_device_index(AtenTensorHandle, int32_t* index) {
  *index = -1;
  return 0;
}
AOTITorchError aoti_torch_is_defined(AtenTensorHandle tensor, bool* answer) {
  *answer = tensor->storage != nullptr;
  return 0;
}
AOTITorchError aoti_torch_is_contiguous(AtenTensorHandle tensor, bool* answer) {
  *answer = tensor->is_contiguous();
  return 0;
}
AOTITorchError torch_get_mutable_data_ptr(AtenTensorHandle tensor, void** data) {
  *data = tensor->data();
  return 0;
}
AOTITorchError torch_get_const_data_ptr(AtenTensorHandle tensor, const void** data) {
  *data = tensor->data();
  return 0;
}

size_t aoti_torch_dtype_element_size(int32_t type) {
  return stand_in::element_size(static_cast<ScalarType>(type));
}

// Numbers of its own for what the ABI names: any will do that differ.
#define STAND_IN_DTYPE(name, type) \
  int32_t aoti_torch_dtype_##name() { return static_cast<int32_t>(ScalarType::type); }
STAND_IN_DTYPE(float8_e5m2, Float8_e5m2)
STAND_IN_DTYPE(float8_e4m3fn, Float8_e4m3fn)
STAND_IN_DTYPE(float8_e5m2fnuz, Float8_e5m2fnuz)
STAND_IN_DTYPE(float8_e4m3fnuz, Float8_e4m3fnuz)
STAND_IN_DTYPE(bfloat16, BFloat16)
STAND_IN_DTYPE(float16, Half)
STAND_IN_DTYPE(float32, Float)
STAND_IN_DTYPE(float64, Double)
STAND_IN_DTYPE(uint8, Byte)
STAND_IN_DTYPE(uint16, UInt16)
STAND_IN_DTYPE(uint32, UInt32)
STAND_IN_DTYPE(uint64, UInt64)
STAND_IN_DTYPE(int8, Char)
STAND_IN_DTYPE(int16, Short)
STAND_IN_DTYPE(int32, Int)
STAND_IN_DTYPE(int64, Long)
STAND_IN_DTYPE(bool, Bool)
STAND_IN_DTYPE(complex32, ComplexHalf)
STAND_IN_DTYPE(complex64, ComplexFloat)
STAND_IN_DTYPE(complex128, ComplexDouble)
#undef STAND_IN_DTYPE

#define STAND_IN_NUMBER(name, number) \
  int32_t aoti_torch_##name() { return number; }
STAND_IN_NUMBER(device_type_cpu, 0)
STAND_IN_NUMBER(device_type_cuda, 1)
STAND_IN_NUMBER(device_type_meta, 2)
STAND_IN_NUMBER(device_type_xpu, 3)
STAND_IN_NUMBER(device_type_mps, 4)
STAND_IN_NUMBER(device_type_privateuse1, 5)
STAND_IN_NUMBER(layout_strided, 0)
STAND_IN_NUMBER(layout_sparse_coo, 1)
STAND_IN_NUMBER(layout_sparse_csr, 2)
STAND_IN_NUMBER(layout_sparse_csc, 3)
STAND_IN_NUMBER(layout_sparse_bsr, 4)
STAND_IN_NUMBER(layout_sparse_bsc, 5)
STAND_IN_NUMBER(layout__mkldnn, 6)
STAND_IN_NUMBER(layout_jagged, 7)
STAND_IN_NUMBER(memory_format_contiguous_format, 0)
STAND_IN_NUMBER(memory_format_preserve_format, 1)
STAND_IN_NUMBER(memory_format_channels_last, 2)
STAND_IN_NUMBER(memory_format_channels_last_3d, 3)
#undef STAND_IN_NUMBER
}
