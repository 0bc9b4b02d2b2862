// Prints what calls would launch, by the project's own way from a call to a launch: the plan, and
// for each launch the kernel, the grid and the bytes of its arguments.  A call is a line of stdin:
//   n=8192 rows=65536 x=bfloat16 weight=float32 out=bfloat16 round_sum=1 processors=132 ...
// A tensor is there if its dtype is given; each has an address of its own.
#include <cxxabi.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>

#include "../../cuda/launch.h"
#include "launch_printer.hpp"

extern "C" void normkit_emulate_device(int processors, int clusters);

namespace codegen {

void print_launch(const void* kernel, const normkit::cuda::LaunchConfig& config,
                  const void* arguments, std::size_t bytes) {
  Dl_info info{};
  // What has no external linkage has no name here, and another one for each compiler.
  const char* symbol = dladdr(kernel, &info) && info.dli_saddr == kernel ? info.dli_sname : nullptr;
  char* name = symbol ? abi::__cxa_demangle(symbol, nullptr, nullptr, nullptr) : nullptr;
  std::printf("launch\t%s\t%s\t%u %u %u\t%u %u %u\t%u\t", symbol ? symbol : "", name ? name : "",
              config.grid.x, config.grid.y, config.grid.z, config.block.x, config.block.y,
              config.block.z, config.cluster);
  for (std::size_t i = 0; i < bytes; ++i)
    std::printf("%02x", static_cast<const unsigned char*>(arguments)[i]);
  std::printf("\n");
  std::free(name);
}

}  // namespace codegen

namespace {

using namespace normkit;

class Call {
 public:
  explicit Call(const std::string& line) {
    std::istringstream words(line);
    for (std::string word; words >> word;) {
      const auto equals = word.find('=');
      if (equals == std::string::npos) throw std::invalid_argument(word + ": expected name=value");
      values_[word.substr(0, equals)] = word.substr(equals + 1);
    }
  }

  int64_t integer(const std::string& name, int64_t otherwise) {
    const auto at = values_.find(name);
    if (at == values_.end()) return otherwise;
    const int64_t value = std::stoll(at->second);
    values_.erase(at);
    return value;
  }

  // Strides are in elements; the last dimension's comes last.
  void rows(const std::string& name, const int64_t (&strides)[2], int dims, RowsOf& rows) {
    rows = {};
    rows.data = tensor(name, rows.dtype);
    for (int d = 0; d < dims; ++d) rows.stride[d] = strides[2 - dims + d] * item_size(rows.dtype);
  }

  void affine(const std::string& name, int64_t n, int64_t groups, Affine& affine) {
    affine.data = tensor(name, affine.dtype);
    if (!affine.data || groups <= 1) return;
    affine.groups = groups;
    affine.stride = n * item_size(affine.dtype);
  }

  char* tensor(const std::string& name, DType& dtype) {
    const auto at = values_.find(name);
    if (at == values_.end()) return nullptr;
    const std::string of = at->second;
    values_.erase(at);
    if (of != "float32" && of != "float16" && of != "bfloat16")
      throw std::invalid_argument(name + ": expected a dtype, got " + of);
    dtype = of == "float32"   ? DType::kFloat32
            : of == "float16" ? DType::kFloat16
                              : DType::kBFloat16;
    return address(name);
  }

  char* address(const std::string& name) {
    const intptr_t value = ++tensors_ << 40;
    std::printf("tensor\t%s\t%llx\n", name.c_str(), static_cast<unsigned long long>(value));
    return reinterpret_cast<char*>(value);
  }

  void all_taken() const {
    for (const auto& [name, value] : values_)
      throw std::invalid_argument(name + ": there is no such thing to give");
  }

 private:
  std::map<std::string, std::string> values_;
  intptr_t tensors_ = 0;
};

// What a forward and a backward call have both.
template <class Norm>
void lay_out(Call& call, Norm& norm, int64_t heads) {
  norm.n = call.integer("n", 0);
  norm.rows = call.integer("rows", 1);
  norm.statistic = call.integer("layer", 0) ? Statistic::kLayer : Statistic::kRms;
  norm.outer_dims = heads > 0 ? 2 : norm.rows > 1 ? 1 : 0;
  norm.outer_size[0] = heads > 0 ? norm.rows / heads : norm.rows;
  norm.outer_size[1] = heads;
  norm.options.eps = 1e-6f;
  for (const Flag& flag : kFlags) norm.options.*flag.member = call.integer(flag.name, 0) != 0;
}

void forward(Call& call) {
  RowNorm norm{};
  const int64_t heads = call.integer("heads_of_qkv", 0);
  lay_out(call, norm, heads);
  const int64_t packed[] = {heads * norm.n, norm.n}, sliced[] = {3 * heads * norm.n, norm.n};
  call.rows("x", sliced, norm.outer_dims, norm.x);
  call.rows("residual", packed, norm.outer_dims, norm.residual);
  call.rows("out", packed, norm.outer_dims, norm.out);
  call.rows("residual_out", packed, norm.outer_dims, norm.residual_out);
  const int64_t groups = call.integer("heads", 1);
  call.affine("weight", norm.n, groups, norm.weight);
  call.affine("bias", norm.n, groups, norm.bias);
  Rotation& rotation = norm.rotation;
  rotation.width = call.integer("width", 0);
  rotation.interleaved = call.integer("interleaved", 0) != 0;
  const int64_t of_tokens[] = {rotation.width / 2, 0};
  call.rows("cos", of_tokens, norm.outer_dims, rotation.cos);
  call.rows("sin", of_tokens, norm.outer_dims, rotation.sin);
  call.all_taken();
  std::printf("plan\t%s\n", cuda::describe(norm, 0).c_str());
  cuda::row_norm(norm, 0, nullptr);
}

void backward(Call& call) {
  RowNormBackward norm{};
  lay_out(call, norm, 0);
  const int64_t packed[] = {0, norm.n};
  call.rows("x", packed, norm.outer_dims, norm.x);
  call.rows("grad_y", packed, norm.outer_dims, norm.grad_y);
  call.rows("grad_x", packed, norm.outer_dims, norm.grad_x);
  call.affine("weight", norm.n, 1, norm.weight);
  call.affine("bias", norm.n, 1, norm.bias);
  norm.grad_weight = call.address("grad_weight");
  if (norm.bias.data) norm.grad_bias = call.address("grad_bias");
  norm.rstd = reinterpret_cast<float*>(call.address("rstd"));
  if (norm.statistic == Statistic::kLayer)
    norm.mean = reinterpret_cast<float*>(call.address("mean"));
  norm.normalised = norm.x.dtype;
  call.all_taken();
  std::printf("plan\t%s\n", cuda::describe(norm, 0).c_str());
  cuda::row_norm_backward(norm, 0, nullptr, call.address("workspace"));
}

}  // namespace

int main() {
  for (std::string line; std::getline(std::cin, line);) try {
      Call call(line);
      const int64_t processors = call.integer("processors", 132);
      normkit_emulate_device(static_cast<int>(processors), call.integer("clusters", 1) != 0);
      std::printf("call\n");
      if (call.integer("backward", 0))
        backward(call);
      else
        forward(call);
    } catch (const std::exception& error) {
      std::fprintf(stderr, "%s: %s\n", line.c_str(), error.what());
      return 1;
    }
  return 0;
}
