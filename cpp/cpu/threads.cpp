#include "threads.h"

#include <algorithm>
#include <atomic>
#include <type_traits>

#include "platform.h"

namespace normkit::cpu {
namespace {

// ---------------------------------------------------------------- runtimes
//
// The entry points of an OpenMP runtime, from the copy that torch has loaded.  Linking our own
// would start a second pool: 10.7 s became 35.9 s in pytorch#98836.

// Where a call came from, as LLVM's and Intel's compilers tell their runtime.
struct Place {
  int32_t reserved_1, flags, reserved_2, reserved_3;
  const char* source;
};
using Microtask = void (*)(int32_t* thread, int32_t* bound_thread, void* context);

struct Pool {
  int (*max_threads)() = nullptr;
  int (*in_parallel)() = nullptr;
  int (*thread_num)() = nullptr;
  int (*num_threads)() = nullptr;
  // libgomp's, on Linux
  void (*gomp_parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  // LLVM's libomp, on macOS, and Intel's libiomp5, on Windows; on Linux where torch is of conda
  int32_t (*kmpc_thread)(Place*) = nullptr;
  void (*kmpc_push_threads)(Place*, int32_t, int32_t) = nullptr;
  void (*kmpc_fork)(Place*, int32_t arguments, Microtask, ...) = nullptr;

  explicit operator bool() const { return gomp_parallel || kmpc_fork; }
};

template <class Function>
bool find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(platform::symbol(library, name));
  return function != nullptr;
}

Pool pool_of(const char* name, bool gomp) {
  Pool pool;
  void* const library = platform::loaded_library(name);
  const bool complete =
      library && find(library, "omp_get_max_threads", pool.max_threads) &&
      find(library, "omp_in_parallel", pool.in_parallel) &&
      find(library, "omp_get_thread_num", pool.thread_num) &&
      find(library, "omp_get_num_threads", pool.num_threads) &&
      (gomp ? find(library, "GOMP_parallel", pool.gomp_parallel)
            : find(library, "__kmpc_global_thread_num", pool.kmpc_thread) &&
                  find(library, "__kmpc_push_num_threads", pool.kmpc_push_threads) &&
                  find(library, "__kmpc_fork_call", pool.kmpc_fork));
  return complete ? pool : Pool{};
}

Pool find_pool() {
  if (const Pool pool = pool_of("libgomp", true)) return pool;
  if (const Pool pool = pool_of("libiomp5", false)) return pool;
  return pool_of("libomp", false);
}

// The pool's threads do not survive a fork, and libgomp would wait for them for ever.
std::atomic<bool> forked{false};

const Pool& pool() {
  static const Pool found = [] {
    platform::call_in_forked_children([] { forked.store(true, std::memory_order_relaxed); });
    return find_pool();
  }();
  return found;
}

// ---------------------------------------------------------------- a call

struct Parts {
  int count;
  void (*work)(void*, int);
  void* context;
};

// What each thread does.  There may be fewer of them than were asked for.
void do_my_parts(void* context) {
  const Parts& all = *static_cast<const Parts*>(context);
  for (int part = pool().thread_num(); part < all.count; part += pool().num_threads())
    all.work(all.context, part);
}

void do_my_parts_of_kmpc(int32_t*, int32_t*, void* context) { do_my_parts(context); }

}  // namespace

int max_threads() {
  const Pool& p = pool();
  if (!p || forked.load(std::memory_order_relaxed) || p.in_parallel()) return 1;
  return p.max_threads();
}

void run_on_threads(int parts, void (*work)(void*, int), void* context) {
  if (parts == 1) return work(context, 0);
  const Pool& p = pool();
  Parts all{parts, work, context};
  if (p.gomp_parallel) return p.gomp_parallel(do_my_parts, &all, static_cast<unsigned>(parts), 0);
  constexpr int32_t kOfKmpc = 2;
  static Place place{0, kOfKmpc, 0, 0, ";normkit;run_on_threads;0;0;;"};
  p.kmpc_push_threads(&place, p.kmpc_thread(&place), parts);
  p.kmpc_fork(&place, 1, do_my_parts_of_kmpc, &all);
}

int threads_for(int64_t bytes, int64_t pieces) {
  // Fork and join cost about a microsecond, in which one core moves this much.
  constexpr int64_t kThreadBytes = 32 << 10;
  if (bytes < 2 * kThreadBytes || pieces <= 1) return 1;
  return static_cast<int>(std::min({int64_t{max_threads()}, pieces, bytes / kThreadBytes}));
}

}  // namespace normkit::cpu
