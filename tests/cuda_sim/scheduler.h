// SPDX-License-Identifier: BSD-3-Clause
// State of the launch that runs, and the order its threads and blocks are taken in.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "context.h"
#include "runtime.h"

namespace cuda_sim {

// Ascending and descending bring out most mistakes; random seeds the rest.
struct Order {
  enum Kind { kAscending, kDescending, kRandom } kind = kAscending;
  unsigned seed = 0;

  static bool parse(const char* text, Order* order);  // "ascending", "descending" or a number, the seed
  std::string name() const;
  // Permutation of 0..n-1 for the given block and round of scheduling.
  void fill(std::vector<uint32_t>* permutation, uint32_t n, uint64_t salt) const;
};

enum class State : uint8_t { kReady, kAtBarrier, kAtWarp, kAtCluster, kDone };

struct Fiber {
  Context context;
  uint3 thread{};
  int index = 0;
  State state = State::kDone;
  // what it waits for
  Site site{};
  BarrierCall barrier = BarrierCall::kPlain;
  bool predicate = false;
  WarpCall call = WarpCall::kSync;
  unsigned mask = 0;
  int source = 0;
  uint64_t bits = 0;
  uint64_t result = 0;
};

class Block {
 public:
  static Block& instance();  // the one that runs, of the blocks of a cluster

  void set_threads(unsigned n);  // makes the stacks; they are kept between launches
  void begin(const LaunchRequest& request, uint64_t block);
  bool advance(const Order& order);  // to its end, or until all threads wait for the cluster: false
  void wait();  // called by a fiber: back to the scheduler
  void fail(const std::string& what);
  Fiber& current() { return *current_; }
  bool on_stack_guard(const void* address) const;

 private:
  static void fiber_main();
  void start(unsigned i);
  bool release_warp(unsigned warp);
  bool release_lanes(unsigned warp, Fiber& asking);
  bool release_barrier();
  bool waits_for_cluster() const;
  void check_same_site(const Fiber& a, const Fiber& b, const char* what);
  void report_deadlock();

  std::vector<Fiber> fibers_;
  std::vector<uint32_t> permutation_;
  Fiber* current_ = nullptr;
  Context scheduler_;
  const LaunchRequest* request_ = nullptr;
  uint64_t block_ = 0, round_ = 0;
  unsigned threads_ = 0, live_ = 0, waiting_ = 0;
  char* stacks_ = nullptr;
  std::string error_;
};

// Of the launch that runs, for messages; kernel is null outside.
struct Running {
  const void* kernel = nullptr;
  std::string where() const;  // kernel, block, thread, order
};
Running& running();
unsigned cluster_rank();  // of the block that runs
Order& order();

// One line per launch since the last reset: kernel, grid, block, dynamic shared memory.
std::string& launch_log();

void install_fault_handlers();

}  // namespace cuda_sim
