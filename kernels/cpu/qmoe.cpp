// Matrices of the qmoe codec (docs/FORMAT.md, section 7): check, decode, and products with a few tokens.
//
// Codewords stand for runs of symbols, 0 for a zero weight. Most weights are zeros, so only the others are visited: two
// bits a symbol, and the lowest pair that is not zero is found by counting zeros. Nothing is trusted but the tables,
// which are the caller's own: every place in a row and every codeword is bounded before it is followed.
#include <atomic>
#include <cstring>
#include <vector>

#include "library.h"

namespace tqmoe {
namespace {

constexpr int64_t kRowsAtOnce = 16;
constexpr int kWindow = 28;  // symbols that 8 bytes hold from any symbol on

typedef tq_qmoe_matrix Matrix;

// By bytes: what comes from a record need not be aligned, and a copy from a typed pointer says that it is.
uint32_t load32(const uint32_t* p) {
  uint32_t v;
  std::memcpy(&v, reinterpret_cast<const uint8_t*>(p), sizeof v);
  return v;
}

template <int Bits>
uint32_t codeword(const uint8_t* codes, int64_t c) {
  if constexpr (Bits == 8) return codes[c];
  const uint8_t* p = codes + c * Bits / 8;
  const uint32_t both = p[0] | static_cast<uint32_t>(p[1]) << 8;
  return Bits == 16 ? both : both >> (c % 2 * 4) & 4095;
}

// Up to 28 symbols from symbol `at` on, the first in the lowest bits; the words end with 8 bytes of zeros.
uint64_t window(const uint32_t* symbols, uint32_t at, int64_t count) {
  uint64_t v;
  std::memcpy(&v, reinterpret_cast<const uint8_t*>(symbols) + at / 4, sizeof v);
  v >>= 2 * (at % 4);
  return count < kWindow ? v & ((uint64_t{1} << (2 * count)) - 1) : v & ((uint64_t{1} << (2 * kWindow)) - 1);
}

// Calls visit(column, symbol) for each weight of a row that is not zero, in order; false if the row is not sound, and
// then none beyond the row has been visited.
template <int Bits, class Visit>
bool walk(const Matrix& m, int64_t row, Visit&& visit) {
  const int64_t begin = load32(m.offsets + row), end = load32(m.offsets + row + 1);
  if (begin > end || end > m.codewords) return false;
  int64_t at = 0;
  for (int64_t c = begin; c < end; ++c) {
    const uint32_t code = codeword<Bits>(m.codes, c);
    if (at >= m.columns || code >= m.entries) return false;
    const uint32_t start = m.starts[code];
    const int64_t length = m.starts[code + 1] - start;
    for (int64_t i = 0; i < length; i += kWindow) {
      const uint64_t symbols = window(m.symbols, start + static_cast<uint32_t>(i), length - i);
      for (uint64_t left = (symbols | symbols >> 1) & 0x5555555555555555u; left != 0; left &= left - 1) {
        const int bit = __builtin_ctzll(left);
        const int64_t column = at + i + bit / 2;
        if (column >= m.columns) return false;
        visit(column, static_cast<int>(symbols >> bit & 3));
      }
    }
    at += length;
  }
  return at >= m.columns && at <= m.reach;
}

// The weights of symbols 0 to 3 in a row.
void row_values(const Matrix& m, int64_t row, float* value) {
  value[0] = value[3] = 0.0f;
  for (int s = 1; s < m.levels; ++s) {
    uint16_t half;
    std::memcpy(&half, reinterpret_cast<const uint8_t*>(m.values + row * (m.levels - 1) + s - 1), sizeof half);
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    std::memcpy(value + s, &bits, sizeof bits);
  }
}

template <int Bits>
bool decode_row(const Matrix& m, int64_t row, float* out) {
  float value[4];
  row_values(m, row, value);
  std::memset(out, 0, sizeof(float) * static_cast<size_t>(m.columns));
  return walk<Bits>(m, row, [&](int64_t column, int symbol) { out[column] = value[symbol]; });
}

// x [columns][Tokens] -> y[t * m.rows], a sum for each symbol first.
template <int Bits, int Tokens>
bool multiply_row(const Matrix& m, int64_t row, const float* x, int tokens, float* y) {
  float value[4], sum[4][Tokens] = {};
  row_values(m, row, value);
  const bool sound = walk<Bits>(m, row, [&](int64_t column, int symbol) {
    for (int t = 0; t < Tokens; ++t) sum[symbol][t] += x[column * Tokens + t];
  });
  for (int t = 0; t < tokens; ++t) {
    float total = 0.0f;
    for (int s = 1; s < 4; ++s) total += value[s] * sum[s][t];
    y[t * m.rows + row] = total;
  }
  return sound;
}

// Calls work(row) for rows over the thread pool; TQ_RECORD if one of them is not sound.
template <class Work>
int over_rows(int64_t first, int64_t last, Work&& work) {
  std::atomic<bool> sound{true};
  Turn turn;
  turn.each((last - first + kRowsAtOnce - 1) / kRowsAtOnce, [&](int64_t part, int) {
    const int64_t end = first + (part + 1) * kRowsAtOnce < last ? first + (part + 1) * kRowsAtOnce : last;
    for (int64_t row = first + part * kRowsAtOnce; row < end; ++row) {
      if (!work(row)) sound.store(false);
    }
  });
  return sound.load() ? TQ_OK : TQ_RECORD;
}

template <int Bits>
int check(const Matrix& m) {
  if (load32(m.offsets) != 0 || load32(m.offsets + m.rows) != m.codewords) return TQ_RECORD;
  return over_rows(0, m.rows, [&](int64_t row) { return walk<Bits>(m, row, [](int64_t, int) {}); });
}

template <int Bits>
int dequantize(const Matrix& m, int64_t first, int64_t last, float* out) {
  return over_rows(first, last, [&](int64_t row) { return decode_row<Bits>(m, row, out + (row - first) * m.columns); });
}

template <int Bits>
int multiply(const Matrix& m, const float* x, int tokens, float* y) {
  if (tokens == 1) {
    return over_rows(0, m.rows, [&](int64_t row) { return multiply_row<Bits, 1>(m, row, x, 1, y); });
  }
  constexpr int width = 8;
  std::vector<float> turned(static_cast<size_t>(m.columns * width));
  for (int t = 0; t < tokens; ++t) {
    for (int64_t c = 0; c < m.columns; ++c) turned[c * width + t] = x[t * m.columns + c];
  }
  return over_rows(0, m.rows, [&](int64_t row) { return multiply_row<Bits, width>(m, row, turned.data(), tokens, y); });
}

}  // namespace
}  // namespace tqmoe

using namespace tqmoe;

int tq_qmoe_check(const tq_qmoe_matrix* m) {
  return guarded([&] { return m->bits == 8 ? check<8>(*m) : m->bits == 12 ? check<12>(*m) : check<16>(*m); });
}

int tq_qmoe_dequantize(const tq_qmoe_matrix* m, int64_t row_start, int64_t row_stop, float* out) {
  return guarded([&] {
    if (m->bits == 8) return dequantize<8>(*m, row_start, row_stop, out);
    return m->bits == 12 ? dequantize<12>(*m, row_start, row_stop, out) : dequantize<16>(*m, row_start, row_stop, out);
  });
}

int tq_qmoe_qmv(const tq_qmoe_matrix* m, const float* x, int tokens, float* y) {
  return guarded([&] {
    if (m->bits == 8) return multiply<8>(*m, x, tokens, y);
    return m->bits == 12 ? multiply<12>(*m, x, tokens, y) : multiply<16>(*m, x, tokens, y);
  });
}
