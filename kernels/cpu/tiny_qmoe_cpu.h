// The C interface of the library; tiny_qmoe_mlx/native.py binds it and checks every size that the caller promises here.
// Functions that can fail return 0, or a tq_error. What comes from a file (records, pools, weights, codewords, words,
// offsets and values of a qmoe matrix) needs no alignment; other arrays have that of their elements.
#pragma once
#include <stdint.h>

#if defined(_WIN32)
#define TQ_API __declspec(dllexport)
#else
#define TQ_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum tq_error { TQ_OK = 0, TQ_MEMORY = 1, TQ_RECORD = 2, TQ_SHAPE = 3, TQ_RANGE = 4 };
enum tq_activation { TQ_SILU = 0, TQ_GELU_TANH = 1, TQ_SWIGLU_OAI = 2, TQ_RELU2 = 3 };

TQ_API int tq_interface_version(void);

// Instruction sets: names of those that this machine runs, best first; null past the end.
TQ_API const char* tq_isa_name(int index);
TQ_API const char* tq_isa(void);
TQ_API int tq_use_isa(const char* name);  // 0, or 1 if this machine lacks it
TQ_API void tq_set_threads(int count);
TQ_API int tq_threads(void);

// x f32 [tiles][32][16] in the code's own units -> codes u8 [tiles][32][planes], values f32 [tiles][32][16].
TQ_API int tq_encode_tiles(const float* x, int64_t tiles, int rate, int length, uint8_t* codes, float* values);

// 1 if the record is sound and has these matrices: shapes u32 [matrices][2], rows and columns.
TQ_API int tq_check_record(const uint8_t* data, uint64_t size, const uint32_t* shapes, int matrices, int bias);
// Rows and columns of a matrix, unpadded, and the number of matrices: out i64 [3].
TQ_API int tq_record_shape(const uint8_t* data, uint64_t size, int matrix, int64_t* out);

// Rows row_start to row_stop - 1 of a matrix: out f32 [row_stop - row_start][padded columns].
TQ_API int tq_dequantize(const uint8_t* data, uint64_t size, int matrix, int64_t row_start, int64_t row_stop,
                         float* out);

// y[p] = matrix of the record at pool + offsets[p], times the rotated x[rows_of[p]], plus bias.
// x f32 [tokens][columns], sign f32 [padded columns], y f32 [picks][rows].
TQ_API int tq_gather_qmv(const uint8_t* pool, uint64_t pool_bytes, const int64_t* offsets, int64_t picks, int matrix,
                         const float* x, int64_t tokens, int64_t columns, const int32_t* rows_of, const float* sign,
                         int64_t rows, float* y);

// Offsets outside the pool and rows_of outside the tokens give TQ_RANGE.
// The whole expert: y f32 [picks][out_rows]. middle: columns of the last matrix, unpadded.
TQ_API int tq_gather_moe(const uint8_t* pool, uint64_t pool_bytes, const int64_t* offsets, int64_t picks,
                         const float* x, int64_t tokens, int64_t columns, int64_t middle, int64_t out_rows,
                         const int32_t* rows_of, const float* sign_in, const float* sign_mid, int activation,
                         float alpha, float limit, float* y);

// Rows of an MLX affine matrix, groups of 64 columns, 4 or 8 bits, times tokens (1 to 8): y f32 [tokens][rows].
// weights u32 [rows][columns * bits / 32], scales and biases f32 [rows][columns / 64], x f32 [tokens][columns].
TQ_API int tq_affine_qmv(const uint32_t* weights, const float* scales, const float* biases, int bits, int64_t rows,
                         int64_t columns, const float* x, int tokens, float* y);

// A matrix of the qmoe codec. offsets u32 [rows + 1], codewords before each row; values u16 [rows][levels - 1],
// bfloat16 and finite; codes, `codewords` of `bits` bits (8, 12, 16) each. Codeword c < entries stands for the symbols
// starts[c] to starts[c + 1] - 1, two bits each, 16 a word, and 8 bytes of zeros follow them. A row's codewords stand
// for `columns` symbols at least, for `reach` at most, and those beyond the columns are 0.
typedef struct {
  const uint32_t* offsets;
  const uint16_t* values;
  const uint8_t* codes;
  const uint32_t* starts;
  const uint32_t* symbols;
  int64_t rows, columns, codewords, reach;
  uint32_t entries;
  int32_t bits, levels;
} tq_qmoe_matrix;

// TQ_OK if every row is sound, else TQ_RECORD. The others check as they go, and give TQ_RECORD too.
TQ_API int tq_qmoe_check(const tq_qmoe_matrix* m);
// Rows row_start to row_stop - 1: out f32 [row_stop - row_start][columns].
TQ_API int tq_qmoe_dequantize(const tq_qmoe_matrix* m, int64_t row_start, int64_t row_stop, float* out);
// Times tokens (1 to 8): x f32 [tokens][columns], y f32 [tokens][rows].
TQ_API int tq_qmoe_qmv(const tq_qmoe_matrix* m, const float* x, int tokens, float* y);

// rANS as in codecs/rans.py: frequencies u32 [256], ends u32 [tiles], states u32 [tiles][32], words u16 [word_count] ->
// out u8 [count]. TQ_RECORD if anything contradicts itself; out is then unfinished.
TQ_API int tq_rans_decode(const uint32_t* frequencies, const uint8_t* ends, const uint8_t* states, int64_t tiles,
                          const uint8_t* words, int64_t word_count, int64_t count, uint8_t* out);

#ifdef __cplusplus
}
#endif
