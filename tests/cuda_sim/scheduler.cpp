// SPDX-License-Identifier: BSD-3-Clause
#include "scheduler.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <numeric>
#include <stdexcept>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_sim {
namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr size_t kStackGuard = 64 * 1024;  // a page of any size
constexpr unsigned kWarp = 32;

std::string at(Site site) { return std::string(site.file) + ":" + std::to_string(site.line); }

#if defined(__x86_64__) && !defined(CUDA_SIM_UCONTEXT)
asm(R"(
.text
.globl cuda_sim_switch
.hidden cuda_sim_switch
.type cuda_sim_switch,@function
cuda_sim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_sim_switch,.-cuda_sim_switch
)");
#endif

}  // namespace

Block& Block::instance() {
  static Block* blocks[kMaxClusterBlocks] = {};
  Block*& block = blocks[cluster_rank()];
  if (!block) block = new Block;
  return *block;
}

void Block::set_threads(unsigned n) {
  threads_ = n;
  if (stacks_) return;
  const size_t bytes = kMaxBlockThreads * (kStackGuard + kStackBytes);
  void* p = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::runtime_error("cuda_sim: no memory for stacks");
  stacks_ = static_cast<char*>(p);
  for (unsigned i = 0; i < kMaxBlockThreads; ++i)
    mprotect(stacks_ + i * (kStackGuard + kStackBytes) + kStackGuard, kStackBytes, PROT_READ | PROT_WRITE);
  fibers_.resize(kMaxBlockThreads);
}

bool Block::on_stack_guard(const void* address) const {
  const auto* p = static_cast<const char*>(address);
  if (!stacks_ || p < stacks_) return false;
  const auto offset = static_cast<size_t>(p - stacks_);
  const size_t stride = kStackGuard + kStackBytes;
  return offset < kMaxBlockThreads * stride && offset % stride < kStackGuard;
}

void Block::fail(const std::string& what) {
  if (error_.empty()) error_ = what + " in " + running().where();
}

void Block::fiber_main() {
  Block& b = instance();
  try {
    b.request_->run(b.request_->context);
  } catch (const std::exception& e) {
    b.fail(e.what());
  } catch (...) {
    b.fail("an exception");
  }
  b.current_->state = State::kDone;
  --b.live_;
  b.wait();
  __builtin_unreachable();
}

void Block::wait() { current_->context.switch_to(scheduler_); }

void Block::start(unsigned i) {
  Fiber& f = fibers_[i];
  f.index = static_cast<int>(i);
  f.thread = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
  f.state = State::kReady;
  char* stack = stacks_ + i * (kStackGuard + kStackBytes) + kStackGuard;
  // Stack tops at different offsets: at the same one, all fibers' frames would share a few cache sets.
  f.context.prepare(stack, kStackBytes - i % 32 * 192, &fiber_main);
}

void Block::check_same_site(const Fiber& a, const Fiber& b, const char* what) {
  if (a.site.line == b.site.line && std::string(a.site.file) == b.site.file) return;
  fail(std::string(what) + " at different places: " + at(a.site) + " and " + at(b.site));
}

bool Block::release_lanes(unsigned warp, Fiber& asking) {
  const unsigned first = warp * kWarp, mask = asking.mask;
  const Fiber* leader = nullptr;
  uint64_t ballot = 0;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const unsigned i = first + lane;
    if (i >= threads_ || fibers_[i].state == State::kDone) {
      current_ = &asking;
      fail("the mask of a warp function names lane " + std::to_string(lane) +
           (i >= threads_ ? ", which the block does not have, at " : ", which has exited, at ") +
           at(asking.site));
      return false;
    }
    const Fiber& f = fibers_[i];
    if (f.state != State::kAtWarp) return false;  // still on its way, or at a barrier: a deadlock then
    if (f.mask != mask) {
      current_ = &fibers_[i];
      fail("lanes of one warp wait with different masks that overlap, at " + at(f.site));
      return false;
    }
    if (!leader) leader = &f;
    if (f.call != leader->call || f.site.line != leader->site.line)
      check_same_site(f, *leader, "lanes of one mask are in warp functions");
    ballot |= uint64_t{f.bits != 0} << lane;
  }
  if (!error_.empty()) return false;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    Fiber& f = fibers_[first + lane];
    if (f.call == WarpCall::kBallot) f.result = ballot;
    if (f.call == WarpCall::kShuffle) {
      if (!(mask >> f.source & 1)) {
        current_ = &f;
        fail("a shuffle reads lane " + std::to_string(f.source) + ", which is not in the mask, at " +
             at(f.site));
        return false;
      }
      f.result = fibers_[first + static_cast<unsigned>(f.source)].bits;
    }
  }
  for (unsigned lane = 0; lane < kWarp; ++lane)
    if (mask >> lane & 1) fibers_[first + lane].state = State::kReady;
  return true;
}

bool Block::release_warp(unsigned warp) {
  bool released = false;
  const unsigned end = std::min(threads_, (warp + 1) * kWarp);
  for (unsigned i = warp * kWarp; i < end && error_.empty(); ++i)
    if (fibers_[i].state == State::kAtWarp) released |= release_lanes(warp, fibers_[i]);
  return released;
}

bool Block::release_barrier() {
  if (live_ == 0 || waiting_ < live_) return false;
  const Fiber* leader = nullptr;
  int count = 0;
  for (unsigned i = 0; i < threads_; ++i) {
    const Fiber& f = fibers_[i];
    if (f.state != State::kAtBarrier) continue;
    if (!leader) leader = &f;
    if (f.site.line != leader->site.line || f.site.file != leader->site.file) {
      current_ = &fibers_[i];
      check_same_site(*leader, f, "divergent barrier: threads of one block wait");
    }
    count += f.predicate;
  }
  if (!error_.empty()) return false;
  const int results[] = {0, count > 0, count == static_cast<int>(live_), count};
  for (unsigned i = 0; i < threads_; ++i) {
    Fiber& f = fibers_[i];
    if (f.state != State::kAtBarrier) continue;
    f.result = static_cast<uint64_t>(results[static_cast<int>(f.barrier)]);
    f.state = State::kReady;
  }
  waiting_ = 0;
  return true;
}

void Block::report_deadlock() {
  std::string text = "deadlock: ";
  int sites = 0;
  std::vector<bool> told(threads_);
  for (unsigned i = 0; i < threads_ && sites < 4; ++i) {
    const Fiber& f = fibers_[i];
    if (f.state == State::kDone || told[i]) continue;
    int same = 0;
    for (unsigned k = i; k < threads_; ++k) {
      const Fiber& g = fibers_[k];
      if (g.state != f.state || g.site.line != f.site.line || g.site.file != f.site.file) continue;
      told[k] = true;
      ++same;
    }
    current_ = &fibers_[i];
    text += (sites++ ? ", " : "") + std::to_string(same) + " thread(s) wait ";
    text += f.state == State::kAtCluster ? "for the cluster "
            : f.state == State::kAtBarrier ? "at the block barrier " : "in the warp function ";
    text += at(f.site);
  }
  fail(text);
}

bool Block::waits_for_cluster() const {
  for (unsigned i = 0; i < threads_; ++i) {
    if (fibers_[i].state != State::kAtCluster && fibers_[i].state != State::kDone) return false;
  }
  return live_ > 0;
}

void Block::begin(const LaunchRequest& request, uint64_t block) {
  request_ = &request;
  block_ = block;
  round_ = 0;
  live_ = threads_;
  waiting_ = 0;
  error_.clear();
  for (unsigned i = 0; i < threads_; ++i) start(i);
}

bool Block::advance(const Order& order) {
  for (unsigned i = 0; i < threads_; ++i) {
    if (fibers_[i].state == State::kAtCluster) fibers_[i].state = State::kReady;
  }
  const unsigned warps = (threads_ + kWarp - 1) / kWarp;
  for (; live_ > 0; ++round_) {
    if (round_ == 0 || order.kind == Order::kRandom) order.fill(&permutation_, threads_, block_ << 20 ^ round_);
    bool progress = false;
    for (uint32_t i : permutation_) {
      Fiber& f = fibers_[i];
      if (f.state != State::kReady) continue;
      progress = true;
      current_ = &f;
      threadIdx = f.thread;
      scheduler_.switch_to(f.context);
      waiting_ += f.state == State::kAtBarrier;
      if (!error_.empty()) throw std::runtime_error("cuda_sim: " + error_);
    }
    for (unsigned w = 0; w < warps; ++w) progress |= release_warp(w);
    progress |= release_barrier();
    if (!progress && waits_for_cluster()) return false;
    if (!progress && live_ > 0) report_deadlock();
    if (!error_.empty()) throw std::runtime_error("cuda_sim: " + error_);
  }
  return true;
}

int lane_id() { return Block::instance().current().index & 31; }

void kernel_error(const char* what, Site site) {
  throw std::runtime_error(std::string(what) + " at " + at(site));
}

int block_barrier(BarrierCall call, bool predicate, Site site) {
  Fiber& f = Block::instance().current();
  f.barrier = call;
  f.predicate = predicate;
  f.site = site;
  f.state = State::kAtBarrier;
  Block::instance().wait();
  return static_cast<int>(f.result);
}

void cluster_wait(Site site) {
  Fiber& f = Block::instance().current();
  f.site = site;
  f.state = State::kAtCluster;
  Block::instance().wait();
}

uint64_t warp_meet(WarpCall call, unsigned mask, uint64_t bits, int source, Site site) {
  Fiber& f = Block::instance().current();
  if (!(mask >> (f.index & 31) & 1)) kernel_error("a lane calls a warp function whose mask lacks it", site);
  f.call = call;
  f.mask = mask;
  f.bits = bits;
  f.source = source;
  f.site = site;
  f.state = State::kAtWarp;
  Block::instance().wait();
  return f.result;
}

}  // namespace cuda_sim
