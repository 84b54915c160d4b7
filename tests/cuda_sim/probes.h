// SPDX-License-Identifier: BSD-3-Clause
// Small kernels, right and wrong ones, that show what the simulator finds. All have one signature:
// x [any] in, y [any] out, and a number whose meaning is the kernel's.
#pragma once

#include <vector>

struct Probe {
  const char* name;
  void (*kernel)(const float* x, float* y, int n);
};

const std::vector<Probe>& memory_probes();
const std::vector<Probe>& order_probes();
const std::vector<Probe>& warp_probes();
