// SPDX-License-Identifier: BSD-3-Clause
// How the kernels of masked_cross_entropy walk. A row, or a part of a long one, belongs to a team: 1 to
// 32 neighbouring lanes, or a whole block. What lies between the first and the last 16-byte boundary of
// the part is moved by packs of 16 bytes whatever V and the row stride are; the few elements before and
// after are moved one by one. A row that does not count is not read.
//
// Kernels work in the unit u: the logit, or tanh(logit / softcap); z = u * scale, scale = softcap / T.
#pragma once

#include <cfloat>
#include <type_traits>

#include "common/cuda/elements.cuh"
#include "common/cuda/reduce.cuh"
#include "common/layout.h"
#include "cross_entropy/formula.h"

namespace masked_loss_ext::cuda {

constexpr int kThreads = 256;      // of the largest block
// Resident per multiprocessor: 128 registers a thread. Left to itself ptxas takes 64 and spills.
constexpr int kBlocksAtLeast = 2;
// Loads in flight per thread. What full kernels do with 8 halves, and all with doubles, needs the registers.
template <class T, bool kFull>
constexpr int kPacksAtOnce = (kFull && sizeof(T) != 4) || sizeof(T) == 8 ? 2 : 4;

struct CrossEntropyParams {
  CountedRows rows;
  CrossEntropyOptions options;
  Layout layout;  // of the rows of the logits (kPrediction) and of their gradient (kGrad)
  Array logits, weight, token_weight, temperature;
  bool statistics;         // entropy and hit are wanted
  int team;                // threads per part: a power of two up to 32, or the block
  int64_t parts;           // per row
  int64_t packs_per_part;
};

struct DeviceElements {
  static __device__ __forceinline__ int64_t integer(const Array& array, int64_t i) {
    return load<int64_t>(array, i);
  }
  static __device__ __forceinline__ bool is_on(const Array& array, int64_t i) {
    return cuda::is_on(array, i);
  }
};

__device__ __forceinline__ int64_t label_at(const CrossEntropyParams& q, int64_t row) {
  return label_of<DeviceElements>(q.rows, row);
}

template <class A>
__device__ __forceinline__ A scale_of(const CrossEntropyParams& q) {
  const A cap = q.options.softcap > 0 ? A(q.options.softcap) : A(1);
  return q.temperature.data != nullptr ? cap / load<A>(q.temperature, 0) : cap;
}

__device__ __forceinline__ double weight_at(const CrossEntropyParams& q, int64_t label) {
  return q.weight.data != nullptr && label >= 0 ? load<double>(q.weight, label) : 1;
}

__device__ __forceinline__ double sum_of_weights(const CrossEntropyParams& q, const double* weight_sum) {
  return weight_sum != nullptr ? *weight_sum : double(q.rows.classes);
}

__device__ __forceinline__ double token_weight_at(const CrossEntropyParams& q, int64_t row) {
  return q.token_weight.data != nullptr ? load<double>(q.token_weight, row + q.rows.shift) : 1;
}

// e^(scale * x). In float a result below the normal numbers becomes 0: it is added to 1 or more, or is
// a gradient of its size.
struct FloatExponential {
  float factor;
  explicit __device__ FloatExponential(float scale) : factor(scale * 1.44269504f) {}
  __device__ __forceinline__ float operator()(float x) const {
#ifdef MASKED_LOSS_EXT_CUDA_SIM
    return exp2f(x * factor);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * factor));
    return y;
#endif
  }
};

struct DoubleExponential {
  double scale;
  explicit __device__ DoubleExponential(double scale) : scale(scale) {}
  __device__ __forceinline__ double operator()(double x) const { return exp(x * scale); }
};

template <class A> struct ExponentialOf { using type = FloatExponential; };
template <> struct ExponentialOf<double> { using type = DoubleExponential; };
template <class A> using Exponential = typename ExponentialOf<A>::type;

__device__ __forceinline__ float hyperbolic_tangent(float x) { return tanhf(x); }
__device__ __forceinline__ double hyperbolic_tangent(double x) { return tanh(x); }

// What exponents are taken from: where all is -inf so far any finite number gives 0, and NaN for NaN; below
// +inf one gives inf there, and 0 at what is finite.
__device__ __forceinline__ float finite_base(float largest) {
  return largest == -INFINITY ? 0.0f : min(largest, FLT_MAX);
}
__device__ __forceinline__ double finite_base(double largest) {
  return largest == -double(INFINITY) ? 0.0 : min(largest, DBL_MAX);
}

// From logits to u. The branch is the same for a whole launch: take it once for many logits.
template <class A>
struct Unit {
  A per_cap;  // 1 / softcap, or 0
  explicit __device__ Unit(const CrossEntropyParams& q)
      : per_cap(q.options.softcap > 0 ? A(1 / q.options.softcap) : A(0)) {}
  __device__ __forceinline__ bool capped() const { return per_cap > 0; }
  template <int kCount>
  __device__ __forceinline__ void apply(A (&logits)[kCount]) const {
    if (!capped()) return;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const A u = hyperbolic_tangent(logits[j] * per_cap);
      logits[j] = logits[j] == -A(INFINITY) ? logits[j] : u;  // what is banned stays so
    }
  }
};

// u at the label.
template <class A>
__device__ __forceinline__ double unit_at(const CrossEntropyParams& q, int64_t row, int64_t label) {
  A u[1] = {load<A>(q.logits, offset_at(q.layout, kPrediction, row) + label)};
  Unit<A>(q).apply(u);
  return double(u[0]);
}

// Which part of which row this thread works on, and as which of its team.
struct RowItem {
  int64_t row, part;
  int lane;
  bool exists;
};

__device__ __forceinline__ RowItem item_at(const CrossEntropyParams& q, int64_t index) {
  const unsigned team = static_cast<unsigned>(q.team);
  RowItem item;
  item.row = q.parts == 1 ? index : index / q.parts;
  item.part = index - item.row * q.parts;
  item.lane = static_cast<int>(threadIdx.x & (team - 1));
  item.exists = item.row < q.rows.rows;
  return item;
}

__device__ __forceinline__ RowItem item_of(const CrossEntropyParams& q) {
  const unsigned team = static_cast<unsigned>(q.team);
  return item_at(q, int64_t(blockIdx.x) * (blockDim.x / team) + threadIdx.x / team);
}

// The columns of one part: packs from `begin` to `end`, and single ones before the first and behind the
// last pack of the row.
struct Stretch {
  int64_t begin, end, tail;
  int head_columns, single_columns;

  __device__ __forceinline__ int64_t single(int i) const {
    return i < head_columns ? i : tail + (i - head_columns);
  }
};

template <class T>
__device__ __forceinline__ int elements_off_boundary(const T* row) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(row) / sizeof(T) % kVectorOf<T>);
}

template <class T>
__device__ __forceinline__ Stretch stretch_of(const CrossEntropyParams& q, const T* row, int64_t part) {
  constexpr int kVector = kVectorOf<T>;
  const int64_t classes = q.rows.classes;
  const int off = elements_off_boundary(row);
  const int64_t head = min(int64_t(off > 0 ? kVector - off : 0), classes);
  const int64_t packs = (classes - head) / kVector;
  const int64_t first = min(part * q.packs_per_part, packs);
  const int64_t last = min(first + q.packs_per_part, packs);
  Stretch s;
  s.begin = head + first * kVector;
  s.end = head + last * kVector;
  s.tail = head + packs * kVector;
  s.head_columns = part == 0 ? static_cast<int>(head) : 0;
  s.single_columns = s.head_columns + (part == q.parts - 1 ? static_cast<int>(classes - s.tail) : 0);
  return s;
}

// Calls f(first column, step between packs, all kPacks there) for this lane's packs.
template <int kPacks, int kVector, class F>
__device__ __forceinline__ void for_packs(const Stretch& s, int lane, int team, F f) {
  const int64_t step = int64_t(team) * kVector;
  int64_t col = s.begin + int64_t(lane) * kVector;
  for (; col + (kPacks - 1) * step < s.end; col += kPacks * step) {
    f(col, step, std::true_type{});
  }
  if (col < s.end) f(col, step, std::false_type{});
}

template <class T>
using Vector = Pack<T, kVectorOf<T>>;

template <class T>
__device__ __forceinline__ Vector<T> load_pack(const T* at) {
  return *reinterpret_cast<const Vector<T>*>(at);
}

// The same where packs lie on the boundaries of another array, and on those of this one if `aligned`.
template <class T>
__device__ __forceinline__ Vector<T> load(const T* at, bool aligned) {
  if (aligned) return load_pack(at);
  Vector<T> pack;
#pragma unroll
  for (int j = 0; j < kVectorOf<T>; ++j) pack.value[j] = at[j];
  return pack;
}

// grid: 1; block: kThreads.
template <class A>
__global__ void __launch_bounds__(kThreads)
    weight_sum_kernel(const A* weight,  // [count]
                      int64_t count,
                      double* sum)  // []
{
  __shared__ double sums[kMaxWarps];
  double mine = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) mine += double(weight[i]);
  mine = block_sum(mine, sums);
  if (threadIdx.x == 0) *sum = mine;
}

}  // namespace masked_loss_ext::cuda
