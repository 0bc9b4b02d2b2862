// Launches, and what kernels call.
#include "emu.hpp"

#include <algorithm>
#include <mutex>
#include <numeric>

#include "schedule.hpp"

namespace emu {

Thread* self = nullptr;

namespace {

constexpr unsigned kMaxShared = 16;
constexpr std::size_t kMaxStatic = 48 * 1024, kMaxDynamic = 227 * 1024;
// TSan has 8000 threads to give, takes most of a megabyte for each, and slows down with all.
constexpr std::size_t kMostSets = 3, kMostTsanFibers = 1024;

struct Shared {
  const void* key;
  std::size_t bytes;
  char* copy[kMaxCluster];
};

std::mutex one_launch;
std::uint64_t launched = 0;
std::deque<Set> sets;
void (*body)(const void*) = nullptr;
const void* context = nullptr;
std::size_t dynamic_bytes = 0, static_bytes = 0;
Shared variables[kMaxShared];
std::vector<void*> allocated;
Order begin_order, end_order, allocate_order;

void end_block(BlockState& block) {
  if (block.cluster == 1) return;
  if (block.reached_in == set->cluster.generation)
    fail("a block ends while a peer may still use its shared memory: no cluster barrier since");
  const auto close = [](char* at, std::size_t bytes) {
    if (!at) return;
    fill(at, bytes);
    if (__asan_poison_memory_region) __asan_poison_memory_region(at, bytes);
  };
  for (Shared& v : variables) close(v.copy[block.rank], v.bytes);
  close(block.dynamic, dynamic_bytes);
}

void run_threads() {
  switched(*previous, *current);
  for (;;) {
    begin_order.acquire();
    body(context);
    end_order.release();
    Fiber& f = *current;
    if (f.arrived) fail("a thread ends between cluster_arrive and cluster_wait");
    f.done = true;
    --live;
    if (--f.state->live == 0) end_block(*f.state);
    switch_to(next());
  }
}

char* allocate(std::size_t bytes) {
  char* at = static_cast<char*>(std::malloc(bytes));
  if (!at) fail("no memory");
  fill(at, bytes);
  allocated.push_back(at);
  allocate_order.release();
  return at;
}

void free_all() {
  for (void* at : allocated) std::free(at);
  allocated.clear();
}

void set_up(Set& s, const LaunchShape& shape) {
  const unsigned all = threads * blocks;
  while (s.fibers.size() < all) {
    if (!start(s.fibers.emplace_back(), run_threads)) fail("no memory for stacks");
  }
  if (s.warps.size() < warps) s.warps.resize(warps);
  for (Fiber& f : s.fibers) f.done = true;
  for (Warp& w : s.warps) w.lanes = w.used = 0;
  for (unsigned i = 0; i < all; ++i) {
    Fiber& f = s.fibers[i];
    f.state = &s.blocks[i / threads];
    f.block = f.state;
    f.linear = i % threads;
    f.lane = f.linear % kWarp;
    f.index = uint3{f.linear % shape.block.x, f.linear / shape.block.x % shape.block.y,
                    f.linear / shape.block.x / shape.block.y};
    f.warp_index = i / threads * ((threads + kWarp - 1) / kWarp) + f.linear / kWarp;
    f.warp = &s.warps[f.warp_index];
    f.warp->lanes |= 1u << f.lane;
  }
  for (unsigned b = 0; b < blocks; ++b) {
    s.blocks[b].block_size = shape.block;
    s.blocks[b].grid_size = shape.grid;
    s.blocks[b].rank = b;
    s.blocks[b].cluster = blocks;
  }
}

void run_cluster(Set& s, uint3 first_block) {
  set = &s;
  static_bytes = 0;
  for (Shared& v : variables) v = Shared{};
  const auto restart = [](Barrier& barrier) { barrier.arrived = barrier.generation = 0; };
  restart(s.cluster);
  for (unsigned b = 0; b < blocks; ++b) {
    BlockState& block = s.blocks[b];
    block.index = uint3{first_block.x + b, first_block.y, first_block.z};
    block.live = threads;
    block.reached_in = kNone;
    restart(block.barrier);
    block.dynamic = dynamic_bytes ? allocate(dynamic_bytes) : nullptr;
  }
  live = threads * blocks;
  order.resize(live);
  for (unsigned i = 0; i < live; ++i) {
    Fiber& f = s.fibers[i];
    f.word = &kNever;
    f.value = 1;
    f.done = f.arrived = false;
    f.cluster_waits = 0;
    f.at = Place{};
    f.mask = 0;
    const unsigned at = random_below(i + 1);
    order[i] = order[at];
    order[at] = &f;
  }
  held_back = warps > 1 ? random_below(warps) : kNone;
  cursor = 0;
  moved = false;
  switch_to(next());
  self = nullptr;
}

// Sets in use at once: one, but for TSan as many as it has threads for.
std::size_t sets_for(std::uint64_t clusters) {
  const std::size_t most = __tsan_create_fiber ? std::min<std::uint64_t>(kMostSets, clusters) : 1;
  std::size_t fibers = 0, count = 0;
  for (const Set& s : sets) fibers += s.fibers.size();
  for (; count < most; ++count) {
    if (count == sets.size()) sets.emplace_back();
    const std::size_t has = sets[count].fibers.size(), needs = threads * blocks;
    fibers += needs > has ? needs - has : 0;
    if (count && fibers > kMostTsanFibers) break;
  }
  return count;
}

const char* refuse(const LaunchShape& shape) {
  const dim3 g = shape.grid, b = shape.block;
  const char* const kConfiguration = "invalid configuration argument";
  if (!g.x || !g.y || !g.z || g.x > 0x7fffffffu || g.y > 65535 || g.z > 65535)
    return kConfiguration;
  if (!b.x || !b.y || !b.z || b.x > 1024 || b.y > 1024 || b.z > 64 || b.x * b.y * b.z > 1024)
    return kConfiguration;
  if (shape.dynamic_smem > kMaxDynamic) return "invalid argument";
  const unsigned c = shape.cluster;
  if (!c || c > kMaxCluster || (c & (c - 1)) || g.x % c) return kConfiguration;
  return nullptr;
}

}  // namespace

void seed(std::uint64_t value) {
  const std::lock_guard<std::mutex> lock(one_launch);
  random_state = value * 2 + 1;
  for (int i = 0; i < 8; ++i) random64();
}

std::uint64_t launches() { return launched; }

const char* run(const LaunchShape& shape, void (*kernel)(const void*), const void* arguments) {
  if (const char* error = refuse(shape)) return error;
  const std::lock_guard<std::mutex> lock(one_launch);
  ++launched;
  body = kernel;
  context = arguments;
  threads = shape.block.x * shape.block.y * shape.block.z;
  blocks = shape.cluster;
  warps = (threads + kWarp - 1) / kWarp * blocks;
  dynamic_bytes = shape.dynamic_smem;
  const std::uint64_t along_x = shape.grid.x / blocks;
  const std::uint64_t clusters = along_x * shape.grid.y * shape.grid.z;
  const std::size_t in_use = sets_for(clusters);
  for (std::size_t i = 0; i < in_use; ++i) set_up(sets[i], shape);
  if (__tsan_get_current_fiber) launcher.tsan = __tsan_get_current_fiber();
  begin_order.release();
  // Some order, and every cluster once.
  std::uint64_t at = random64() % clusters, step = 1 + random64() % clusters;
  while (std::gcd(step, clusters) != 1) ++step;
  for (std::uint64_t i = 0; i < clusters; ++i, at = (at + step) % clusters) {
    const std::uint64_t x = at % along_x, rest = at / along_x;
    run_cluster(sets[i % in_use],
                uint3{static_cast<unsigned>(x * blocks), static_cast<unsigned>(rest % shape.grid.y),
                      static_cast<unsigned>(rest / shape.grid.y)});
    // TSan would take memory that two blocks had one after the other for memory that they share.
    if (!__tsan_acquire) free_all();
  }
  end_order.acquire();
  free_all();
  return nullptr;
}

namespace {

// The last of `threads` to come lets all go on.
void arrive(Barrier& barrier, unsigned count, const Place& place, bool releases = true) {
  if (barrier.arrived == 0) barrier.place = place;
  if (releases) barrier.order[barrier.generation & 1].release();
  if (++barrier.arrived < count) return;
  barrier.arrived = 0;
  ++barrier.generation;
}

// Null before the meeting is opened by its first lane.
Meeting* find_meeting(Warp& warp, unsigned mask) {
  for (unsigned used = warp.used; used; used &= used - 1) {
    Meeting& m = warp.meeting[__builtin_ctz(used)];
    if (m.open && m.mask == mask) return &m;
  }
  return nullptr;
}

Meeting& meet(unsigned mask, const Place& place) {
  Fiber& f = *current;
  f.at = place;
  f.mask = mask;
  if (!(mask >> f.lane & 1)) fail("a lane is not in its own mask");
  mask &= f.warp->lanes;
  Meeting* m = find_meeting(*f.warp, mask);
  if (!m) {
    const unsigned free = __builtin_ctz(~f.warp->used);
    f.warp->used |= 1u << free;
    m = &f.warp->meeting[free];
    m->mask = mask;
    m->arrived = m->departed = 0;
    m->open = 1;
    m->place = place;
  } else if (!same(m->place, place)) {
    fail("lanes of one mask are at different places");
  }
  m->arrived |= 1u << f.lane;
  if (m->arrived == mask) m->open = 0;
  return *m;
}

void depart(Meeting& m) {
  Fiber& f = *current;
  m.departed |= 1u << f.lane;
  if (m.departed == m.mask) f.warp->used &= ~(1u << (&m - f.warp->meeting));
  f.mask = 0;
}

constexpr char kSyncThreads[] = "__syncthreads()", kSyncWarp[] = "__syncwarp()",
               kShuffle[] = "shuffle", kArrive[] = "cluster_arrive()", kWait[] = "cluster_wait()",
               kPeer[] = "cluster_peer()", kShared[] = "shared memory";

}  // namespace

void sync_threads(const char* file, int line) {
  Fiber& f = *current;
  Barrier& barrier = f.state->barrier;
  f.at = Place{kSyncThreads, file, line};
  if (f.state->live != threads) fail("__syncthreads() after threads of the block have ended");
  if (barrier.arrived && !same(barrier.place, f.at))
    fail("threads of one block are at different __syncthreads()");
  const unsigned generation = barrier.generation;
  arrive(barrier, threads, f.at);
  wait_while(barrier.generation, generation);
  barrier.order[generation & 1].acquire();
}

void cluster_arrive(bool releases, const char* file, int line) {
  Fiber& f = *current;
  f.at = Place{kArrive, file, line};
  if (f.arrived) fail("cluster_arrive() twice without cluster_wait()");
  if (live != threads * blocks) fail("cluster_arrive() after threads of the cluster have ended");
  if (set->cluster.arrived && !same(set->cluster.place, f.at))
    fail("threads of one cluster are at different cluster_arrive()");
  f.arrived = true;
  arrive(set->cluster, threads * blocks, f.at, releases);
}

void cluster_wait(const char* file, int line) {
  Fiber& f = *current;
  f.at = Place{kWait, file, line};
  if (!f.arrived) fail("cluster_wait() without cluster_arrive()");
  const unsigned generation = f.cluster_waits++;
  wait_while(set->cluster.generation, generation);
  f.arrived = false;
  set->cluster.order[generation & 1].acquire();
}

void* cluster_peer(void* shared, unsigned rank, const char* file, int line) {
  Fiber& f = *current;
  f.at = Place{kPeer, file, line};
  if (rank >= blocks) fail("cluster_peer() of a rank that the cluster does not have");
  const auto inside = [&](const char* from, std::size_t bytes) {
    const auto first = reinterpret_cast<std::uintptr_t>(from);
    return from && reinterpret_cast<std::uintptr_t>(shared) - first < bytes;
  };
  const unsigned own = f.block->rank;
  char *from = nullptr, *to = nullptr;
  for (const Shared& v : variables)
    if (inside(v.copy[own], v.bytes)) from = v.copy[own], to = v.copy[rank];
  if (inside(f.state->dynamic, dynamic_bytes))
    from = f.state->dynamic, to = set->blocks[rank].dynamic;
  if (!from) fail("cluster_peer() of what is no shared memory of this block");
  if (rank != own) {
    BlockState& peer = set->blocks[rank];
    if (!f.cluster_waits) fail("cluster_peer() before it is known that the peer has started");
    if (!peer.live) fail("cluster_peer() of a block that has ended");
    peer.reached_in = set->cluster.generation;
  }
  return to + (static_cast<char*>(shared) - from);
}

std::uint64_t exchange(unsigned mask, std::uint64_t bits, unsigned source, const char* file,
                       int line) {
  Meeting& m = meet(mask, Place{kShuffle, file, line});
  if (!(m.mask >> source & 1)) fail("a shuffle reads from a lane that is not in the mask");
  m.value[current->lane] = bits;
  wait_while(m.open, 1);
  const std::uint64_t result = m.value[source];
  depart(m);
  return result;
}

void sync_warp(unsigned mask, const char* file, int line) {
  Meeting& m = meet(mask, Place{kSyncWarp, file, line});
  m.order.release();
  wait_while(m.open, 1);
  m.order.acquire();
  depart(m);
}

void* shared(const void* key, std::size_t bytes, const char* file, int line) {
  Shared* v = variables;
  while (v->key && v->key != key)
    if (++v == variables + kMaxShared)
      fail("more shared variables than the emulation has room for");
  if (!v->key) {
    current->at = Place{kShared, file, line};
    static_bytes += bytes;
    if (static_bytes > kMaxStatic) fail("more than 48 KiB of static shared memory");
    if (static_bytes + dynamic_bytes > kMaxDynamic) fail("more than 227 KiB of shared memory");
    pretend(launcher);
    v->key = key;
    v->bytes = bytes;
    for (unsigned b = 0; b < blocks; ++b) v->copy[b] = allocate(bytes);
    pretend(*current);
  }
  allocate_order.acquire();
  return v->copy[current->block->rank];
}

void* dynamic_shared() {
  if (!current->state->dynamic) fail("dynamic shared memory in a launch without");
  allocate_order.acquire();
  return current->state->dynamic;
}

}  // namespace emu
