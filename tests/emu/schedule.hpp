// The threads of a launch, whose turn it is, and what they wait for.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <vector>

#include "emu.hpp"
#include "fibers.hpp"

namespace emu {

constexpr unsigned kWarp = 32, kMaxCluster = 8, kNone = ~0u;

struct Place {
  const char* what;
  const char* file;
  int line;
};

inline bool same(const Place& a, const Place& b) {
  return a.line == b.line && a.what == b.what && (a.file == b.file || !std::strcmp(a.file, b.file));
}

struct Warp;
struct BlockState;

struct Fiber : Thread, Context {
  // It goes on when *word is no longer `value`.
  const unsigned* word = nullptr;
  unsigned value = 0;
  bool done = true;
  bool arrived = false;  // at the cluster's barrier, without having waited since
  unsigned cluster_waits = 0;
  unsigned warp_index = 0;
  unsigned mask = 0;  // what it waits for in a warp
  Place at{};
  Warp* warp = nullptr;
  BlockState* state = nullptr;
};

// Lanes that come to one shuffle or __syncwarp.
struct Meeting {
  unsigned mask, arrived, departed, open;
  Place place;
  Order order;
  std::uint64_t value[kWarp];
};
// A lane is in one meeting at a time, so there are never more of them than lanes.
struct Warp {
  unsigned lanes = 0;  // that exist
  unsigned used = 0;
  Meeting meeting[kWarp];
};

struct Barrier {
  unsigned arrived = 0, generation = 0;
  Place place{};
  Order order[2];
};

struct BlockState : Block {
  unsigned live = 0;
  unsigned reached_in = kNone;  // the cluster generation in which a peer asked for its memory
  Barrier barrier;
  char* dynamic = nullptr;
};

// The fibers and barriers of one cluster.  Under TSan, clusters take turns with a few of these:
// what their fibers have seen in the cluster before is no part of what they know, as on a device.
struct Set {
  std::deque<Fiber> fibers;
  std::deque<Warp> warps;
  BlockState blocks[kMaxCluster];
  Barrier cluster;
};

inline Set* set = nullptr;  // of the cluster that runs
inline Fiber launcher;      // the thread that launches, as a fiber
inline Fiber* current = &launcher;
inline Fiber* previous = &launcher;
inline unsigned threads = 0, blocks = 0;  // per block; per cluster

inline std::uint64_t random_state = 0x9E3779B97F4A7C15ull;
inline std::uint64_t random64() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state * 0x2545F4914F6CDD1Dull;
}
inline unsigned random_below(unsigned end) {
  return static_cast<unsigned>(((random64() >> 32) * end) >> 32);
}

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emu: %s\n", what);
  if (!set) std::abort();
  if (current != &launcher) {
    const uint3 b = current->block->index;
    std::fprintf(stderr, "  by thread %u of block (%u,%u,%u), %s %s:%d\n", current->linear, b.x,
                 b.y, b.z, current->at.what, current->at.file, current->at.line);
  }
  unsigned waiting = 0, shown = 0;
  Place last{};
  for (const Fiber& f : set->fibers) {
    if (f.done || &f == current || *f.word != f.value) continue;
    if (++waiting > 1 && (shown > 6 || same(f.at, last))) continue;  // one for each place
    last = f.at;
    ++shown;
    std::fprintf(stderr, "  thread %u of block (%u,%u,%u) waits in %s %s:%d, mask %#x\n", f.linear,
                 f.block->index.x, f.block->index.y, f.block->index.z, f.at.what, f.at.file,
                 f.at.line, f.mask);
  }
  unsigned live = 0;
  for (unsigned b = 0; b < blocks; ++b) live += set->blocks[b].live;
  std::fprintf(stderr, "  %u threads, of which %u have ended and %u wait\n", blocks * threads,
               blocks * threads - live, waiting);
  std::abort();
}

inline void switch_to(Fiber* to) {
  previous = current;
  current = to;
  self = to;
  switch_context(*previous, *current);
  switched(*previous, *current);
}

inline const unsigned kNever = 0;
inline std::vector<Fiber*> order;
inline std::size_t cursor = 0;
inline unsigned held_back = kNone, warps = 0, live = 0;
inline bool moved = false;

// Rounds over all threads, in which one warp is left out until the others can go no further.  That
// shows where a barrier is missing before memory is used again, which a fair order hides.
inline Fiber* next() {
  for (;;) {
    while (cursor < order.size()) {
      Fiber* f = order[cursor++];
      if (f->done || *f->word == f->value || f->warp_index == held_back) continue;
      moved = true;
      return f;
    }
    if (!live) return &launcher;
    if (!moved && held_back == kNone) fail("deadlock: threads wait for others that do not arrive");
    if (!moved)
      held_back = kNone;
    else if (held_back == kNone && warps > 1)
      held_back = random_below(warps);
    cursor = 0;
    moved = false;
  }
}

inline void wait_while(const unsigned& word, unsigned value) {
  if (word != value) return;
  Fiber& f = *current;
  f.word = &word;
  f.value = value;
  switch_to(next());
}

}  // namespace emu
