// Rows whose columns are strided, as the channels of an image are.  The stages work on dense rows:
// those of a block are copied to memory of the thread, and what is made of them from there.
#pragma once
#include "kernels.h"

namespace normkit::cpu {

inline bool has_strided_columns(const RowNorm& norm) {
  return norm.x.has_strided_columns() || norm.out.has_strided_columns();
}

// Rows of a block, where columns of x or of the output are strided, of a call that moves so many
// bytes.  So many that lie side by side fill cache lines, which would otherwise be fetched once for
// each of them.
int64_t rows_of_strided_block(const RowNorm& norm, int64_t traffic);

class StridedColumns {
 public:
  // Bytes that a part needs for its blocks.
  static int64_t bytes(const RowNorm& norm, int64_t block_rows);

  StridedColumns(const RowNorm& norm, int64_t block_rows, char* memory);

  // Rows of x, and where y goes, become dense ones.
  void take(Block& b);
  // The rows of y go where they belong.
  void give(const Block& b) const;

 private:
  const RowNorm& norm_;
  int64_t x_pitch_, out_pitch_;  // bytes from a dense row to the next; 0: they are not needed
  char *x_, *out_;
  void* y_[kMaxBlockRows];
};

}  // namespace normkit::cpu
