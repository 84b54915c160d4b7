// SPDX-License-Identifier: BSD-3-Clause
// The blocks of a cluster, which take turns.
#pragma once

#include "scheduler.h"

namespace cuda_sim {

// Runs blocks first, first + 1, ... of one cluster to their ends.
void run_cluster(const LaunchRequest& request, uint64_t first);
void make_shared_memory(unsigned blocks, size_t bytes);

}  // namespace cuda_sim
