// SPDX-License-Identifier: BSD-3-Clause
// How the kernels of masked_squared_error walk: a group of 1 to 32 neighbouring lanes takes one item (a
// row, or a part of a long one) at a time and reads it by packs of 16 bytes, where dtype, strides and
// alignment allow, or by elements. An item that the mask drops is not read.
#pragma once

#include "common/cuda/elements.cuh"
#include "common/layout.h"
#include "elementwise/formula.h"

namespace masked_loss_ext::cuda {

constexpr int kThreads = 256;

struct SquaredErrorParams {
  Layout layout;
  int64_t cols_per_item, col_items, items;  // items = rows * col_items
  int lanes;                                // per item, a power of two
  Array prediction, target, mask, edit_mask, weighting;
  Array loss;                     // forward: output; backward: grad_loss. Absent for scalar reductions
  double foreground, background;
  double denominator;             // but for divide_by_count
  bool divide_by_count;
  double* partial_sum;            // [blocks], forward
  int64_t* partial_count;         // [blocks], forward
  Array grad_loss;                // [], backward of scalar reductions
  const int64_t* count;           // [], backward
  Array grad_prediction, grad_target, grad_weighting;
};

// Which factors of a term go into a weight.
struct Factors {
  bool weighting, loss;
};

// Where one item lies.
struct Item {
  int64_t offset[kOperands];  // of its row
  int64_t begin, end;         // columns
  bool exists, on;            // on: the mask does not drop the whole row
};

__device__ __forceinline__ bool varies(const SquaredErrorParams& q, const Array& array, Operand o) {
  return array.data != nullptr && q.layout.col_stride[o] != 0;
}

__device__ __forceinline__ Item item_at(const SquaredErrorParams& q, int64_t index) {
  Item item = {};
  item.exists = index < q.items;
  if (!item.exists) return item;
  const Layout& layout = q.layout;
  int64_t row = q.col_items == 1 ? index : index / q.col_items;
  item.begin = (index - row * q.col_items) * q.cols_per_item;
  item.end = min(item.begin + q.cols_per_item, layout.cols);
  for (int d = layout.outer - 1; d >= 0; --d) {
    // The slowest dimension needs no division, so the usual one or two row dimensions need one at most.
    const int64_t quotient = d > 0 ? row / layout.outer_size[d] : 0;
    const int64_t i = row - quotient * layout.outer_size[d];
    for (int o = 0; o < kOperands; ++o) item.offset[o] += i * layout.outer_stride[d][o];
    row = quotient;
  }
  if (item.begin == item.end) return item;  // no columns: what the row shares may not exist either
  item.on = q.mask.data == nullptr || varies(q, q.mask, kMask) || is_on(q.mask, item.offset[kMask]);
  return item;
}

// The edit mask's m. An integer is on where it is not 0, as in any mask: 255 is 1.
template <class A>
__device__ __forceinline__ A load_edit(const Array& array, int64_t offset) {
  return is_integer(array.kind) ? A(is_on(array, offset)) : load<A>(array, offset);
}

// Product of the factors that one row shares.
template <class A>
__device__ __forceinline__ A row_factor(const SquaredErrorParams& q, const Item& item, Factors use) {
  A factor = q.edit_mask.data ? A(1) : A(q.background);
  if (q.edit_mask.data && !varies(q, q.edit_mask, kEditMask)) {
    const A m = load_edit<A>(q.edit_mask, item.offset[kEditMask]);
    factor = edit_weight<A>(m, A(q.foreground), A(q.background));
  }
  if (use.weighting && q.weighting.data && !varies(q, q.weighting, kWeighting)) {
    factor *= load<A>(q.weighting, item.offset[kWeighting]);
  }
  if (use.loss && q.loss.data && !varies(q, q.loss, kLoss)) {
    factor *= load<A>(q.loss, item.offset[kLoss]);
  }
  return factor;
}

// Product of the factors of one element that its row does not share.
template <class A>
__device__ __forceinline__ A element_factor(const SquaredErrorParams& q, const Item& item, int64_t col,
                                            Factors use) {
  const int64_t* stride = q.layout.col_stride;
  auto place = [&](Operand o) { return item.offset[o] + col * stride[o]; };
  A factor = 1;
  if (varies(q, q.edit_mask, kEditMask)) {
    const A m = load_edit<A>(q.edit_mask, place(kEditMask));
    factor = edit_weight<A>(m, A(q.foreground), A(q.background));
  }
  if (use.weighting && varies(q, q.weighting, kWeighting)) {
    factor *= load<A>(q.weighting, place(kWeighting));
  }
  if (use.loss && varies(q, q.loss, kLoss)) factor *= load<A>(q.loss, place(kLoss));
  return factor;
}

// Reads kVector neighbouring elements. T: the dtype that prediction and target share, with unit column
// stride and, for kVector > 1, aligned rows.
template <class T, int kVectorLength>
struct DirectReader {
  using A = accumulate_t<T>;
  using Output = T;
  static constexpr int kVector = kVectorLength;
  static __device__ __forceinline__ void read(const Array& array, int64_t offset, A* out) {
    using P = Pack<T, kVector>;
    const P pack = *reinterpret_cast<const P*>(static_cast<const T*>(array.data) + offset);
    for (int i = 0; i < kVector; ++i) out[i] = widen(pack.value[i]);
  }
  static __device__ __forceinline__ void write(const Array& array, int64_t offset, const A* values) {
    using P = Pack<T, kVector>;
    P pack;
    for (int i = 0; i < kVector; ++i) pack.value[i] = static_cast<T>(values[i]);
    *reinterpret_cast<P*>(static_cast<T*>(array.data) + offset) = pack;
  }
};

// Any dtypes and strides, one element at a time.
template <class Accumulator>
struct AnyReader {
  using A = Accumulator;
  static constexpr int kVector = 1;
  static __device__ __forceinline__ void read(const Array& array, int64_t offset, A* out) {
    *out = load<A>(array, offset);
  }
  static __device__ __forceinline__ void write(const Array& array, int64_t offset, const A* values) {
    switch (array.kind) {
      case Kind::kDouble: static_cast<double*>(array.data)[offset] = *values; break;
      case Kind::kHalf: static_cast<c10::Half*>(array.data)[offset] = static_cast<float>(*values); break;
      case Kind::kBFloat16:
        static_cast<c10::BFloat16*>(array.data)[offset] = static_cast<float>(*values);
        break;
      default: static_cast<float*>(array.data)[offset] = static_cast<float>(*values);
    }
  }
};

// The elements of one load, with their masks.
template <class Reader>
struct Elements {
  typename Reader::A prediction[Reader::kVector], target[Reader::kVector];
  bool on[Reader::kVector];
};

template <class Reader>
__device__ __forceinline__ Elements<Reader> read_elements(const SquaredErrorParams& q, const Item& item,
                                                          int64_t col) {
  const int64_t* stride = q.layout.col_stride;
  Elements<Reader> e = {};
  bool any = false;
  for (int i = 0; i < Reader::kVector; ++i) {
    e.on[i] = item.on && (!varies(q, q.mask, kMask) ||
                          is_on(q.mask, item.offset[kMask] + (col + i) * stride[kMask]));
    any = any || e.on[i];
  }
  if (any) {
    Reader::read(q.prediction, item.offset[kPrediction] + col * stride[kPrediction], e.prediction);
    Reader::read(q.target, item.offset[kTarget] + col * stride[kTarget], e.target);
  }
  return e;
}

// One lane's walk over the packs of its item; the last columns of a row that fill no pack are left to
// `Tail`, which reads one element at a time. f is called with the reader, the elements and the column.
template <class Reader, class Tail, class F>
__device__ __forceinline__ void for_elements(const SquaredErrorParams& q, const Item& item, int lane,
                                             bool read_dropped, F f) {
  if (!item.exists || !(item.on || read_dropped)) return;
  const int64_t whole = item.begin + (item.end - item.begin) / Reader::kVector * Reader::kVector;
  const int64_t step = int64_t(q.lanes) * Reader::kVector;
  for (int64_t col = item.begin + int64_t(lane) * Reader::kVector; col < whole; col += step) {
    f(Reader{}, read_elements<Reader>(q, item, col), col);
  }
  if constexpr (Reader::kVector > 1) {
    for (int64_t col = whole + lane; col < item.end; col += q.lanes) {
      f(Tail{}, read_elements<Tail>(q, item, col), col);
    }
  }
}

// Calls f(item, lane) for the items of this warp's groups, the same number of times in every lane.
template <class F>
__device__ __forceinline__ void for_items(const SquaredErrorParams& q, F f) {
  const int lane = threadIdx.x % q.lanes;
  const int64_t groups_per_warp = kWarpSize / q.lanes;
  const int64_t warp = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / kWarpSize;
  const int64_t warps = int64_t(gridDim.x) * blockDim.x / kWarpSize;
  const int64_t group = threadIdx.x % kWarpSize / q.lanes;
  for (int64_t first = warp * groups_per_warp; first < q.items; first += warps * groups_per_warp) {
    f(item_at(q, first + group), lane);
  }
}

}  // namespace masked_loss_ext::cuda
