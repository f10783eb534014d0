// The C interface: chooses the instruction set, turns exceptions into error numbers.
#include <atomic>
#include <cstring>
#include <new>

#include "library.h"

namespace tqmoe {
namespace {

// Best first.
const Kernels* available(int index) {
  const Kernels* all[] = {avx512_kernels(), avx2_kernels(), neon_kernels(), portable_kernels()};
  for (const Kernels* k : all) {
    if (k && index-- == 0) return k;
  }
  return nullptr;
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels& active_kernels() {
  const Kernels* k = chosen.load();
  return k ? *k : *available(0);
}

}  // namespace tqmoe

using namespace tqmoe;

int tq_interface_version(void) { return 1; }

const char* tq_isa_name(int index) {
  const Kernels* k = index < 0 ? nullptr : available(index);
  return k ? k->name : nullptr;
}

const char* tq_isa(void) { return active_kernels().name; }

int tq_use_isa(const char* name) {
  for (int i = 0; const Kernels* k = available(i); ++i) {
    if (std::strcmp(k->name, name) == 0) {
      chosen.store(k);
      return 0;
    }
  }
  return 1;
}

void tq_set_threads(int count) { set_threads(count); }
int tq_threads(void) { return threads(); }

int tq_encode_tiles(const float* x, int64_t tiles, int rate, int length, uint8_t* codes, float* values) {
  return guarded([&] {
    encode_tiles(x, tiles, rate, length, codes, values);
    return TQ_OK;
  });
}

int tq_check_record(const uint8_t* data, uint64_t size, const uint32_t* shapes, int matrices, int bias) {
  RecordView record;
  if (!parse_record(data, size, true, &record) || record.matrices != matrices) return 0;
  for (int i = 0; i < matrices; ++i) {
    const MatrixView& m = record.matrix[i];
    if (m.rows != shapes[2 * i] || m.columns != shapes[2 * i + 1] || (m.bias != nullptr) != (bias != 0)) return 0;
  }
  return 1;
}

int tq_record_shape(const uint8_t* data, uint64_t size, int matrix, int64_t* out) {
  RecordView record;
  if (!parse_record(data, size, false, &record)) return TQ_RECORD;
  if (matrix < 0 || matrix >= record.matrices) return TQ_SHAPE;
  out[0] = record.matrix[matrix].rows;
  out[1] = record.matrix[matrix].columns;
  out[2] = record.matrices;
  return TQ_OK;
}

int tq_dequantize(const uint8_t* data, uint64_t size, int matrix, int64_t row_start, int64_t row_stop, float* out) {
  return guarded([&]() -> int {
    RecordView record;
    if (!parse_record(data, size, false, &record)) return TQ_RECORD;
    if (matrix < 0 || matrix >= record.matrices) return TQ_SHAPE;
    const MatrixView& m = record.matrix[matrix];
    if (row_start < 0 || row_start >= row_stop || row_stop > m.padded_rows) return TQ_SHAPE;
    const int64_t first = row_start / kRowTile, last = (row_stop - 1) / kRowTile;
    const Kernels& kernels = active_kernels();
    Turn turn;
    turn.each(last - first + 1, [&](int64_t item, int) {
      const int64_t tile = first + item, base = tile * kRowTile;
      const int64_t from = row_start > base ? row_start - base : 0;
      const int64_t to = row_stop - base < kRowTile ? row_stop - base : kRowTile;
      kernels.decode_tile(m, tile, static_cast<int>(from), static_cast<int>(to),
                          out + (base + from - row_start) * m.padded_columns);
    });
    return TQ_OK;
  });
}

int tq_gather_qmv(const uint8_t* pool, uint64_t pool_bytes, const int64_t* offsets, int64_t picks, int matrix,
                  const float* x, int64_t tokens, int64_t columns, const int32_t* rows_of, const float* sign,
                  int64_t rows, float* y) {
  return guarded([&] {
    const Gather g{pool, pool_bytes, offsets, picks, x, tokens, columns, rows_of, sign};
    return gather_qmv(g, matrix, rows, y);
  });
}

int tq_gather_moe(const uint8_t* pool, uint64_t pool_bytes, const int64_t* offsets, int64_t picks, const float* x,
                  int64_t tokens, int64_t columns, int64_t middle, int64_t out_rows, const int32_t* rows_of,
                  const float* sign_in, const float* sign_mid, int activation, float alpha, float limit, float* y) {
  return guarded([&] {
    const Gather g{pool, pool_bytes, offsets, picks, x, tokens, columns, rows_of, sign_in};
    return gather_moe(g, middle, out_rows, sign_mid, Activation{activation, alpha, limit}, y);
  });
}

int tq_affine_qmv(const uint32_t* weights, const float* scales, const float* biases, int bits, int64_t rows,
                  int64_t columns, const float* x, int tokens, float* y) {
  return guarded([&] {
    affine_product(
        {reinterpret_cast<const uint8_t*>(weights), scales, biases, bits, rows, columns, tokens, x, nullptr, y});
    return TQ_OK;
  });
}

int tq_rans_decode(const uint32_t* frequencies, const uint8_t* ends, const uint8_t* states, int64_t tiles,
                   const uint8_t* words, int64_t word_count, int64_t count, uint8_t* out) {
  return guarded([&] { return rans_decode({frequencies, ends, states, tiles, words, word_count, count, out}); });
}
