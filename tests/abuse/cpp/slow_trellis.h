// A slow reading of docs/FORMAT.md, section 4, that shares nothing with kernels/cpu: which records are refused, and
// what a row of a sound one decodes to.
#pragma once
#include "input.h"

namespace slow {

constexpr int kPlanesOf[] = {0, 1, 2, 3, 4, 5, 6, 8};

inline uint32_t u16(const uint8_t* p) { return p[0] + 256u * p[1]; }
inline uint32_t u32(const uint8_t* p) { return u16(p) + 65536u * u16(p + 2); }
inline uint64_t u64(const uint8_t* p) { return u32(p) + (static_cast<uint64_t>(u32(p + 4)) << 32); }

// A half of any kind.
inline float half(uint32_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  double size = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
  if (exponent == 31) size = fraction ? NAN : INFINITY;
  return static_cast<float>(bits & 0x8000 ? -size : size);
}

// xxh3-64 of 56 bytes with seed 0 (its specification's section on 17 to 128 bytes): four folded products.
inline uint64_t hash56(const uint8_t* p) {
  static const uint64_t secret[8] = {0xBE4BA423396CFEB8u, 0x1CAD21F72C81017Cu, 0xDB979083E96DD4DEu,
                                     0x1F67B3B7A4A44072u, 0x78E5C0CC4EE679CBu, 0x2172FFCC7DD05A82u,
                                     0x8E2443F7744608B8u, 0x4C263A81E69035E0u};
  static const int place[4] = {0, 40, 16, 24};
  uint64_t sum = 56 * 0x9E3779B185EBCA87u;
  for (int i = 0; i < 4; ++i) {
    const unsigned __int128 product = static_cast<unsigned __int128>(u64(p + place[i]) ^ secret[2 * i]) *
                                      (u64(p + place[i] + 8) ^ secret[2 * i + 1]);
    sum += static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
  }
  sum = (sum ^ sum >> 37) * 0x165667919E3779F9u;
  return sum ^ sum >> 32;
}

// Makes a header that is right by itself: magic, version, codec and hash, which no mutation would find.
inline void repair(uint8_t* record, int64_t size) {
  if (size < 64) return;
  std::memcpy(record, "TQR1\1\1", 6);
  const uint64_t hash = hash56(record);
  for (int i = 0; i < 8; ++i) record[56 + i] = static_cast<uint8_t>(hash >> (8 * i));
}

// Where the fields of a matrix begin; -1 where absent.
struct Matrix {
  int64_t rows, columns, padded_rows, blocks;
  int64_t row_gain = -1, bias = -1, block_gain, order, rates, payload, tile_words;
  int length;

  int64_t place(const uint8_t* record, int64_t b) const {
    return blocks > 256 ? u16(record + order + 2 * b) : record[order + b];
  }
  int rate(const uint8_t* record, int64_t b) const { return record[rates + b / 2] >> 4 * (b % 2) & 15; }
};

inline bool finite_halves(const uint8_t* record, int64_t at, int64_t count) {
  for (int64_t i = 0; at >= 0 && i < count; ++i) {
    if ((record[at + 2 * i + 1] & 0x7C) == 0x7C) return false;
  }
  return true;
}

// One section; false where section 4 refuses it.
inline bool read_section(const uint8_t* record, int64_t used, int index, Matrix* m) {
  const uint8_t* entry = record + 16 + 12 * index;
  m->rows = u32(entry), m->columns = u32(entry + 4), m->length = record[6];
  const int64_t limit = 1 << 20;
  if (m->rows < 1 || m->columns < 1 || m->rows > limit || m->columns > limit) return false;
  m->padded_rows = (m->rows + 31) / 32 * 32, m->blocks = (m->columns + 63) / 64;
  int64_t at = 128 * static_cast<int64_t>(u32(entry + 8));
  const int64_t begin = at;
  const auto take = [&at](int64_t bytes) { return at += bytes, at - bytes; };
  const uint32_t flags = u32(record + 12);
  if (flags >> (8 + index) & 1) m->row_gain = take(2 * m->padded_rows);
  if (flags & 1) m->bias = take(2 * m->padded_rows);
  m->block_gain = take(8 * m->blocks);
  m->order = take(m->blocks > 256 ? 2 * m->blocks : m->blocks);
  m->rates = take((m->blocks + 1) / 2);
  m->payload = (at + 127) / 128 * 128;
  if (begin < 128 || m->payload > used) return false;
  std::vector<int> seen(static_cast<size_t>(m->blocks));
  m->tile_words = 0;
  for (int64_t b = 0; b < m->blocks; ++b) {
    const int rate = m->rate(record, b);
    const int64_t place = m->place(record, b);
    if (rate > 7 || place >= m->blocks || seen[static_cast<size_t>(place)]++) return false;
    m->tile_words += 32 * kPlanesOf[rate];
  }
  return m->payload + m->padded_rows / 32 * m->tile_words * 4 <= used &&
         finite_halves(record, m->row_gain, m->padded_rows) && finite_halves(record, m->bias, m->padded_rows) &&
         finite_halves(record, m->block_gain, 4 * m->blocks);
}

// The matrices of a record; none where section 4 refuses it.
inline std::vector<Matrix> read(const uint8_t* record, int64_t size) {
  if (size < 128 || std::memcmp(record, "TQR1\1\1", 6) || hash56(record) != u64(record + 56)) return {};
  const int length = record[6], count = record[7];
  const int64_t used = u32(record + 8);
  if ((length != 12 && length != 14 && length != 16) || count < 1 || count > 3) return {};
  if (used < 128 || used % 128 || used > size) return {};
  std::vector<Matrix> found(static_cast<size_t>(count));
  for (int i = 0; i < count; ++i) {
    if (!read_section(record, used, i, &found[static_cast<size_t>(i)])) return {};
  }
  return found;
}

// The 16 weights of a row in a tile's bitstring of `bytes` bytes, gains not applied.
inline void tile_row(const std::vector<uint8_t>& bits, int rate, int length, int row, float* out) {
  const bool one = rate > 5;
  const uint32_t step = one ? rate - 3 : rate, windows = one ? 16 : 8, size = static_cast<uint32_t>(bits.size());
  for (uint32_t p = 0; p < windows; ++p) {
    const uint32_t at = (row * windows + p) * step;
    uint32_t state = 0;
    for (uint32_t i = 0; i < 3; ++i) state |= static_cast<uint32_t>(bits[(at / 8 + i) % size]) << (8 * i);
    state = state >> at % 8 & ((1u << length) - 1);
    const uint32_t v = ((one ? state * 89226354u + 64248484u : state * 0xCBAC1FEDu) & 0x8FFF8FFFu) ^ 0x3B603B60u;
    if (one) {
      out[p] = half(v & 0xFFFF) + half(v >> 16);
    } else {
      out[2 * p] = half(v & 0xFFFF);
      out[2 * p + 1] = half(v >> 16);
    }
  }
}

// Rows first to last - 1 of a sound record's matrix, gains applied: [last - first][64 blocks].
inline std::vector<float> decode(const uint8_t* record, const Matrix& m, int64_t first, int64_t last) {
  std::vector<float> out(static_cast<size_t>((last - first) * 64 * m.blocks));
  for (int64_t tile = first / 32; tile <= (last - 1) / 32; ++tile) {
    const uint8_t* block = record + m.payload + 4 * tile * m.tile_words;
    for (int64_t b = 0; b < m.blocks; ++b) {
      const int rate = m.rate(record, b), planes = kPlanesOf[rate];
      for (int part = 0; part < 4; ++part) {
        std::vector<uint8_t> bits;
        for (int row = 0; row < 32; ++row) {
          for (int i = part * planes; i < (part + 1) * planes; ++i) {
            bits.push_back(block[128 * (i / 4) + 4 * row + i % 4]);
          }
        }
        const float block_gain = half(u16(record + m.block_gain + 2 * (4 * b + part)));
        for (int64_t row = std::max(first, 32 * tile); row < std::min(last, 32 * tile + 32); ++row) {
          float weights[16] = {};
          if (rate) tile_row(bits, rate, m.length, static_cast<int>(row % 32), weights);
          const float gain = m.row_gain < 0 ? 1.0f : half(u16(record + m.row_gain + 2 * row));
          float* to = &out[static_cast<size_t>((row - first) * 64 * m.blocks + 64 * m.place(record, b) + 16 * part)];
          for (int c = 0; c < 16; ++c) to[c] = weights[c] * block_gain * gain;
        }
      }
      block += 128 * planes;
    }
  }
  return out;
}

}  // namespace slow
