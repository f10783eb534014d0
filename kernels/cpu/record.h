// Records (docs/FORMAT.md, section 4): every size and offset is bounded here before a kernel follows it.
#pragma once
#include <cstdint>

#include "isa.h"

namespace tqmoe {

constexpr int kMaxMatrices = 3;

struct RecordView {
  int matrices;
  MatrixView matrix[kMaxMatrices];
};

// The views of a record of `size` bytes; false if anything in it is not as the format says. `whole` also checks what
// the kernels do not depend on: the header's hash, that gains are finite, and that the order is a permutation.
bool parse_record(const uint8_t* data, uint64_t size, bool whole, RecordView* out);

}  // namespace tqmoe
