#include "threads.h"

#include <algorithm>

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#include <pthread.h>

#include <atomic>
#include <cstring>
#include <type_traits>
#endif

namespace normkit::cpu {

#if defined(__linux__)
namespace {

// libgomp's entry points, from the copy that torch has loaded.  Linking our own would start a
// second pool: 10.7 s became 35.9 s in pytorch#98836.
struct Pool {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*max_threads)() = nullptr;
  int (*in_parallel)() = nullptr;
  int (*thread_num)() = nullptr;
  int (*num_threads)() = nullptr;
};

int look_at(dl_phdr_info* info, size_t, void* found) {
  const char* name = std::strrchr(info->dlpi_name, '/');
  if (!name || std::strncmp(name + 1, "libgomp", 7) != 0) return 0;
  *static_cast<const char**>(found) = info->dlpi_name;
  return 1;
}

Pool find_pool() {
  Pool pool;
  const char* path = nullptr;
  dl_iterate_phdr(look_at, &path);
  void* library = path ? dlopen(path, RTLD_NOW | RTLD_NOLOAD) : nullptr;
  if (!library) return pool;
  const auto find = [library](auto& function, const char* name) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
    return function != nullptr;
  };
  if (!(find(pool.max_threads, "omp_get_max_threads") &&
        find(pool.in_parallel, "omp_in_parallel") && find(pool.thread_num, "omp_get_thread_num") &&
        find(pool.num_threads, "omp_get_num_threads") && find(pool.parallel, "GOMP_parallel")))
    pool.parallel = nullptr;
  return pool;
}

// The pool's threads do not survive a fork and libgomp would wait for them for ever.
std::atomic<bool> forked{false};

const Pool& pool() {
  static const Pool found = [] {
    pthread_atfork(nullptr, nullptr, [] { forked.store(true, std::memory_order_relaxed); });
    return find_pool();
  }();
  return found;
}

}  // namespace

int max_threads() {
  const Pool& p = pool();
  if (!p.parallel || forked.load(std::memory_order_relaxed) || p.in_parallel()) return 1;
  return p.max_threads();
}

struct Parts {
  int count;
  void (*work)(void*, int);
  void* context;
};

void run_on_threads(int parts, void (*work)(void*, int), void* context) {
  if (parts == 1) return work(context, 0);
  Parts all{parts, work, context};
  // The runtime may give fewer threads than were asked for.
  pool().parallel(
      [](void* p) {
        const Parts& mine = *static_cast<Parts*>(p);
        for (int part = pool().thread_num(); part < mine.count; part += pool().num_threads())
          mine.work(mine.context, part);
      },
      &all, static_cast<unsigned>(parts), 0);
}

#else

int max_threads() { return 1; }

void run_on_threads(int parts, void (*work)(void*, int), void* context) {
  for (int part = 0; part < parts; ++part) work(context, part);
}

#endif

int threads_for(int64_t bytes, int64_t pieces) {
  // Fork and join cost about a microsecond, in which one core moves this much.
  constexpr int64_t kThreadBytes = 32 << 10;
  if (bytes < 2 * kThreadBytes || pieces <= 1) return 1;
  return static_cast<int>(std::min({int64_t{max_threads()}, pieces, bytes / kThreadBytes}));
}

}  // namespace normkit::cpu
