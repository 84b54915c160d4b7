// SPDX-License-Identifier: BSD-3-Clause
// Row intervals of packed samples, segment by segment: rows that see the same are filled, not computed.
#include <algorithm>

#include "block_mask/cpu/kernels.h"

namespace masked_loss_ext {
namespace {

void fill_equal(const PackedRows& p, int64_t begin, int64_t end, const Interval* intervals, int count) {
  for (int r = 0; r < p.slots; ++r) {
    const Interval one = r < count ? intervals[r] : Interval{0, 0};
    std::fill(p.lo + r * p.rows + begin, p.lo + r * p.rows + end, one.begin);
    std::fill(p.hi + r * p.rows + begin, p.hi + r * p.rows + end, one.end);
  }
}

// Without a window a row sees the tokens before `cut`, which only the row's index moves: the intervals are
// the runs, each up to there, slot by slot.
void fill_ordered(const PackedRows& p, const Sample& sample, int64_t begin, int64_t end) {
  const int32_t prefix_end = static_cast<int32_t>(sample.prefix_end);
  for (int r = 0; r < p.slots; ++r) {
    const Interval run = r < sample.count ? sample.runs[r] : Interval{0, 0};
    int32_t* lo = p.lo + r * p.rows;
    int32_t* hi = p.hi + r * p.rows;
    for (int32_t t = static_cast<int32_t>(begin); t < end; ++t) {
      const int32_t cut = std::max(prefix_end, t + 1);
      lo[t] = cut > run.begin ? run.begin : 0;
      hi[t] = cut > run.begin ? std::min(run.end, cut) : 0;
    }
  }
}

// Rows [begin, end) of one sample, all visible or all not.
void fill_rows(const PackedRows& p, const Sample& sample, int64_t begin, int64_t end, bool visible) {
  if (begin >= end) return;
  Interval intervals[kMaxIntervals];
  const bool attend = visible || p.dropped == DroppedQueries::kAttend;
  const bool window = p.left >= 0 || p.right >= 0;
  const bool all_see_all = p.mode == PackedMode::kFull && !window;
  if (attend && !all_see_all && !window) return fill_ordered(p, sample, begin, end);
  if (attend ? all_see_all : p.dropped == DroppedQueries::kNone) {
    return fill_equal(p, begin, end, intervals, attended_by(p, sample, begin, visible, intervals));
  }
  for (int64_t t = begin; t < end; ++t) {
    store_row(p, t, intervals, attended_by(p, sample, t, visible, intervals));
  }
}

}  // namespace

void fill_packed_rows(const PackedRows& p, int64_t begin, int64_t end) {
  const int64_t segments = p.samples * p.segments;
  int64_t segment = segment_of_row(p, begin), sample_index = -1;
  Sample sample = {};
  for (int64_t t = begin; t < end; ++segment) {
    const int64_t stop = segment < segments ? std::min(end, offset_at(p, segment + 1)) : end;
    if (segment < 0 || segment == segments) {
      fill_equal(p, t, stop, nullptr, 0);
    } else if (t < stop) {
      if (segment / p.segments != sample_index) {
        sample_index = segment / p.segments;
        sample = load_sample(p, sample_index);
      }
      const int64_t middle = std::clamp(visible_end(p, segment), t, stop);
      fill_rows(p, sample, t, middle, true);
      fill_rows(p, sample, middle, stop, false);
    }
    t = stop;
  }
}

}  // namespace masked_loss_ext
