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

// A problem, and how its rows are cut.
struct CrossEntropyParams : RowProblem {
  int team = 1;       // threads per part: a power of two up to 32, or the block
  int64_t parts = 1;  // per row
  int64_t packs_per_part = 0;
};

struct DeviceElements {
  static __device__ __forceinline__ int64_t integer(const Array& array, int64_t i) {
    return load<int64_t>(array, i);
  }
  static __device__ __forceinline__ bool is_on(const Array& array, int64_t i) {
    return cuda::is_on(array, i);
  }
  static __device__ __forceinline__ double number(const Array& array, int64_t i) {
    return load<double>(array, i);
  }
};

__device__ __forceinline__ int64_t label_at(const CrossEntropyParams& q, int64_t row) {
  return label_of<DeviceElements>(q.counted, row);
}

__device__ __forceinline__ RowResult not_a_number() {
  RowResult r;
  r.highest = r.log_sum = r.lse = r.entropy = r.log_prob = r.smooth_distance = r.loss = NAN;
  return r;
}

// Of a row that counts; NaN where its temperature is not positive and finite.
template <class A>
__device__ __forceinline__ A scale_of(const CrossEntropyParams& q, int64_t place) {
  const A cap = q.options.softcap > 0 ? A(q.options.softcap) : A(1);
  if (q.temperature.data == nullptr) return cap;
  const A temperature = load<A>(q.temperature, q.temperature_per_row ? place : 0);
  return temperature > 0 && temperature < A(INFINITY) ? cap / temperature : A(NAN);
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

// u at the label, where its column is here; else 0.
template <class A>
__device__ __forceinline__ double label_unit(const CrossEntropyParams& q, int64_t row, int64_t label) {
  const int64_t own = label_column(q.counted, label);
  if (own < 0 || own >= q.counted.columns) return 0;
  A u[1] = {load<A>(q.logits, offset_at(q.layout, kPrediction, row) + own)};
  Unit<A>(q).apply(u);
  return double(u[0]);
}

// The class weights of the columns at hand, or null.
template <class A>
__device__ __forceinline__ const A* column_weights(const CrossEntropyParams& q) {
  const A* weight = static_cast<const A*>(q.weight.data);
  return weight != nullptr ? weight + q.counted.first : nullptr;
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
  item.exists = item.row < q.counted.rows;
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
  const int64_t columns = q.counted.columns;
  const int off = elements_off_boundary(row);
  const int64_t head = min(int64_t(off > 0 ? kVector - off : 0), columns);
  const int64_t packs = (columns - head) / kVector;
  const int64_t first = min(part * q.packs_per_part, packs);
  const int64_t last = min(first + q.packs_per_part, packs);
  Stretch s;
  s.begin = head + first * kVector;
  s.end = head + last * kVector;
  s.tail = head + packs * kVector;
  s.head_columns = part == 0 ? static_cast<int>(head) : 0;
  s.single_columns = s.head_columns + (part == q.parts - 1 ? static_cast<int>(columns - s.tail) : 0);
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

// A row in memory. Packs lie on the boundaries of what is written, which are those of the row if `aligned`.
template <class T>
struct RowMemory {
  const T* row;  // [V]
  bool aligned;

  __device__ __forceinline__ T single(int, int64_t col) const { return row[col]; }
  __device__ __forceinline__ Vector<T> pack(int64_t col) const {
    if (aligned) return load_pack(row + col);
    Vector<T> pack;
#pragma unroll
    for (int j = 0; j < kVectorOf<T>; ++j) pack.value[j] = row[col + j];
    return pack;
  }
};

template <class T>
__device__ __forceinline__ bool same_boundaries(const T* a, const T* b) {
  return elements_off_boundary(a) == elements_off_boundary(b);
}

// Writes the part of a row: f(values, column of the first) turns what `source` has there into what is
// written. Each thread writes where it has read, so `out` may be the source.
template <int kPacks, class T, class Source, class F>
__device__ __forceinline__ void rewrite(const Stretch& s, int lane, int team, const Source& source, T* out,
                                        F f) {
  for (int i = lane; i < s.single_columns; i += team) {
    const int64_t col = s.single(i);
    T value[1] = {source.single(i, col)};
    f(value, col);
    out[col] = value[0];
  }
  for_packs<kPacks, kVectorOf<T>>(s, lane, team, [&](int64_t col, int64_t step, auto all) {
    constexpr bool kAll = decltype(all)::value;
    Vector<T> packs[kPacks];
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      if (kAll || col + i * step < s.end) packs[i] = source.pack(col + i * step);
    }
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int64_t first = col + i * step;
      if (!kAll && first >= s.end) continue;
      f(packs[i].value, first);
      *reinterpret_cast<Vector<T>*>(out + first) = packs[i];
    }
  });
}

template <class T>
__device__ __forceinline__ void fill(const Stretch& s, int lane, int team, T* out, T value) {
  for (int i = lane; i < s.single_columns; i += team) out[s.single(i)] = value;
  Vector<T> pack;
#pragma unroll
  for (int j = 0; j < kVectorOf<T>; ++j) pack.value[j] = value;
  const int64_t step = int64_t(team) * kVectorOf<T>;
  for (int64_t col = s.begin + int64_t(lane) * kVectorOf<T>; col < s.end; col += step) {
    *reinterpret_cast<Vector<T>*>(out + col) = pack;
  }
}

}  // namespace masked_loss_ext::cuda
