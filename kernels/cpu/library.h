// What the library's own files share; the instruction-set files do not include it (they must not emit common inline
// code).
#pragma once
#include <cstdint>
#include <cstring>

#include "isa.h"
#include "record.h"
#include "threads.h"
#include "tiny_qmoe_cpu.h"

namespace tqmoe {

// What a function of the C interface returns: no exception leaves the library.
template <class Work>
int guarded(Work&& work) {
  try {
    return work();
  } catch (...) {  // memory or threads are exhausted
    return TQ_MEMORY;
  }
}

const Kernels& active_kernels();

void affine_product(AffineJob job);

void encode_tiles(const float* x, int64_t tiles, int rate, int length, uint8_t* codes, float* values);

// Coded bytes in 32 interleaved lanes a tile; see the C interface. Returns TQ_OK or TQ_RECORD.
struct RansJob {
  const uint32_t* frequencies;
  const uint8_t *ends, *states;
  int64_t tiles;
  const uint8_t* words;
  int64_t word_count, count;
  uint8_t* out;
};
int rans_decode(const RansJob& job);

// Which records multiply which tokens; see the C interface.
struct Gather {
  const uint8_t* pool;
  uint64_t pool_bytes;
  const int64_t* offsets;
  int64_t picks;
  const float* x;
  int64_t tokens, columns;
  const int32_t* rows_of;
  const float* sign_in;
};

struct Activation {
  int kind;
  float alpha, limit;
};

// Both return TQ_OK, TQ_RECORD, TQ_SHAPE or TQ_RANGE.
int gather_qmv(const Gather& g, int matrix, int64_t rows, float* y);
int gather_moe(const Gather& g, int64_t middle, int64_t out_rows, const float* sign_mid, const Activation& activation,
               float* y);

}  // namespace tqmoe
