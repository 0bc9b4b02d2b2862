#include "columns.h"

#include <algorithm>
#include <cstring>

#include "threads.h"

namespace normkit::cpu {
namespace {

constexpr int64_t kLine = 64;
// Dense rows of a block stay in the second-level cache, with those of y.  Blocks of 64 rows take
// two thirds of the time of those that would stay in the first-level one (Zen 3, 256 and 768
// columns of float32): the more rows, the longer the pieces of memory that a column is read in.
constexpr int64_t kDenseBytes = 192 << 10;

// ---------------------------------------------------------------- squares of 16 bytes by 16 bytes

// Their items are of one size, and what they mean makes no difference.
struct Words {
  using Item = uint32_t;
  typedef uint32_t Vector __attribute__((vector_size(16)));
};
struct Halves {
  using Item = uint16_t;
  typedef uint16_t Vector __attribute__((vector_size(16)));
};
template <class Of>
constexpr int kSide = 16 / int(sizeof(typename Of::Item));

#ifdef __clang__
#define NORMKIT_PICK(Vector, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else  // GCC has that one from version 12 on
#define NORMKIT_PICK(Vector, a, b, ...) __builtin_shuffle(a, b, Vector{__VA_ARGS__})
#endif

// The first halves of both, item by item, and the second ones.
inline Words::Vector zip_low(Words::Vector a, Words::Vector b) {
  return NORMKIT_PICK(Words::Vector, a, b, 0, 4, 1, 5);
}
inline Words::Vector zip_high(Words::Vector a, Words::Vector b) {
  return NORMKIT_PICK(Words::Vector, a, b, 2, 6, 3, 7);
}
inline Halves::Vector zip_low(Halves::Vector a, Halves::Vector b) {
  return NORMKIT_PICK(Halves::Vector, a, b, 0, 8, 1, 9, 2, 10, 3, 11);
}
inline Halves::Vector zip_high(Halves::Vector a, Halves::Vector b) {
  return NORMKIT_PICK(Halves::Vector, a, b, 4, 12, 5, 13, 6, 14, 7, 15);
}

// Item i of row j becomes item j of row i; steps are bytes from a row to the next.
template <class Of>
inline void transpose_square(const char* from, int64_t from_step, char* to, int64_t to_step) {
  constexpr int kRows = kSide<Of>;
  typename Of::Vector row[kRows], zipped[kRows];
  for (int i = 0; i < kRows; ++i) std::memcpy(&row[i], from + i * from_step, 16);
  for (int apart = 1; apart < kRows; apart *= 2) {
    for (int i = 0; i < kRows / 2; ++i) {
      zipped[2 * i] = zip_low(row[i], row[i + kRows / 2]);
      zipped[2 * i + 1] = zip_high(row[i], row[i + kRows / 2]);
    }
    for (int i = 0; i < kRows; ++i) row[i] = zipped[i];
  }
  for (int i = 0; i < kRows; ++i) std::memcpy(to + i * to_step, &row[i], 16);
}

// ---------------------------------------------------------------- between strided and dense

// Where a block of rows lies: dense columns, or strided ones of rows that are an element apart.
struct Strided {
  char* data;
  int64_t stride;  // bytes from a column to the next
};
struct Dense {
  char* data;
  int64_t pitch;  // bytes from a row to the next
};

// kGather: to the dense rows; else from them.
template <class Of, bool kGather>
void copy_items(Strided strided, Dense dense, int64_t rows, int64_t n) {
  constexpr int64_t kItem = sizeof(typename Of::Item);
  for (int64_t c = 0; c < n; ++c)
    for (int64_t r = 0; r < rows; ++r) {
      char* const in_column = strided.data + c * strided.stride + r * kItem;
      char* const in_row = dense.data + r * dense.pitch + c * kItem;
      std::memcpy(kGather ? in_row : in_column, kGather ? in_column : in_row, kItem);
    }
}

inline void fetch(const char* from, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += kLine) __builtin_prefetch(from + at, 0, 2);
}

// Of rows side by side.  A square that would reach beyond the last row, or column, begins earlier:
// it copies again what has been copied.
template <class Of, bool kGather>
void copy_columns(Strided strided, Dense dense, int64_t rows, int64_t n) {
  constexpr int64_t kItem = sizeof(typename Of::Item), kRows = kSide<Of>;
  if (rows < kRows || n < kRows) return copy_items<Of, kGather>(strided, dense, rows, n);
  for (int64_t column = 0; column < n; column += kRows) {
    const int64_t c = std::min(column, n - kRows);
    for (int64_t row = 0; row < rows; row += kRows) {
      const int64_t r = std::min(row, rows - kRows);
      char* const in_columns = strided.data + c * strided.stride + r * kItem;
      char* const in_rows = dense.data + r * dense.pitch + c * kItem;
      if constexpr (kGather)
        transpose_square<Of>(in_columns, strided.stride, in_rows, dense.pitch);
      else
        transpose_square<Of>(in_rows, dense.pitch, in_columns, strided.stride);
    }
  }
}

// rows[r] is the first element of a row with strided columns.
template <bool kGather, class Pointer>
void copy_rows(const Pointer* rows, int count, const RowsOf& tensor, Dense dense, int64_t n) {
  const int64_t item = item_size(tensor.dtype);
  const auto at = [rows](int r) { return static_cast<char*>(const_cast<void*>(rows[r])); };
  for (int begin = 0, end; begin < count; begin = end) {
    end = begin + 1;
    while (end < count && at(end) == at(end - 1) + item) ++end;
    const Strided strided{at(begin), tensor.column_stride};
    const Dense to{dense.data + begin * dense.pitch, dense.pitch};
    if (item == 4)
      copy_columns<Words, kGather>(strided, to, end - begin, n);
    else
      copy_columns<Halves, kGather>(strided, to, end - begin, n);
  }
}

// An odd number of cache lines, so that neighbours in a column do not meet in one set of a cache.
int64_t pitch_of(const RowsOf& tensor, int64_t n) {
  if (!tensor.has_strided_columns()) return 0;
  return ((n * item_size(tensor.dtype) + kLine - 1) / kLine | 1) * kLine;
}

// Then the dense rows of y take the place of those of x, which leaves more room in the caches.
bool are_alike(const RowNorm& norm) {
  return norm.x.has_strided_columns() && norm.out.has_strided_columns() &&
         norm.x.dtype == norm.out.dtype;
}

}  // namespace

int64_t rows_of_strided_block(const RowNorm& norm, int64_t traffic) {
  // Those of a line, of the narrower of the tensors that are strided.
  int64_t line = 1;
  for (const RowsOf* tensor : {&norm.x, &norm.out})
    if (tensor->has_strided_columns()) line = std::max(line, kLine / item_size(tensor->dtype));
  const int64_t lines = (norm.rows + line - 1) / line;
  const int64_t threads = threads_for(traffic, lines);
  const int64_t fitting = kDenseBytes / (norm.n * item_size(norm.x.dtype)) / line;
  const int64_t of_thread = std::max<int64_t>((lines + threads - 1) / threads, 1);
  const int64_t most = std::min(of_thread, kMaxBlockRows / line);
  return std::min(std::clamp<int64_t>(fitting, 1, most) * line, std::max<int64_t>(norm.rows, 1));
}

int64_t StridedColumns::bytes(const RowNorm& norm, int64_t block_rows) {
  const int64_t x = pitch_of(norm.x, norm.n), out = pitch_of(norm.out, norm.n);
  return block_rows * (are_alike(norm) ? x : x + out);
}

StridedColumns::StridedColumns(const RowNorm& norm, int64_t block_rows, char* memory)
    : norm_(norm),
      x_pitch_(pitch_of(norm.x, norm.n)),
      out_pitch_(pitch_of(norm.out, norm.n)),
      x_(memory),
      out_(are_alike(norm) ? memory : memory + block_rows * x_pitch_) {}

void StridedColumns::take(Block& b) {
  if (x_pitch_) {
    copy_rows<true>(b.x, b.rows, norm_.x, {x_, x_pitch_}, b.n);
    for (int r = 0; r < b.rows; ++r) b.x[r] = x_ + r * x_pitch_;
  }
  if (!out_pitch_) return;
  for (int r = 0; r < b.rows; ++r) {
    y_[r] = b.out[r];
    b.out[r] = out_ + r * out_pitch_;
  }
}

void StridedColumns::give(const Block& b) const {
  if (out_pitch_) copy_rows<false>(y_, b.rows, norm_.out, {out_, out_pitch_}, b.n);
}

}  // namespace normkit::cpu
