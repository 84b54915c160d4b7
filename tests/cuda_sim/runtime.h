// SPDX-License-Identifier: BSD-3-Clause
// What kernels and their launchers ask of the simulator's runtime (scheduler.cpp, device_memory.cpp).
#pragma once

#include <cstddef>
#include <cstdint>

#include "types.h"

namespace cuda_sim {

// The smallest of the opt-in limits of the architectures from sm_80 on (sm_86, sm_89): more is not portable.
constexpr size_t kMaxSharedBytes = 99 * 1024;
constexpr unsigned kMaxBlockThreads = 1024;
constexpr unsigned kMaxClusterBlocks = 8;  // of every device that has clusters

// Where a kernel synchronises, for messages and to tell a divergent barrier.
struct Site {
  const char* file;
  int line;
};

// Clusters: their blocks run one after another, each until all its threads wait; what the others have in
// static shared memory is seen as it was when they last waited, and is NaN where they have ended.
unsigned cluster_blocks();
void cluster_wait(Site site);
void* shared_of_block(void* address, unsigned block);
// How many blocks a cluster of the simulated device may have; 1, which is none, to begin with.
unsigned& cluster_limit();
// How many of them it can launch at once; as many, to begin with.
unsigned& launchable_blocks();
int max_active_clusters(int blocks);

// What the lanes that meet at a warp-level call do there.
enum class WarpCall { kSync, kShuffle, kBallot };

// What a block barrier makes of the threads' predicates.
enum class BarrierCall { kPlain, kOr, kAnd, kCount };

int block_barrier(BarrierCall call, bool predicate, Site site);
// Waits for the lanes of `mask`. A shuffle returns the bits that lane `source` brought, a ballot the lanes
// whose bits are not 0.
uint64_t warp_meet(WarpCall call, unsigned mask, uint64_t bits, int source, Site site);
int lane_id();
[[noreturn]] void kernel_error(const char* what, Site site);

void* dynamic_shared_memory();

// Device memory: reachable in a launch only. Contents start as NaN patterns.
void* device_allocate(size_t bytes, bool writable);
bool is_device_pointer(const void* pointer);

// Scope of DeviceScope and the stream that launches have to name.
void enter_device();
void leave_device();
cudaStream_t current_stream();

// A pointer among the arguments of a launch; a word of a struct may be one.
struct PointerArgument {
  int position;
  const void* pointer;
  bool in_struct;
};

struct LaunchRequest {
  cudaStream_t stream;
  dim3 grid, block;
  size_t shared_bytes;
  unsigned cluster;  // blocks of one, neighbours along x
  const void* kernel;  // for its name
  const PointerArgument* pointers;
  int num_pointers;
  void (*run)(void*);  // one thread of the kernel
  void* context;
};

cudaError_t run_launch(const LaunchRequest& request);

// Code of another library that stands for kernels of its own: f(), to which device memory is open.
void begin_library_call(const char* what);
void end_library_call(bool succeeded);

template <class F>
void library_call(const char* what, const F& f) {
  begin_library_call(what);
  try {
    f();
  } catch (...) {
    end_library_call(false);
    throw;
  }
  end_library_call(true);
}

// Whether the stream is captured in a graph; the tests say so.
bool& capturing();

}  // namespace cuda_sim
