// Whether the emulation does what a device does, and catches what it is there to catch.
//
//   test_emulator          everything; what has to end the process is run in one of its own
//   test_emulator FAULT    only that fault
#include <sys/wait.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include "faults.hpp"

namespace {

#if defined(__SANITIZE_THREAD__)
constexpr bool kTsan = true, kAsan = false;
#elif defined(__SANITIZE_ADDRESS__)
constexpr bool kTsan = false, kAsan = true;
#else
constexpr bool kTsan = false, kAsan = false;
#endif

int failures = 0;

void expect(bool holds, const char* what) {
  if (holds) return;
  std::printf("FAILED: %s\n", what);
  ++failures;
}

__global__ void count_threads(int* runs, dim3 grid, dim3 block) {
  const unsigned thread = (threadIdx.z * block.y + threadIdx.y) * block.x + threadIdx.x;
  const unsigned at = (blockIdx.z * grid.y + blockIdx.y) * grid.x + blockIdx.x;
  const bool same = gridDim.x == grid.x && gridDim.z == grid.z && blockDim.y == block.y;
  runs[at * block.x * block.y * block.z + thread] += same ? 1 : 100;
}

void test_every_thread_runs_once() {
  const dim3 grid(6, 3, 2), block(5, 7, 3);
  for (const unsigned cluster : {1u, 2u}) {
    std::vector<int> runs(6 * 3 * 2 * 5 * 7 * 3);
    expect(!NORMKIT_LAUNCH(count_threads, shape(grid, block, cluster), runs.data(), grid, block),
           "a launch in three dimensions");
    for (const int n : runs) expect(n == 1, "every thread runs once, and knows where it is");
  }
}

__global__ void rotate(float* out, int rounds) {
  NORMKIT_SHARED(float[1024], value);
  NORMKIT_DYNAMIC_SHARED(float, other);
  float v = float(threadIdx.x);
  for (int i = 0; i < rounds; ++i) {
    float* to = i % 2 ? other : value;
    to[threadIdx.x] = v;
    __syncthreads();
    v = to[(threadIdx.x + 1) % blockDim.x];
  }
  out[global_index()] = v;
}

void test_barriers_and_shared_memory() {
  for (const unsigned threads : {1u, 32u, 100u, 256u, 1024u}) {
    std::vector<float> out(3 * threads);
    NORMKIT_LAUNCH(rotate, shape(3, threads, 1, threads * 4), out.data(), 5);
    for (unsigned i = 0; i < out.size(); ++i)
      expect(out[i] == float((i + 5) % threads), "what was written before a barrier is read");
  }
}

__global__ void read_unwritten(bool* nan) {
  NORMKIT_SHARED(float[8], value);
  NORMKIT_DYNAMIC_SHARED(float, other);
  nan[blockIdx.x] = value[7] != value[7] && other[3] != other[3];
  value[7] = other[3] = 1.f;
}

void test_shared_memory_is_poisoned_for_every_block() {
  bool nan[16] = {};
  NORMKIT_LAUNCH(read_unwritten, shape(16, 1, 1, 16), nan);
  for (const bool is : nan) expect(is, "shared memory is NaN when a block starts");
}

__global__ void shuffle(unsigned* out, unsigned group, int width) {
  const unsigned lane = threadIdx.x % 32;
  const unsigned mask = group == 32 ? kAll : ((1u << group) - 1) << (lane & ~(group - 1));
  unsigned v = threadIdx.x;
  // Groups go round so often that they are never in step.
  for (unsigned i = 0; i <= lane / group * 3; ++i) {
    v = __shfl_xor_sync(mask, v, 1, width);
    if (i % 2) __syncwarp(mask);
    v = __shfl_xor_sync(mask, v, 1, width);
  }
  out[global_index()] = __shfl_xor_sync(mask, v, int(group) / 2, width);
}

__global__ void shuffle_segments(int* out) {
  const int v = int(threadIdx.x);
  out[threadIdx.x] = __shfl_xor_sync(kAll, v, 4, 4);
  out[threadIdx.x + 32] = __shfl_sync(kAll, v, 6, 4);
  out[threadIdx.x + 64] = int(__shfl_xor_sync(kAll, double(v), 31));
}

__global__ void mixed_masks(int* out) {
  const int v = int(threadIdx.x);
  int sum = __shfl_xor_sync(kAll, v, 16);
  if (threadIdx.x < 2) sum += __shfl_xor_sync(3, v, 1);
  if (threadIdx.x < 4) sum += __shfl_xor_sync(15, v, 2);
  out[threadIdx.x] = sum + __shfl_xor_sync(kAll, v, 8);
}

void test_shuffles() {
  for (const unsigned group : {2u, 4u, 8u, 16u, 32u}) {
    unsigned out[2 * 96];
    NORMKIT_LAUNCH(shuffle, shape(2, 96), out, group, 32);
    for (unsigned i = 0; i < 192; ++i)
      expect(out[i] == (i % 96 ^ group / 2), "groups of a warp shuffle by themselves");
  }
  int out[96];
  NORMKIT_LAUNCH(shuffle_segments, shape(1, 32), out);
  for (int i = 0; i < 32; ++i) {
    expect(out[i] == (i % 8 < 4 ? i : i - 4), "a later segment cannot be read, an earlier one can");
    expect(out[i + 32] == i / 4 * 4 + 2, "the source lane counts from its segment");
    expect(out[i + 64] == 31 - i, "values of eight bytes");
  }
  NORMKIT_LAUNCH(mixed_masks, shape(1, 32), out);
  for (int i = 0; i < 32; ++i)
    expect(out[i] == (i ^ 16) + (i < 2 ? i ^ 1 : 0) + (i < 4 ? i ^ 2 : 0) + (i ^ 8),
           "a lane may be in one mask after the other");
}

__global__ void warp_rotate(float* out) {
  NORMKIT_SHARED(float[64], value);
  const unsigned first = threadIdx.x & ~31u;
  float v = float(threadIdx.x);
  for (int i = 0; i < 6; ++i) {
    value[threadIdx.x] = v;
    __syncwarp();
    v = value[first + (threadIdx.x + 1) % 32];
    __syncwarp();
  }
  out[threadIdx.x] = v;
}

void test_warp_barrier() {
  float out[64];
  NORMKIT_LAUNCH(warp_rotate, shape(1, 64), out);
  for (unsigned i = 0; i < 64; ++i)
    expect(out[i] == float((i & ~31u) + (i + 6) % 32), "__syncwarp orders the lanes of a warp");
}

__global__ void sum_cluster(unsigned* out) {
  NORMKIT_SHARED(unsigned[8], of_block);
  NORMKIT_DYNAMIC_SHARED(unsigned, also);
  cluster_arrive_relaxed();
  const unsigned rank = cluster_rank(), size = cluster_size();
  cluster_wait();
  if (threadIdx.x < size) {
    *cluster_peer(&of_block[rank], threadIdx.x) = blockIdx.x + 1;
    cluster_peer(also, threadIdx.x)[rank] = 100;
  }
  cluster_arrive();
  cluster_wait();
  unsigned sum = 0;
  for (unsigned i = 0; i < size; ++i) sum += of_block[i] + also[i];
  out[global_index()] = blockIdx.x % size == rank ? sum : 0;
}

void test_clusters() {
  for (const unsigned size : {1u, 2u, 4u, 8u})
    for (const unsigned threads : {32u, 96u}) {
      std::vector<unsigned> out(16 * threads);
      expect(!NORMKIT_LAUNCH(sum_cluster, shape(16, threads, size, 32), out.data()), "clusters");
      for (unsigned i = 0; i < out.size(); ++i) {
        const unsigned first = i / threads / size * size;
        expect(out[i] == size * first + size * (size + 1) / 2 + 100 * size,
               "the blocks of a cluster reach each other's memory");
      }
    }
}

__global__ void nothing() {}

void test_launch_limits() {
  const auto text = [](const LaunchConfig& config) {
    const char* error = NORMKIT_LAUNCH(nothing, config);
    return std::string(error ? error : "fine");
  };
  const std::string bad = "invalid configuration argument";
  expect(text(shape(1, 1024)) == "fine", "1024 threads");
  expect(text(shape(1, dim3(8, 8, 16))) == "fine", "1024 threads in three dimensions");
  expect(text(shape(1, 1025)) == bad, "1025 threads");
  expect(text(shape(1, dim3(1, 1, 65))) == bad, "65 threads along z");
  expect(text(shape(1, dim3(65536, 65536))) == bad, "a product that overflows");
  expect(text(shape(0, 32)) == bad, "no blocks");
  expect(text(shape(1, 0)) == bad, "no threads");
  expect(text(shape(dim3(1, 65535), 1)) == "fine", "65535 blocks along y");
  expect(text(shape(dim3(1, 65536), 1)) == bad, "65536 blocks along y");
  expect(text(shape(dim3(1, 1, 65536), 1)) == bad, "65536 blocks along z");
  expect(text(shape(0x80000000u, 1)) == bad, "2^31 blocks");
  expect(text(shape(1, 1, 1, 227 * 1024)) == "fine", "227 KiB of shared memory");
  expect(text(shape(1, 1, 1, 227 * 1024 + 1)) == "invalid argument", "more of it");
  expect(text(shape(12, 32, 4)) == "fine", "clusters of 4");
  expect(text(shape(10, 32, 4)) == bad, "a grid that is not whole clusters");
  for (const unsigned size : {0u, 3u, 16u})
    expect(text(shape(48, 32, size)) == bad, "cluster size");
}

__global__ void record(std::vector<unsigned>* order) { order->push_back(global_index()); }

__global__ void reuse_without_barrier(float* out) {
  NORMKIT_SHARED(float[128], value);
  float v = 1.f;
  for (int i = 0; i < 2; ++i) {
    value[threadIdx.x] = v;
    __syncthreads();
    v = value[(threadIdx.x + 32) % 128] + 1.f;
  }
  out[threadIdx.x] = v;
}

void test_schedule() {
  if (kTsan) return;  // these are races
  const auto order_of = [](unsigned seed) {
    std::vector<unsigned> order;
    emu::seed(seed);
    NORMKIT_LAUNCH(record, shape(4, 64), &order);
    return order;
  };
  expect(order_of(1) == order_of(1), "a seed decides the order");
  expect(order_of(1) != order_of(2), "another seed, another order");
  expect(order_of(3).size() == 256, "every thread has its turn");
  int wrong = 0;
  for (unsigned seed = 0; seed < 20; ++seed) {
    float out[128];
    emu::seed(seed);
    NORMKIT_LAUNCH(reuse_without_barrier, shape(1, 128), out);
    for (const float v : out)
      if (v != 3.f) {
        ++wrong;
        break;
      }
  }
  expect(wrong >= 15, "memory that is used again without a barrier gives wrong values");
}

void test_launches_of_several_host_threads() {
  std::vector<std::thread> hosts;
  bool right[3] = {};
  for (bool& all : right)
    hosts.emplace_back([&all] {
      all = true;
      for (int i = 0; i < 20; ++i) {
        float out[64];
        NORMKIT_LAUNCH(rotate, shape(1, 64, 1, 256), out, 3);
        for (int t = 0; t < 64; ++t) all = all && out[t] == float((t + 3) % 64);
      }
    });
  for (std::thread& host : hosts) host.join();
  for (const bool all : right) expect(all, "host threads launch one after the other");
}

void test_inverse_square_root() {
  expect(inverse_square_root(4.f) == 0.5f && inverse_square_root(2.f) == 0.70710678f, "1/sqrt");
  expect(std::isinf(inverse_square_root(0.f)) && std::isnan(inverse_square_root(-1.f)), "its ends");
}

bool applies(const Fault& fault) {
  return fault.when == When::kAlways || (fault.when == When::kAsan ? kAsan : kTsan);
}

// In a process of its own, and not a fork: TSan does not look at what forks of threads do.
void expect_fault(const char* program, const Fault& fault) {
  std::fflush(stdout);
  FILE* pipe = popen((std::string("exec '") + program + "' " + fault.name + " 2>&1").c_str(), "r");
  std::string text;
  char buffer[4096];
  while (pipe && std::fgets(buffer, sizeof buffer, pipe)) text += buffer;
  const int status = pipe ? pclose(pipe) : -1;
  const bool ended = fault.when == When::kAlways
                         ? WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT
                         : status != 0;
  expect(ended, fault.name);
  expect(
      text.find(fault.message) != std::string::npos,
      (std::string(fault.name) + " should say '" + fault.message + "', but says\n" + text).c_str());
}

}  // namespace

int main(int argc, char** argv) {
  for (const Fault& fault : kFaults)
    if (argc > 1 && !std::strcmp(argv[1], fault.name)) {
      fault.run();
      return 0;
    }
  if (argc > 1) {
    std::fprintf(stderr, "no fault has the name %s\n", argv[1]);
    return 2;
  }
  for (unsigned seed = 0; seed < 5; ++seed) {
    emu::seed(seed);
    test_every_thread_runs_once();
    test_barriers_and_shared_memory();
    test_shared_memory_is_poisoned_for_every_block();
    test_shuffles();
    test_warp_barrier();
    test_clusters();
  }
  test_launch_limits();
  test_schedule();
  test_launches_of_several_host_threads();
  test_inverse_square_root();
  int faults = 0;
  for (const Fault& fault : kFaults)
    if (applies(fault)) expect_fault(argv[0], fault), ++faults;
  std::printf("%s: %d faults looked for, %d failures\n", argv[0], faults, failures);
  return failures != 0;
}
