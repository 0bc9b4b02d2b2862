// What the GPU benchmarks hold the norms against: a plain copy, an empty kernel, a bare launch.
//
// Built by gpu_method.py into a shared library of its own and called through ctypes.  Every
// function returns null, or CUDA's text of what went wrong; all of them launch on the given stream
// and may be captured in a graph.
#include <cuda.h>
#include <cuda_runtime.h>

#include <chrono>
#include <cstdint>
#include <vector>

namespace {

constexpr unsigned kSharedWithoutAsking = 48 << 10;

const char* text(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// ------------------------------------------------------------------------------------------- copy

// A block takes chunks of blockDim * kPacks packs; its threads have kPacks loads each in flight.
template <int kReads, int kWrites, int kPacks>
__global__ void copy_kernel(const uint4* __restrict__ from, const uint4* __restrict__ from2,
                            uint4* __restrict__ to, uint4* __restrict__ to2, int64_t packs) {
  const int64_t chunk = int64_t(blockDim.x) * kPacks;
  for (int64_t base = blockIdx.x * chunk; base < packs; base += gridDim.x * chunk) {
    const int64_t first = base + threadIdx.x;
    uint4 a[kPacks], b[kPacks];
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
      const int64_t at = first + int64_t(j) * blockDim.x;
      if (at >= packs) break;
      a[j] = from[at];
      if (kReads == 2) b[j] = from2[at];
    }
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
      const int64_t at = first + int64_t(j) * blockDim.x;
      if (at >= packs) break;
      if (kReads == 2 && kWrites == 1) {
        a[j] = {a[j].x ^ b[j].x, a[j].y ^ b[j].y, a[j].z ^ b[j].z, a[j].w ^ b[j].w};
      }
      to[at] = a[j];
      if (kWrites == 2) to2[at] = b[j];
    }
  }
}

struct Copy {
  const void *from, *from2;
  void *to, *to2;
  int64_t packs;
  int threads;
  int64_t most_blocks;  // 0: as many as there are chunks
  cudaStream_t stream;
};

template <int kReads, int kWrites, int kPacks>
cudaError_t launch_copy(const Copy& c) {
  const int64_t chunk = int64_t(c.threads) * kPacks;
  int64_t blocks = (c.packs + chunk - 1) / chunk;
  if (c.most_blocks && blocks > c.most_blocks) blocks = c.most_blocks;
  if (blocks > INT32_MAX) blocks = INT32_MAX;
  copy_kernel<kReads, kWrites, kPacks><<<unsigned(blocks), c.threads, 0, c.stream>>>(
      static_cast<const uint4*>(c.from), static_cast<const uint4*>(c.from2),
      static_cast<uint4*>(c.to), static_cast<uint4*>(c.to2), c.packs);
  return cudaGetLastError();
}

template <int kReads, int kWrites>
cudaError_t launch_copy(int packs_in_flight, const Copy& c) {
  switch (packs_in_flight) {
    case 1:
      return launch_copy<kReads, kWrites, 1>(c);
    case 2:
      return launch_copy<kReads, kWrites, 2>(c);
    case 4:
      return launch_copy<kReads, kWrites, 4>(c);
    case 8:
      return launch_copy<kReads, kWrites, 8>(c);
  }
  return cudaErrorInvalidValue;
}

// Reads `packs` packs and writes nothing, so that the second-level cache is left with no dirty line
// that whoever comes next would have to wait for.
__global__ void read_kernel(const uint4* from, int64_t packs, uint32_t* never) {
  uint32_t mixed = 0;
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; at < packs; at += step) {
    const uint4 pack = from[at];
    mixed |= pack.x | pack.y | pack.z | pack.w;
  }
  if (mixed == 0x5eed1e55) *never = mixed;  // the buffer holds zeros; the compiler cannot know
}

// ------------------------------------------------------------------------------------------ empty

// As many bytes of arguments as a norm of several tensors has.
struct Arguments {
  char bytes[128];
};

__global__ void empty_kernel(Arguments) {}

// A link of a programmatic chain: an empty one that would not wait could overtake those before it.
__global__ void empty_link_kernel(Arguments) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace

// How a kernel is launched; the same layout as LaunchShape in gpu_method.py.
struct LaunchShape {
  unsigned grid[3], block[3];
  unsigned dynamic_smem;
  unsigned cluster;  // 1: none
  unsigned programmatic;
};

namespace {

class EmptyLaunch {
 public:
  EmptyLaunch(const LaunchShape& shape, cudaStream_t stream)
      : kernel_(shape.programmatic ? empty_link_kernel : empty_kernel) {
    config_.gridDim = {shape.grid[0], shape.grid[1], shape.grid[2]};
    config_.blockDim = {shape.block[0], shape.block[1], shape.block[2]};
    config_.dynamicSmemBytes = shape.dynamic_smem;
    config_.stream = stream;
    config_.attrs = attributes_;
    if (shape.cluster > 1) {
      attributes_[config_.numAttrs].id = cudaLaunchAttributeClusterDimension;
      attributes_[config_.numAttrs++].val.clusterDim = {shape.cluster, 1, 1};
    }
    if (shape.programmatic) {
      attributes_[config_.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attributes_[config_.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
  }
  EmptyLaunch(const EmptyLaunch&) = delete;

  cudaError_t prepare() {
    if (config_.dynamicSmemBytes <= kSharedWithoutAsking) return cudaSuccess;
    return cudaFuncSetAttribute(kernel_, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                int(config_.dynamicSmemBytes));
  }
  cudaError_t operator()() { return cudaLaunchKernelEx(&config_, kernel_, Arguments{}); }

 private:
  void (*kernel_)(Arguments);
  cudaLaunchConfig_t config_{};
  cudaLaunchAttribute attributes_[2]{};
};

// The interface that is asked of the driver, which may be older than the compiler.
#if CUDA_VERSION >= 13000
constexpr unsigned kDriverInterface = 13000;
#else
constexpr unsigned kDriverInterface = 12030;
#endif

// The driver's own functions, without linking against it.
template <typename Function>
Function* driver_function(const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult status;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion(name, &found, kDriverInterface, cudaEnableDefault, &status);
  const bool usable = error == cudaSuccess && status == cudaDriverEntryPointSuccess;
  return usable ? reinterpret_cast<Function*>(found) : nullptr;
}

// Whether any edge lets a kernel start before the one that it follows has ended.
unsigned has_programmatic_edges(CUgraph graph) {
#if CUDA_VERSION >= 13000  // the name means the variant with edge data from here on
  const auto edges = driver_function<decltype(cuGraphGetEdges)>("cuGraphGetEdges");
  size_t count = 0;
  if (!edges || edges(graph, nullptr, nullptr, nullptr, &count)) return 0;
  std::vector<CUgraphNode> from(count), to(count);
  std::vector<CUgraphEdgeData> data(count);
  if (count == 0 || edges(graph, from.data(), to.data(), data.data(), &count)) return 0;
  for (const CUgraphEdgeData& edge : data) {
    if (edge.type == CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC) return 1;
  }
#endif
  return 0;
}

}  // namespace

extern "C" {

const char* nk_copy(int reads, int writes, int packs_in_flight, int threads, int64_t most_blocks,
                    const void* from, const void* from2, void* to, void* to2, int64_t bytes,
                    void* stream) {
  const Copy c{from,
               from2,
               to,
               to2,
               bytes / int64_t(sizeof(uint4)),
               threads,
               most_blocks,
               static_cast<cudaStream_t>(stream)};
  if (c.packs == 0) return "fewer bytes than one access";
  if (reads == 1 && writes == 1) return text(launch_copy<1, 1>(packs_in_flight, c));
  if (reads == 2 && writes == 1) return text(launch_copy<2, 1>(packs_in_flight, c));
  if (reads == 2 && writes == 2) return text(launch_copy<2, 2>(packs_in_flight, c));
  return "no copy of this read:write ratio";
}

const char* nk_read(const void* from, int64_t bytes, int blocks, void* never, void* stream) {
  read_kernel<<<blocks, 512, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const uint4*>(from), bytes / int64_t(sizeof(uint4)),
      static_cast<uint32_t*>(never));
  return text(cudaGetLastError());
}

const char* nk_empty(const LaunchShape* shape, void* stream) {
  EmptyLaunch launch(*shape, static_cast<cudaStream_t>(stream));
  if (const char* error = text(launch.prepare())) return error;
  return text(launch());
}

// `count` launches in a row; what the host spends on them goes into `seconds`.
const char* nk_launch_loop(const LaunchShape* shape, int count, double* seconds, void* stream) {
  EmptyLaunch launch(*shape, static_cast<cudaStream_t>(stream));
  if (const char* error = text(launch.prepare())) return error;
  const auto begin = std::chrono::steady_clock::now();
  for (int i = 0; i < count; ++i) {
    if (const char* error = text(launch())) return error;
  }
  *seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  return nullptr;
}

// The launch shapes of the kernels in a captured graph; at most `capacity` of them are stored, and
// all are counted.  `programmatic` is that of the graph's edges, the same for all.
const char* nk_kernels_of_graph(void* captured, LaunchShape* shapes, int capacity, int* count) {
  const auto graph = static_cast<CUgraph>(captured);
  const auto nodes_of = driver_function<decltype(cuGraphGetNodes)>("cuGraphGetNodes");
  const auto type_of = driver_function<decltype(cuGraphNodeGetType)>("cuGraphNodeGetType");
  const auto params_of =
      driver_function<decltype(cuGraphKernelNodeGetParams)>("cuGraphKernelNodeGetParams");
  const auto attribute_of =
      driver_function<decltype(cuGraphKernelNodeGetAttribute)>("cuGraphKernelNodeGetAttribute");
  if (!nodes_of || !type_of || !params_of || !attribute_of) {
    return "the driver lacks a function to look into graphs";
  }
  size_t found = 0;
  if (nodes_of(graph, nullptr, &found)) return "cuGraphGetNodes failed";
  std::vector<CUgraphNode> nodes(found);
  if (found && nodes_of(graph, nodes.data(), &found)) return "cuGraphGetNodes failed";
  const unsigned programmatic = has_programmatic_edges(graph);
  *count = 0;
  for (CUgraphNode node : nodes) {
    CUgraphNodeType type;
    if (type_of(node, &type)) return "cuGraphNodeGetType failed";
    if (type != CU_GRAPH_NODE_TYPE_KERNEL) continue;
    if ((*count)++ >= capacity) continue;
    CUDA_KERNEL_NODE_PARAMS params{};
    if (params_of(node, &params)) return "cuGraphKernelNodeGetParams failed";
    CUkernelNodeAttrValue cluster{};
    if (attribute_of(node, CU_KERNEL_NODE_ATTRIBUTE_CLUSTER_DIMENSION, &cluster)) {
      cluster.clusterDim.x = 1;
    }
    shapes[*count - 1] = {{params.gridDimX, params.gridDimY, params.gridDimZ},
                          {params.blockDimX, params.blockDimY, params.blockDimZ},
                          params.sharedMemBytes,
                          cluster.clusterDim.x > 1 ? cluster.clusterDim.x : 1,
                          programmatic};
  }
  return nullptr;
}

}  // extern "C"
