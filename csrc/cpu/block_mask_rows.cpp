// SPDX-License-Identifier: BSD-3-Clause
// Row intervals of packed samples, segment by segment: rows that see the same are filled, not computed.
#include <algorithm>

#include "cpu/block_mask_cpu.h"

namespace masked_loss_ext {
namespace {

void fill_equal(const PackedRows& p, int64_t begin, int64_t end, const Interval* intervals, int count) {
  for (int r = 0; r < p.slots; ++r) {
    const Interval one = r < count ? intervals[r] : Interval{0, 0};
    std::fill(p.lo + r * p.rows + begin, p.lo + r * p.rows + end, one.begin);
    std::fill(p.hi + r * p.rows + begin, p.hi + r * p.rows + end, one.end);
  }
}

// Rows [begin, end) of one sample, all visible or all not.
void fill_rows(const PackedRows& p, const Sample& sample, int64_t begin, int64_t end, bool visible) {
  if (begin >= end) return;
  Interval intervals[kMaxIntervals];
  const bool attend = visible || p.dropped == DroppedQueries::kAttend;
  const bool all_see_all = p.mode == PackedMode::kFull && p.left < 0 && p.right < 0;
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
