// SPDX-License-Identifier: BSD-3-Clause
// The interface between the host side of cross_entropy_terms and its kernels, of which there is one set
// per instruction-set level. Plain data only, see cross_entropy/cpu/kernels.h.
#pragma once

#include "cross_entropy/cpu/kernels.h"
#include "cross_entropy_terms/formula.h"

namespace masked_loss_ext {

// The first row of a chunk with a label, or a class asked for, that there is not.
struct BadRow {
  int64_t row = -1;
  int64_t asked = -1;  // which class asked for; -1: the label
};

// Of the base: where rows lie, their chunks (whole rows), the logits, scale = 1 / T, grad_logits.
struct TermsProblem : CrossEntropyProblem {
  TermRows rows;
  BadRow* bad = nullptr;  // [chunks]
};

struct TermsKernels {
  void (*forward)(const TermsProblem&, int64_t chunk);
  void (*backward)(const TermsProblem&, int64_t chunk);
};

}  // namespace masked_loss_ext
