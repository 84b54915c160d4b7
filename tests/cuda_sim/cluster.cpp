// SPDX-License-Identifier: BSD-3-Clause
#include "cluster.h"

#include <algorithm>
#include <stdexcept>

#include "device_memory.h"
#include "symbols.h"

namespace cuda_sim {
namespace {

unsigned rank = 0, size = 1;
char* shared_memory[kMaxClusterBlocks] = {};
std::vector<char> images[kMaxClusterBlocks];  // of static shared memory

void begin(const LaunchRequest& r, uint64_t block) {
  __builtin_memset(shared_memory[rank], 0xff, r.shared_bytes);
  Symbols::instance().poison_static_shared(0xff);
  Block::instance().set_threads(r.block.x * r.block.y * r.block.z);
  Block::instance().begin(r, block);
}

// Of one block, from where it waited to where it waits again or ends: true.
bool take_turn(const LaunchRequest& r, uint64_t block, bool first) {
  blockIdx = {static_cast<unsigned>(block % r.grid.x), static_cast<unsigned>(block / r.grid.x % r.grid.y),
              static_cast<unsigned>(block / r.grid.x / r.grid.y)};
  if (first) {
    begin(r, block);
  } else if (size > 1) {
    Symbols::instance().set_static_shared(images[rank]);
  }
  const bool ended = Block::instance().advance(order());
  if (size > 1) images[rank] = Symbols::instance().static_shared();
  if (size > 1 && ended) std::fill(images[rank].begin(), images[rank].end(), char(0xff));
  return ended;
}

}  // namespace

void make_shared_memory(unsigned blocks, size_t bytes) {
  static size_t made[kMaxClusterBlocks] = {};
  DeviceMemory& memory = DeviceMemory::instance();
  for (unsigned i = 0; i < blocks; ++i) {
    if (shared_memory[i] && made[i] == bytes) continue;
    if (shared_memory[i]) memory.release(shared_memory[i]);
    made[i] = bytes;
    shared_memory[i] = memory.allocate(bytes, true, BufferKind::kShared).data;
  }
}

void run_cluster(const LaunchRequest& r, uint64_t first) {
  size = r.cluster;
  std::vector<uint32_t> permutation;
  order().fill(&permutation, size, first);
  unsigned ended = 0;
  for (uint64_t turn = 0; ended < size; ++turn) {
    if (ended > 0)
      throw std::runtime_error("cuda_sim: a block waits for its cluster, of which others have ended, in " +
                               running().where());
    for (uint32_t i : permutation) {
      rank = i;
      ended += take_turn(r, first + i, turn == 0);
    }
  }
  rank = 0;
}

unsigned cluster_rank() { return rank; }
unsigned cluster_blocks() { return size; }
void* dynamic_shared_memory() { return shared_memory[rank]; }

unsigned& cluster_limit() {
  static unsigned limit = 1;
  return limit;
}

unsigned& launchable_blocks() {
  static unsigned limit = kMaxClusterBlocks;
  return limit;
}

int max_active_clusters(int blocks) { return static_cast<unsigned>(blocks) <= launchable_blocks(); }

void* shared_of_block(void* address, unsigned block) {
  if (block == rank) return address;
  if (block >= size) throw std::runtime_error("a block that the cluster does not have is asked for memory");
  return images[block].data() + Symbols::instance().place_in_image(address);
}

}  // namespace cuda_sim
