// SPDX-License-Identifier: BSD-3-Clause
// masked_cross_entropy on CUDA, backward. A thread per row makes the coefficients, in double; then one
// read of the rows that count and one write of every row of the gradient, which may lie over the logits.
#pragma once

#include "cross_entropy/cuda/items.cuh"

namespace masked_loss_ext::cuda {

template <class A>
struct BackwardInputs {
  const A *grad_loss, *grad_lse, *grad_entropy, *grad_log_prob;  // [rows] each, or null
  const A* row_sums;                                             // [rows, kRowSums]
  const A *entropy, *log_prob, *smooth_distance;                 // [rows] each, or null
  const double* denominator;                                     // []
  const double* weight_sum;  // [], where there are class weights and label smoothing, or null
  bool one_grad_loss;        // grad_loss is []
  A* grad_token_weight;      // [rows] or null
};

// d / d logit of a row, but for 1 - u^2: (probability - entropy_scale (ln p + entropy)) p - smoothing w,
// with ln p = (u - base) scale - log_sum, and at the label what `target` says.
template <class A>
struct RowGradient {
  A probability, entropy_scale, entropy, base, log_sum, smoothing, target;
  int64_t label;
};

template <class A>
__device__ __forceinline__ double saved(const A* values, int64_t row) {
  return values != nullptr ? double(values[row]) : 0;
}

// d L / d (loss of this row), the denominator included.
template <class A>
__device__ __forceinline__ double row_loss_gradient(const BackwardInputs<A>& in, int64_t row) {
  if (in.grad_loss == nullptr) return 0;
  const double denominator = *in.denominator;
  if (denominator == 0) return 0;
  return double(in.grad_loss[in.one_grad_loss ? 0 : row]) / denominator;
}

template <class A>
__device__ __forceinline__ RowGradient<A> row_gradient_of(const CrossEntropyParams& q,
                                                          const BackwardInputs<A>& in,
                                                          const RowResult& r, int64_t row,
                                                          int64_t label, double loss_gradient) {
  RowGradients g;
  g.loss = label >= 0 ? loss_gradient * token_weight_at(q, row) : 0;
  g.lse = saved(in.grad_lse, row);
  g.entropy = saved(in.grad_entropy, row);
  g.log_prob = label >= 0 ? saved(in.grad_log_prob, row) : 0;
  const double w_y = weight_at(q, label), scale = scale_of<double>(q);
  const RowCoefficients k = coefficients_of(q.options, r, g, w_y, sum_of_weights(q, in.weight_sum),
                                            q.rows.classes);
  // d z / d logit is 1 / T, with softcap (1 - u^2) / T.
  const double per_z = q.options.softcap > 0 ? scale / q.options.softcap : scale;
  RowGradient<A> out;
  out.probability = A(k.probability * per_z);
  out.entropy_scale = A(k.entropy_scale * per_z);
  out.entropy = A(k.entropy);
  out.base = A(r.highest);
  out.log_sum = A(r.log_sum);
  out.smoothing = A(k.smoothing * per_z);
  out.target = label >= 0 ? A(target_gradient(k, r.log_prob, w_y) * per_z) : A(0);
  out.label = label;
  return out;
}

// Position row + shift is the only one whose label this row sees; the first `shift` ones of each row
// length are nobody's.
template <class A>
__device__ __forceinline__ void write_token_weight_gradient(const CrossEntropyParams& q, A* out,
                                                            int64_t row, double gradient) {
  const int64_t shift = q.rows.shift;
  const int64_t at = shift > 0 ? row % q.rows.row_length : 0;
  if (at + shift < q.rows.row_length || shift == 0) out[row + shift] = A(gradient);
  if (at < shift) out[row] = A(0);
}

// grid: ceil(rows / block); block: kThreads.
template <class A>
__global__ void __launch_bounds__(kThreads, kBlocksAtLeast)
    cross_entropy_row_gradients_kernel(CrossEntropyParams q, BackwardInputs<A> in,
                                       RowGradient<A>* gradients)  // [rows]
{
  const int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= q.rows.rows) return;
  const int64_t label = label_at(q, row);
  RowGradient<A> gradient = {};
  gradient.label = label;
  double token_weight_gradient = label == kBadLabel ? double(NAN) : 0;
  if (label >= 0 || label == kNoLabel) {
    RowResult r;
    set_row_sums(r, in.row_sums, row, scale_of<double>(q));
    r.entropy = saved(in.entropy, row);
    r.log_prob = saved(in.log_prob, row);
    r.smooth_distance = saved(in.smooth_distance, row);
    const double loss_gradient = row_loss_gradient(in, row);
    gradient = row_gradient_of(q, in, r, row, label, loss_gradient);
    if (in.grad_token_weight != nullptr && label >= 0) {
      token_weight_gradient =
          loss_gradient * row_loss(q.options, r, weight_at(q, label), q.rows.classes);
    }
  }
  gradients[row] = gradient;
  if (in.grad_token_weight != nullptr) {
    write_token_weight_gradient(q, in.grad_token_weight, row, token_weight_gradient);
  }
}

// Gradient of single logits of one row. kFull: with entropy, label smoothing or softcap.
template <class T, bool kFull>
struct GradientWriter {
  using A = accumulate_t<T>;
  static constexpr int kPacks = kPacksAtOnce<T, kFull>;

  const T* row;     // [V]
  T* out;           // [V], may be row
  const A* weight;  // [V] or null
  RowGradient<A> k;
  A scale;
  Unit<A> unit;
  Exponential<A> exponential;

  __device__ GradientWriter(const CrossEntropyParams& q, T* grad, const RowItem& item,
                            const RowGradient<A>& k)
      : row(static_cast<const T*>(q.logits.data) + offset_at(q.layout, kPrediction, item.row)),
        out(grad + offset_at(q.layout, kGrad, item.row)),
        weight(static_cast<const A*>(q.weight.data)),
        k(k),
        scale(scale_of<A>(q)),
        unit(q),
        exponential(A(1)) {}

  // Which of the columns from `col` on is the label's; negative for none.
  template <int kVector>
  __device__ __forceinline__ int label_from(int64_t col) const {
    const uint64_t offset = static_cast<uint64_t>(k.label - col);
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

  template <bool kAll>
  __device__ __forceinline__ void write_packs(int64_t col, int64_t step, int64_t end, bool aligned) {
    Vector<T> packs[kPacks];
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      if (kAll || col + i * step < end) packs[i] = load(row + col + i * step, aligned);
    }
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int64_t first = col + i * step;
      if (!kAll && first >= end) continue;
      replace(packs[i].value, first);
      *reinterpret_cast<Vector<T>*>(out + first) = packs[i];
    }
  }

  __device__ __forceinline__ void write(const Stretch& s, int lane, int team) {
    const bool aligned = elements_off_boundary(row) == elements_off_boundary(out);
    for (int i = lane; i < s.single_columns; i += team) {
      const int64_t col = s.single(i);
      T value[1] = {row[col]};
      replace(value, col);
      out[col] = value[0];
    }
    for_packs<kPacks, kVectorOf<T>>(s, lane, team, [&](int64_t col, int64_t step, auto all) {
      write_packs<decltype(all)::value>(col, step, s.end, aligned);
    });
  }

  __device__ __forceinline__ void fill(const Stretch& s, int lane, int team, T value) {
    for (int i = lane; i < s.single_columns; i += team) out[s.single(i)] = value;
    Vector<T> pack;
#pragma unroll
    for (int j = 0; j < kVectorOf<T>; ++j) pack.value[j] = value;
    const int64_t step = int64_t(team) * kVectorOf<T>;
    for (int64_t col = s.begin + int64_t(lane) * kVectorOf<T>; col < s.end; col += step) {
      *reinterpret_cast<Vector<T>*>(out + col) = pack;
    }
  }
};

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
  GradientWriter<T, kFull> writer(q, grad_logits, item, gradients[item.row]);
  const Stretch s = stretch_of(q, writer.out, item.part);
  const int64_t label = writer.k.label;
  if (label >= 0 || label == kNoLabel) {
    writer.write(s, item.lane, q.team);
  } else {
    const A value = label == kBadLabel ? A(NAN) : A(0);
    writer.fill(s, item.lane, q.team, static_cast<T>(value));
  }
}

}  // namespace masked_loss_ext::cuda
