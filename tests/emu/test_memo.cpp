// A launch that a thread has made before is made again with other addresses: whether that is told
// from one that is not the same, by every field of a call, and whether it gives the same bits.
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "../../cuda/device.h"
#include "../../cuda/launch.h"
#include "../../cuda/memo.h"

namespace {

using namespace normkit;
using cuda::Device;
using cuda::LaunchKey;

int failures = 0;

void expect(bool holds, const char* what) {
  if (holds) return;
  std::printf("FAILED: %s\n", what);
  ++failures;
}

template <class T>
T* address(intptr_t at) {
  return reinterpret_cast<T*>(at);
}

// ---------------------------------------------------------------- the key

constexpr int kDims = 2;
constexpr Device kDevice{4, true, true};

// All there is to a call, in memory that holds `rest` wherever nothing is said of it.
RowNorm full_norm(unsigned char rest) {
  RowNorm norm;
  std::memset(static_cast<void*>(&norm), rest, sizeof(norm));
  norm.statistic = Statistic::kRms;
  norm.rows = 6;
  norm.n = 64;
  norm.outer_dims = kDims;
  norm.outer_size[0] = 2;
  norm.outer_size[1] = 3;
  int64_t at = 0x1000;
  for (RowsOf* t : {&norm.x, &norm.residual, &norm.out, &norm.residual_out}) {
    t->data = address<char>(at += 0x1000);
    t->dtype = DType::kFloat32;
    t->stride[0] = 768;
    t->stride[1] = 256;
  }
  for (Affine* t : {&norm.weight, &norm.bias}) {
    t->data = address<char>(at += 0x1000);
    t->dtype = DType::kFloat32;
    t->stride = 256;
    t->inner = 1;
    t->groups = 3;
  }
  norm.options = {1e-6f, 1.f, false, true, false, false};
  norm.rstd = address<float>(at += 0x1000);
  norm.mean = address<float>(at += 0x1000);
  norm.split.step = Step::kWhole;
  norm.split.statistics = address<float>(at += 0x1000);
  norm.split.gathered = address<float>(at += 0x1000);
  norm.split.parts = 2;
  norm.split.plane = 6;
  return norm;
}

// The bytes of a call that a launch does not depend on.
class Free {
 public:
  Free() : free_(sizeof(RowNorm), false) {
    const RowNorm norm{};
    const auto place = [&](const auto& field) {
      return reinterpret_cast<const char*>(&field) - reinterpret_cast<const char*>(&norm);
    };
    // Of an address, all but the lowest byte.
    const auto somewhere = [&](const auto& pointer) {
      add(place(pointer) + 1, place(pointer) + sizeof(pointer));
    };
    const auto beyond = [&](const int64_t (&array)[kMaxOuterDims]) {
      add(place(array[kDims]), place(array) + sizeof(array));
    };
    const auto gap = [&](const auto& field, const auto& next) {
      add(place(field) + sizeof(field), place(next));
    };
    const auto all = [&](const auto& field) { add(place(field), place(field) + sizeof(field)); };
    gap(norm.statistic, norm.first_row);
    all(norm.first_row);   // 0 in a call that is one launch
    all(norm.modulation);  // whose launches are not kept
    all(norm.gating);      // likewise
    all(norm.before);
    all(norm.rotation);
    all(norm.cache);
    gap(norm.outer_dims, norm.outer_size);
    beyond(norm.outer_size);
    for (const RowsOf* t : {&norm.x, &norm.residual, &norm.out, &norm.residual_out}) {
      somewhere(t->data);
      gap(t->dtype, t->stride);
      beyond(t->stride);
      all(t->column_stride);  // launches of strided columns are not kept
    }
    for (const Affine* t : {&norm.weight, &norm.bias}) {
      somewhere(t->data);
      gap(t->dtype, t->stride);
    }
    gap(norm.options.as_is, norm.rstd);
    for (float* const* p : {&norm.rstd, &norm.mean, &norm.split.statistics}) somewhere(*p);
    somewhere(norm.split.gathered);
    gap(norm.split.step, norm.split.statistics);
  }
  bool operator()(size_t byte) const { return free_[byte]; }

 private:
  void add(std::ptrdiff_t begin, std::ptrdiff_t end) {
    for (std::ptrdiff_t i = begin; i < end; ++i) free_[i] = true;
  }
  std::vector<bool> free_;
};

void test_every_byte_of_a_call_is_in_the_key_or_known_to_be_free() {
  const LaunchKey key = cuda::key_of(full_norm(0x5a), kDevice, 0);
  expect(key == cuda::key_of(full_norm(0xa5), kDevice, 0), "what is not said does not count");
  const Free free;
  for (size_t byte = 0; byte < sizeof(RowNorm); ++byte) {
    RowNorm other = full_norm(0x5a);
    reinterpret_cast<unsigned char*>(&other)[byte] ^= 1;
    if (other.outer_dims < 0 || other.outer_dims > cuda::kLaunchDims) continue;  // no one launch
    if ((key == cuda::key_of(other, kDevice, 0)) == free(byte)) continue;
    std::printf("FAILED: byte %zu of %zu of a call is %s\n", byte, sizeof(RowNorm),
                free(byte) ? "in the key, and was said to be free" : "not in the key");
    ++failures;
  }
}

void test_an_address_counts_by_its_alignment_and_whether_there_is_one() {
  const RowNorm norm = full_norm(0);
  const LaunchKey key = cuda::key_of(norm, kDevice, 0);
  const auto with = [&](intptr_t at) {
    RowNorm other = norm;
    other.residual.data = address<char>(at);
    return cuda::key_of(other, kDevice, 0);
  };
  expect(with(0x777700) == key, "another address, aligned alike");
  for (int bit = 1; bit < 128; bit *= 2) expect(!(with(0x777700 + bit) == key), "less aligned");
  expect(!(with(0) == key), "none");
  RowNorm none = norm, garbage = norm;
  none.residual.data = garbage.residual.data = nullptr;
  garbage.residual.stride[0] = 12345;
  expect(cuda::key_of(none, kDevice, 0) == cuda::key_of(garbage, kDevice, 0),
         "strides of what is not there do not count");
}

void test_the_device_is_in_the_key() {
  const RowNorm norm = full_norm(0);
  const LaunchKey key = cuda::key_of(norm, kDevice, 1);
  expect(!(cuda::key_of(norm, kDevice, 2) == key), "another device");
  expect(!(cuda::key_of(norm, {5, true, true}, 1) == key), "more processors");
  expect(!(cuda::key_of(norm, {4, false, true}, 1) == key), "no clusters");
  expect(!(cuda::key_of(norm, {4, true, false}, 1) == key), "no programmatic launch");
}

// ---------------------------------------------------------------- the memo

void test_the_last_eight_are_known() {
  cuda::Memo<int> memo;
  const auto key = [](int64_t rows) {
    RowNorm norm = full_norm(0);
    norm.rows = rows;
    return cuda::key_of(norm, kDevice, 0);
  };
  expect(!memo.find(key(1)), "nothing is known at first");
  for (int i = 1; i <= 8; ++i) memo.add(key(i), 10 * i);
  for (const int i : {1, 8, 3, 3, 2, 1, 7}) {
    const int* found = memo.find(key(i));
    expect(found && *found == 10 * i, "each is found by its key");
  }
  memo.add(key(9), 90);
  expect(!memo.find(key(1)) && memo.find(key(9)) && memo.find(key(2)), "the oldest one goes");
}

// ---------------------------------------------------------------- results

std::mt19937_64 random(1);
int below(int n) { return static_cast<int>(random() % n); }

// What a call is made of; a field that changes alone makes a call of another kind, or the same.
struct Case {
  Statistic statistic = Statistic::kRms;
  int sizes[3] = {1, 1, 3};
  int n = 64;
  DType x = DType::kFloat32, residual = x, out = x, residual_out = x, weight = x, bias = x;
  bool adds = false, has_weight = true, has_bias = false, per_head = false, saves = false;
  int pad = 0;    // elements between rows of x
  int shift = 0;  // elements from an aligned address to that of every tensor
  NormOptions options{1e-6f, 0.f, false, true, false, false};
};

void change(Case& c) {
  constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
  constexpr int kColumns[] = {8, 40, 64, 100, 256, 1024};
  switch (below(23)) {
    case 0:
      c.statistic = static_cast<Statistic>(below(2));
      break;
    case 1:
      c.sizes[below(3)] = 1 + below(4);
      break;
    case 2:
      c.n = kColumns[below(6)];
      break;
    case 3:
      c.x = kDTypes[below(3)];
      break;
    case 4:
      c.residual = kDTypes[below(3)];
      break;
    case 5:
      c.out = kDTypes[below(3)];
      break;
    case 6:
      c.residual_out = kDTypes[below(3)];
      break;
    case 7:
      c.weight = kDTypes[below(3)];
      break;
    case 8:
      c.bias = kDTypes[below(3)];
      break;
    case 9:
      c.adds = !c.adds;
      break;
    case 10:
      c.has_weight = !c.has_weight;
      break;
    case 11:
      c.has_bias = !c.has_bias;
      break;
    case 12:
      c.per_head = !c.per_head;
      break;
    case 13:
      c.saves = !c.saves;
      break;
    case 14:
      c.pad = 8 * below(3);
      break;
    case 15:
      c.shift = below(3);
      break;
    case 16:
      c.options.eps = below(2) ? 1e-6f : 0.3f;
      break;
    case 17:
      c.options.weight_offset = static_cast<float>(below(2));
      break;
    case 18:
      c.options.round_before_weight = !c.options.round_before_weight;
      break;
    case 19:
      c.options.of_sum = !c.options.of_sum;
      break;
    case 20:
      c.options.eps_outside = !c.options.eps_outside;
      break;
    case 21:
      c.options.round_weight = !c.options.round_weight;
      break;
    default:
      c.options.round_sum = !c.options.round_sum;
  }
}

// The tensors of a case, in memory of their own.
struct Tensors {
  std::vector<std::vector<char>> memory;
  RowNorm norm{};
  std::vector<int> outputs;  // of `memory`

  Tensors(const Case& c, uint64_t seed) {
    std::mt19937_64 values(seed);
    norm.statistic = c.statistic;
    norm.n = c.n;
    norm.outer_dims = 3;
    norm.rows = 1;
    for (int d = 0; d < 3; ++d) norm.rows *= norm.outer_size[d] = c.sizes[d];
    rows(norm.x, c, c.x, c.pad, &values);
    if (c.adds) rows(norm.residual, c, c.residual, 0, &values);
    rows(norm.out, c, c.out, 0, nullptr);
    if (c.adds) rows(norm.residual_out, c, c.residual_out, 0, nullptr);
    const int heads = c.per_head ? c.sizes[2] : 1;
    if (c.has_weight) map(norm.weight, c, c.weight, heads, values);
    if (c.has_bias) map(norm.bias, c, c.bias, heads, values);
    norm.options = c.options;
    if (!c.has_weight) norm.options.weight_offset = 0.f;
    if (c.saves) {
      norm.rstd = reinterpret_cast<float*>(take(norm.rows * 4, 0, nullptr, DType::kFloat32));
      if (c.statistic == Statistic::kLayer)
        norm.mean = reinterpret_cast<float*>(take(norm.rows * 4, 0, nullptr, DType::kFloat32));
    }
  }

  void run() { cuda::row_norm(norm, 0, nullptr); }

  bool same_outputs(const Tensors& other) const {
    for (const int i : outputs)
      if (memory[i].size() != other.memory[i].size() ||
          std::memcmp(aligned(memory[i]), aligned(other.memory[i]), memory[i].size() - 128))
        return false;
    return true;
  }

 private:
  static const char* aligned(const std::vector<char>& of) {
    return of.data() + (128 - reinterpret_cast<uintptr_t>(of.data()) % 128) % 128;
  }
  char* take(int64_t bytes, int64_t shift, std::mt19937_64* values, DType dtype) {
    memory.emplace_back(bytes + shift + 128, char(0));
    char* const at = const_cast<char*>(aligned(memory.back())) + shift;
    if (!values) outputs.push_back(static_cast<int>(memory.size()) - 1);
    for (int64_t i = 0; values && i < bytes; i += item_size(dtype)) {
      const float v = static_cast<float>(below_(*values)) / 64.f - 1.f;
      if (dtype == DType::kFloat32)
        std::memcpy(at + i, &v, 4);
      else if (dtype == DType::kFloat16)
        *reinterpret_cast<cuda::Half*>(at + i) = __float2half_rn(v);
      else
        *reinterpret_cast<cuda::BFloat16*>(at + i) = __float2bfloat16_rn(v);
    }
    return at;
  }
  static unsigned below_(std::mt19937_64& values) { return static_cast<unsigned>(values() % 256); }
  void rows(RowsOf& t, const Case& c, DType dtype, int pad, std::mt19937_64* values) {
    const int64_t size = item_size(dtype), row = (c.n + pad) * size;
    t.dtype = dtype;
    t.data = take(norm.rows * row, c.shift * size, values, dtype);
    t.stride[2] = row;
    t.stride[1] = row * c.sizes[2];
    t.stride[0] = t.stride[1] * c.sizes[1];
  }
  void map(Affine& t, const Case& c, DType dtype, int heads, std::mt19937_64& values) {
    const int64_t size = item_size(dtype);
    t.dtype = dtype;
    t.data = take(heads * c.n * size, c.shift * size, &values, dtype);
    if (heads == 1) return;
    t.groups = heads;
    t.stride = c.n * size;
  }
};

// A new thread has made no launches yet.
void run_anew(Tensors& tensors) {
  std::thread([&] { tensors.run(); }).join();
}

void test_calls_in_any_order_give_the_bits_of_first_calls() {
  Case c;
  std::vector<Case> turns(1, c);
  for (int i = 0; i < 3000; ++i) {
    // Now and then one of those before, which the memo may know.
    if (below(3) == 0) c = turns[below(static_cast<int>(turns.size()))];
    if (below(3)) change(c);
    if (turns.size() < 6)
      turns.push_back(c);
    else
      turns[below(6)] = c;
    const uint64_t seed = random();
    Tensors again(c, seed), anew(c, seed);
    again.run();
    run_anew(anew);
    if (again.same_outputs(anew)) continue;
    std::printf("FAILED: call %d differs from the same call of a new thread\n", i);
    ++failures;
    return;
  }
}

void test_split_rows_are_told_apart() {
  constexpr int kRows = 2, kTurns = 3;
  for (const Statistic statistic : {Statistic::kRms, Statistic::kLayer}) {
    Case c;
    c.statistic = statistic;
    c.sizes[2] = kRows;
    const auto statistics_of = [&](Tensors& tensors, bool anew) {
      std::vector<float> found(planes_of(statistic) * kRows);
      tensors.norm.split = Split{Step::kStatistics, found.data(), nullptr, 1, kRows};
      anew ? run_anew(tensors) : tensors.run();
      return found;
    };
    const auto apply = [](Tensors& tensors, const std::vector<float>& gathered, bool anew) {
      tensors.norm.split = Split{Step::kApply, nullptr, gathered.data(), 1, kRows};
      anew ? run_anew(tensors) : tensors.run();
    };
    std::vector<std::vector<float>> kept;  // so that each has an address of its own
    for (int turn = 0; turn < kTurns; ++turn) {
      Tensors anew(c, 10 + turn), again(c, 10 + turn);
      const std::vector<float> expected = statistics_of(anew, true);
      kept.push_back(statistics_of(again, false));
      expect(kept.back() == expected, "statistics of a part");
      apply(anew, expected, true);
      apply(again, kept.back(), false);
      expect(again.same_outputs(anew), "a part, with what all have said");
    }
  }
}

}  // namespace

int main(int, char** argv) {
  test_every_byte_of_a_call_is_in_the_key_or_known_to_be_free();
  test_an_address_counts_by_its_alignment_and_whether_there_is_one();
  test_the_device_is_in_the_key();
  test_the_last_eight_are_known();
  test_calls_in_any_order_give_the_bits_of_first_calls();
  test_split_rows_are_told_apart();
  std::printf("%s: %d failures\n", argv[0], failures);
  return failures != 0;
}
