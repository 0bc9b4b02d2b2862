// The threads of the CPU kernels: those of an OpenMP runtime that somebody else has loaded.
//
//   test_threads LIBRARY   loads that runtime, as torch does: libgomp, libomp or libiomp5
//   test_threads           has none
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

#if defined(_WIN32)
#include <windows.h>
#else
#include <dlfcn.h>
#endif

#include "../../cpp/cpu/threads.h"

namespace {

using namespace normkit::cpu;

void expect(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "not so: %s\n", what);
  std::exit(1);
}

bool load(const char* library) {
#if defined(_WIN32)
  return LoadLibraryA(library) != nullptr;
#else
  return dlopen(library, RTLD_NOW) != nullptr;
#endif
}

struct Seen {
  std::vector<std::atomic<int>> times;
  std::mutex mutex;
  std::set<std::thread::id> threads;
  int inside = 0;  // what max_threads() says there
  explicit Seen(int parts) : times(parts) {}
};

void look(void* context, int part) {
  Seen& seen = *static_cast<Seen*>(context);
  ++seen.times[part];
  const std::lock_guard lock(seen.mutex);
  seen.threads.insert(std::this_thread::get_id());
  seen.inside = max_threads();
}

size_t threads_of(int parts) {
  Seen seen(parts);
  run_on_threads(parts, look, &seen);
  for (const auto& times : seen.times) expect(times == 1, "each part is done once");
  if (parts > 1 && max_threads() > 1) expect(seen.inside == 1, "a region starts no other");
  return seen.threads.size();
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 2) {
    expect(max_threads() == 1 && threads_for(1 << 30, 100) == 1, "a call stays on its thread");
    expect(threads_of(1) == 1, "a call stays on its thread");
    return 0;
  }
  expect(load(arguments[1]), "the library can be loaded");
  const int most = max_threads();
  std::printf("%d threads\n", most);
  expect(most > 1, "there are several threads");
  expect(threads_for(1 << 30, 100) == most, "a large call takes all of them");
  expect(threads_for(1 << 10, 100) == 1, "a small call takes one");
  for (int turn = 0; turn < 200; ++turn)
    for (const int parts : {1, 2, most, 5 * most}) {
      const size_t threads = threads_of(parts);
      expect(parts == 1 ? threads == 1 : threads > 1, "parts are done by several threads");
    }
}
