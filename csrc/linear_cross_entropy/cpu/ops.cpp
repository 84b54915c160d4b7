// SPDX-License-Identifier: BSD-3-Clause
// The logit-free cross entropy on CPU: which rows take part, their copies, the passes over their logits.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <vector>

#include "common/cpu/device.h"
#include "common/cpu/memory.h"
#include "common/cpu/parallel.h"
#include "cross_entropy/cpu/rows.h"
#include "linear_cross_entropy/cpu/products.h"
#include "linear_cross_entropy/vocab_parallel.h"

namespace masked_loss_ext {
namespace {

constexpr int64_t kCopyBytes = int64_t(1) << 16;  // at a time

bool takes_part(const char* op, const RowProblem& q, const Tensor& like, int64_t row) {
  const int64_t label = label_of<HostElements>(q.counted, row);
  if (label == kBadLabel) refuse_label(op, q, like, row);
  if (label == kNotCounted) return false;
  check_temperature_of(op, q, like, row);
  return true;
}

bool anything_flows(const RowProblem& q, int64_t row) {
  return q.row_sums.kind == Kind::kDouble ? receives<double>(q, row) : receives<float>(q, row);
}

// f(row of all, row of those that take part), chunks of them at once.
template <class F>
void for_each_row(const KeptRows& kept, int64_t row_bytes, const F& f) {
  const int64_t at_once = std::max<int64_t>(kCopyBytes / std::max<int64_t>(row_bytes, 1), 1);
  const auto* index = static_cast<const int64_t*>(kept.index.const_data_ptr());
  for_each_chunk((kept.count + at_once - 1) / at_once, [&](int64_t chunk) {
    const int64_t end = std::min((chunk + 1) * at_once, kept.count);
    for (int64_t i = chunk * at_once; i < end; ++i) f(index[i], i);
  });
}

// What a call's chunks add up to.
class CpuLosses {
 public:
  CpuLosses(const char* op, const RowProblem& q, const Tensor& like)
      : op_(op), q_(q), like_(like), given_(given_denominator(op, q)) {
    put_class_weights(q);
  }

  // Before sweep(): the denominator, which labels and class weights tell.
  void count() {
    denominator_ = denominator_of(q_, count_rows(q_), given_);
    sweeps_ = true;
  }

  void forward(const RowProblem& chunk, int64_t) { add(forward_rows(op_, chunk)); }

  void sweep(RowProblem chunk, int64_t) {
    // Per row of the call, and used in this chunk alone.
    if (!buffer_) {
      saved_.options = chunk.options;
      buffer_ = sweep_buffer(saved_, like_, row_count(like_));
    }
    chunk.row_sums = saved_.row_sums;
    chunk.log_prob = saved_.log_prob;
    chunk.smooth_distance = saved_.smooth_distance;
    add(sweep_rows(op_, chunk, denominator_ != 0 ? 1 / denominator_ : 0));
  }

  void finish() {
    put_loss(q_, totals_, sweeps_ ? denominator_ : denominator_of(q_, totals_, given_));
  }

 private:
  void add(const RowTotals& chunk) {
    totals_.loss += chunk.loss;
    totals_.denominator += chunk.denominator;
  }

  const char* const op_;
  const RowProblem& q_;
  const Tensor& like_;
  const double given_;
  double denominator_ = 0;
  bool sweeps_ = false;
  RowTotals totals_;
  RowProblem saved_;
  std::optional<Tensor> buffer_;
};

struct LinearCpu : ShardedRows {
  using Products = CpuProducts;
  using Losses = CpuLosses;

  static KeptRows kept_rows(const char* op, const RowProblem& q, const Tensor& like,
                            std::optional<int64_t> num_valid, bool receiving) {
    std::vector<int64_t> kept;
    int64_t counted = 0;
    for (int64_t row = 0; row < q.counted.rows; ++row) {
      if (!takes_part(op, q, like, row)) continue;
      ++counted;
      if (!receiving || anything_flows(q, row)) kept.push_back(row);
    }
    if (num_valid && *num_valid < counted) {
      fail(op, ": num_valid must be at least the number of rows that count, ", counted, ", got ", *num_valid);
    }
    const int64_t count = static_cast<int64_t>(kept.size());
    KeptRows rows{empty(like, {count}, ScalarType::Long), count};
    if (count > 0) std::memcpy(rows.index.mutable_data_ptr(), kept.data(), kept.size() * sizeof(int64_t));
    return rows;
  }

  static void take_rows(const char* op, const Tensor& hidden, const KeptRows& kept, const Tensor& out) {
    if (out.numel() == 0) return;
    const Tensor from = has_contiguous_rows(hidden) ? hidden : torch::stable::contiguous(hidden);
    const Layout layout = row_layout(op, from, nullptr);
    const Array source = array_of(from);
    const int64_t bytes = out.size(1) * size_of(source.kind);
    auto* place = static_cast<char*>(out.mutable_data_ptr());
    for_each_row(kept, bytes, [&](int64_t row, int64_t i) {
      std::memcpy(place + i * bytes, at(source, offset_at(layout, kPrediction, row)), bytes);
    });
  }

  static void put_rows(const char*, const Tensor& rows, const KeptRows& kept, const Tensor& out) {
    const int64_t bytes = rows.size(1) * size_of(kind_of(rows));
    const auto* source = static_cast<const char*>(rows.const_data_ptr());
    auto* place = static_cast<char*>(out.mutable_data_ptr());
    zero(out);
    for_each_row(kept, bytes,
                 [&](int64_t row, int64_t i) { std::memcpy(place + row * bytes, source + i * bytes, bytes); });
  }

  // Pages that nobody has touched are zero, and take no memory.
  static void zero(const Tensor& tensor) {
    if (tensor.numel() == 0) return;
    auto* data = static_cast<char*>(tensor.mutable_data_ptr());
    const size_t bytes = tensor.numel() * tensor.element_size();
    const ByteRange fresh = untouched_pages(data, bytes);
    if (fresh.begin == fresh.end) {
      std::memset(data, 0, bytes);
      return;
    }
    const auto address = reinterpret_cast<uintptr_t>(data);
    std::memset(data, 0, fresh.begin - address);
    std::memset(reinterpret_cast<void*>(fresh.end), 0, address + bytes - fresh.end);
  }

  static void backward(const char* op, RowProblem q, const Tensor&) {
    const double grad_scale = grad_scale_of(q);
    if (q.reduction != RowReduction::kNone) q.grad_loss = {};
    backward_rows(op, q, grad_scale);
  }
};

}  // namespace
}  // namespace masked_loss_ext

STABLE_TORCH_LIBRARY_IMPL(masked_loss_ext, CPU, m) {
  masked_loss_ext::register_linear<masked_loss_ext::LinearCpu>(m);
  masked_loss_ext::register_vocab_parallel_linear<masked_loss_ext::LinearCpu>(m);
}
