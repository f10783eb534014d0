// One table of functions per instruction set; api.cpp chooses a table at run time. Everything with a body is static,
// here and in trellis.h: were it shared, the linker could pick the copy that was compiled for the newest machine.
#pragma once
#include <cstdint>

#include "trellis.h"

namespace tqmoe {

struct EncodeJob {
  int rate, length;
  int reach;               // windows on each side of the seam in the first pass
  float units, clip;       // code units per 1.0, and the largest target in code units
  const int16_t* code[2];  // weights of every state in code units; both point to the same table for 3INST
};

// One matrix of a checked record. Pointers lead into the record and may be unaligned.
struct MatrixView {
  int length;
  int64_t rows, columns;                // of the model
  int64_t padded_rows, padded_columns;  // multiples of 32 and 64
  int64_t blocks;
  const uint8_t *row_gain, *bias;  // null where absent
  const uint8_t *block_gain, *order, *rates, *payload;
  int64_t tile_bytes;  // of one row tile of the payload
};

static inline int block_rate(const MatrixView& m, int64_t block) {
  return m.rates[block >> 1] >> (block & 1 ? 4 : 0) & 15;
}
// The place of a stored block among the model's blocks.
static inline int64_t block_place(const MatrixView& m, int64_t block) {
  return m.blocks > 256 ? load_u16(m.order + 2 * block) : m.order[block];
}

constexpr int kMaxTokens = 8;  // that share one decoding

// An MLX affine matrix (groups of 64 columns) times tokens: y f32 [tokens][rows]. x f32 [tokens][columns] in the order
// of affine_impl.h, x_sums f32 [tokens][columns / 64].
struct AffineJob {
  const uint8_t* weights;
  const float *scales, *biases;  // [rows][columns / 64]
  int bits;                      // 4 or 8
  int64_t rows, columns;
  int tokens;  // 1 to kMaxTokens
  const float *x, *x_sums;
  float* y;
};

struct Kernels {
  const char* name;
  // x f32 [32][16] -> codes [512 * bits / 8], the tile's bitstring; memory: encode_memory bytes, 64-aligned.
  void (*encode_tile)(const EncodeJob& job, const float* x, uint8_t* codes, void* memory);
  // Row tile of a matrix times tokens (1 to 8): sums f32 [tokens][32], without row gains. x f32 [padded columns][width]
  // in stored order, times block gains, where width is tokens rounded up to 1, 2, 4 or 8 and the extra ones are zero.
  void (*multiply_tile)(const MatrixView& m, int64_t tile, int tokens, const float* x, float* sums);
  // Row tile's values with gains, columns in the model's order: out f32 [32][padded columns]; only rows first to last
  // - 1.
  void (*decode_tile)(const MatrixView& m, int64_t tile, int first, int last, float* out);
  // In place: signs, then the normalised Hadamard transform of groups of `size`.
  void (*rotate)(float* x, const float* sign, int64_t columns, int64_t size);
  // Rows first to last - 1 of the product.
  void (*affine_rows)(const AffineJob& job, int64_t first, int64_t last);
};

static inline int64_t encode_memory(int length) {
  int64_t states = int64_t{1} << length;
  return 2 * states + states + 128 + 2 * kTileWeights + kTileWeights + kTileWeights * (states / 8) + 64;
}

static inline int token_width(int tokens) { return tokens <= 2 ? tokens : tokens <= 4 ? 4 : 8; }

const Kernels* portable_kernels();
const Kernels* avx2_kernels();  // null where not compiled in, or the machine lacks it
const Kernels* avx512_kernels();
const Kernels* neon_kernels();

}  // namespace tqmoe
