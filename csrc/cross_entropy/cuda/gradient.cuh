// SPDX-License-Identifier: BSD-3-Clause
// masked_cross_entropy on CUDA, backward. A thread per row makes the coefficients, in double; then one
// read of the rows that count and one write of every row of the gradient, which may lie over the logits.
#pragma once

#include "cross_entropy/cuda/items.cuh"

namespace masked_loss_ext::cuda {

// d / d logit of a row, but for 1 - u^2: (probability - entropy_scale (ln p + entropy)) p - smoothing w,
// with ln p = (u - base) scale - log_sum, and at the label what `target` says.
template <class A>
struct RowGradient {
  A probability, entropy_scale, entropy, base, log_sum, smoothing, target;
  int64_t label;
};

// d L / d (loss of this row), the denominator included.
template <class A>
__device__ __forceinline__ double row_loss_gradient(const CrossEntropyParams& q, int64_t row) {
  if (q.grad_loss.data == nullptr) return 0;
  const double denominator = *static_cast<const double*>(q.totals.data);
  if (denominator == 0) return 0;
  return entry<A>(q.grad_loss, q.reduction == RowReduction::kNone ? row : 0) / denominator;
}

// row: as place_of() says. weights: the sum of w.
template <class A>
__device__ __forceinline__ RowGradient<A> row_gradient_of(const CrossEntropyParams& q, const RowResult& r,
                                                          int64_t row, int64_t label, double weights,
                                                          double loss_gradient) {
  const RowCoefficients k =
      coefficients_at<A, DeviceElements>(q, r, row, label, weights, loss_gradient);
  const double scale = scale_of<double>(q, row);
  // d z / d logit is 1 / T, with softcap (1 - u^2) / T.
  const double per_z = q.options.softcap > 0 ? scale / q.options.softcap : scale;
  RowGradient<A> out;
  out.probability = A(k.probability * per_z);
  out.entropy_scale = A(k.entropy_scale * per_z);
  out.entropy = A(k.entropy);
  out.base = A(r.highest);
  out.log_sum = A(r.log_sum);
  out.smoothing = A(k.smoothing * per_z);
  out.target = label >= 0 ? A(target_gradient(k, r.log_prob, class_weight<A>(q, label)) * per_z) : A(0);
  out.label = label;
  return out;
}

// grid: ceil(rows / block); block: kThreads.
template <class A>
__global__ void __launch_bounds__(kThreads, kBlocksAtLeast)
    cross_entropy_row_gradients_kernel(CrossEntropyParams q,
                                       RowGradient<A>* gradients)  // [rows]
{
  const int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= q.counted.rows) return;
  const int64_t place = place_of(q.counted, row), label = label_at(q, place);
  RowGradient<A> gradient = {};
  gradient.label = label;
  double token_weight_gradient = label == kBadLabel ? double(NAN) : 0;
  if (label >= 0 || label == kNoLabel) {
    const RowResult r = saved_row<A>(q, place, scale_of<double>(q, place));
    const double loss_gradient = row_loss_gradient<A>(q, place);
    gradient = row_gradient_of<A>(q, r, place, label, entry<double>(q.totals, 1), loss_gradient);
    if (q.grad_token_weight.data != nullptr && label >= 0) {
      token_weight_gradient =
          loss_gradient * row_loss(q.options, r, class_weight<A>(q, label), q.counted.classes);
    }
  }
  gradients[row] = gradient;
  put_token_gradient<A>(q, place, token_weight_gradient);
}

// Gradient of single logits of one row. kFull: with entropy, label smoothing or softcap.
template <class T, bool kFull>
struct GradientWriter {
  using A = accumulate_t<T>;
  static constexpr int kPacks = kPacksAtOnce<T, kFull>;

  const A* weight;  // [columns] or null
  RowGradient<A> k;
  int64_t own;  // the label's column
  A scale;
  Unit<A> unit;
  Exponential<A> exponential;

  __device__ GradientWriter(const CrossEntropyParams& q, int64_t place, const RowGradient<A>& k)
      : weight(column_weights<A>(q)),
        k(k),
        own(label_column(q.counted, k.label)),
        scale(scale_of<A>(q, place)),
        unit(q),
        exponential(A(1)) {}

  // Which of the columns from `col` on is the label's; negative for none.
  template <int kVector>
  __device__ __forceinline__ int label_from(int64_t col) const {
    const uint64_t offset = static_cast<uint64_t>(own - col);
    return offset < kVector ? static_cast<int>(offset) : -1;
  }

  // A banned class (-inf) has none, be it the label.
  __device__ __forceinline__ A gradient_of(A logit, A u, int64_t col, bool is_label) const {
    const A log_p = (u - k.base) * scale - k.log_sum, p = exponential(log_p);
    A gradient = k.probability * p;
    if (kFull) {
      if (k.entropy_scale != 0) {
        gradient -= k.entropy_scale * (max(log_p, A(-1e30f)) + k.entropy) * p;
      }
      if (k.smoothing != 0) gradient -= k.smoothing * (weight != nullptr ? weight[col] : A(1));
    }
    gradient = is_label ? k.target : gradient;
    if (kFull && unit.capped()) gradient *= 1 - u * u;
    return logit == -A(INFINITY) ? A(0) : gradient;
  }

  // Logits of columns from `col` on become their gradients.
  template <int kCount>
  __device__ __forceinline__ void replace(T (&values)[kCount], int64_t col) const {
    const int label = label_from<kCount>(col);
    A logits[kCount], u[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) logits[j] = u[j] = widen(values[j]);
    if (kFull) unit.apply(u);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      values[j] = static_cast<T>(gradient_of(logits[j], u[j], col + j, j == label));
    }
  }

  template <class Source>
  __device__ __forceinline__ void write(const Stretch& s, int lane, int team, const Source& source,
                                        T* out) const {
    rewrite<kPacks>(s, lane, team, source, out,
                    [&](auto& values, int64_t col) { this->replace(values, col); });
  }
};

// What stands in a row of the gradient that is not computed.
template <class T>
__device__ __forceinline__ T constant_gradient(int64_t label) {
  return static_cast<T>(label == kBadLabel ? accumulate_t<T>(NAN) : accumulate_t<T>(0));
}

// block: a multiple of q.team; as many blocks as q.parts of all rows need. Each thread reads what it
// writes over, so that the gradient may lie over the logits.
template <class T, bool kFull>
__global__ void __launch_bounds__(kThreads, kBlocksAtLeast)
    cross_entropy_gradient_kernel(CrossEntropyParams q,
                                  const RowGradient<accumulate_t<T>>* gradients,  // [rows]
                                  T* grad_logits)                                 // [rows, V]
{
  using A = accumulate_t<T>;
  const RowItem item = item_of(q);
  if (!item.exists) return;
  const RowGradient<A> gradient = gradients[item.row];
  T* out = grad_logits + offset_at(q.layout, kGrad, item.row);
  const Stretch s = stretch_of(q, out, item.part);
  if (gradient.label < 0 && gradient.label != kNoLabel) {
    return fill(s, item.lane, q.team, out, constant_gradient<T>(gradient.label));
  }
  const T* row = static_cast<const T*>(q.logits.data) + offset_at(q.layout, kPrediction, item.row);
  const GradientWriter<T, kFull> writer(q, place_of(q.counted, item.row), gradient);
  writer.write(s, item.lane, q.team, RowMemory<T>{row, same_boundaries<T>(row, out)}, out);
}

}  // namespace masked_loss_ext::cuda
