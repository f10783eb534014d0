#include "record.h"

#include <vector>

namespace tqmoe {
namespace {

constexpr uint32_t kMagic = 0x31525154u;
constexpr uint64_t kUnit = 128, kHashedBytes = 56;
constexpr uint64_t kMaxDimension = uint64_t{1} << 20;

uint32_t load_u32(const uint8_t* p) { return load_u16(p) | load_u16(p + 2) << 16; }
uint64_t load_u64(const uint8_t* p) { return load_u32(p) | static_cast<uint64_t>(load_u32(p + 4)) << 32; }
uint64_t round_up(uint64_t n, uint64_t unit) { return (n + unit - 1) / unit * unit; }

// XXH3-64 with seed 0 of exactly 56 bytes: the branch of the algorithm for 17 to 128 bytes, with the part of its
// default secret that this length uses.
uint64_t hash_header(const uint8_t* data) {
  static const uint8_t secret[64] = {0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7,
                                     0x21, 0xad, 0x1c, 0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40,
                                     0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f, 0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5,
                                     0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21, 0xb8, 0x08, 0x46, 0x74,
                                     0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c};
  auto mix = [&](uint64_t at, uint64_t key) {
    unsigned __int128 product = static_cast<unsigned __int128>(load_u64(data + at) ^ load_u64(secret + key)) *
                                (load_u64(data + at + 8) ^ load_u64(secret + key + 8));
    return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
  };
  uint64_t sum = kHashedBytes * 0x9E3779B185EBCA87u;
  sum += mix(0, 0) + mix(kHashedBytes - 16, 16) + mix(16, 32) + mix(kHashedBytes - 32, 48);
  sum = (sum ^ sum >> 37) * 0x165667919E3779F9u;
  return sum ^ sum >> 32;
}

bool all_finite(const uint8_t* halves, uint64_t count) {
  for (uint64_t i = 0; halves && i < count; ++i) {
    if ((load_u16(halves + 2 * i) & 0x7C00u) == 0x7C00u) return false;
  }
  return true;
}

bool in_range(const MatrixView& m, uint64_t* words) {
  *words = 0;
  for (int64_t b = 0; b < m.blocks; ++b) {
    if (block_rate(m, b) >= kRates || block_place(m, b) >= m.blocks) return false;
    *words += 32 * kPlanes[block_rate(m, b)];
  }
  return true;
}

bool is_permutation(const MatrixView& m) {
  std::vector<bool> seen(m.blocks);
  for (int64_t b = 0; b < m.blocks; ++b) {
    if (seen[block_place(m, b)]) return false;
    seen[block_place(m, b)] = true;
  }
  return true;
}

// `size`: the used bytes; `offset`: of the section.
bool parse_section(const uint8_t* data, uint64_t size, uint64_t offset, bool row_gain, bool bias, bool whole,
                   MatrixView* m) {
  const uint64_t rows = m->rows, columns = m->columns;
  if (rows < 1 || rows > kMaxDimension || columns < 1 || columns > kMaxDimension) return false;
  const uint64_t padded = round_up(rows, kRowTile), blocks = round_up(columns, kBlockColumns) / kBlockColumns;
  const uint64_t order_bytes = blocks > 256 ? 2 * blocks : blocks;
  const uint64_t side = 2 * padded * (row_gain + bias) + 8 * blocks + order_bytes + (blocks + 1) / 2;
  const uint64_t start = offset + round_up(side, kUnit);
  if (offset < kUnit || start > size) return false;
  const uint8_t* cursor = data + offset;
  auto take = [&](uint64_t bytes) {
    const uint8_t* part = cursor;
    cursor += bytes;
    return part;
  };
  m->row_gain = row_gain ? take(2 * padded) : nullptr;
  m->bias = bias ? take(2 * padded) : nullptr;
  m->block_gain = take(8 * blocks);
  m->order = take(order_bytes);
  m->rates = take((blocks + 1) / 2);
  m->payload = data + start;
  m->padded_rows = static_cast<int64_t>(padded);
  m->blocks = static_cast<int64_t>(blocks);
  m->padded_columns = m->blocks * kBlockColumns;
  uint64_t words;
  if (!in_range(*m, &words)) return false;
  m->tile_bytes = static_cast<int64_t>(4 * words);
  if (start + padded / kRowTile * 4 * words > size) return false;
  return !whole || (all_finite(m->row_gain, padded) && all_finite(m->bias, padded) &&
                    all_finite(m->block_gain, 4 * blocks) && is_permutation(*m));
}

}  // namespace

bool parse_record(const uint8_t* data, uint64_t size, bool whole, RecordView* out) {
  if (size < kUnit || load_u32(data) != kMagic) return false;
  if (whole && hash_header(data) != load_u64(data + kHashedBytes)) return false;
  const int length = data[6];
  const uint64_t used = load_u32(data + 8);
  if (data[4] != 1 || data[5] != 1 || (length != 12 && length != 14 && length != 16)) return false;
  if (used < kUnit || used > size || used % kUnit) return false;
  const uint32_t flags = load_u32(data + 12);
  out->matrices = data[7];
  if (out->matrices < 1 || out->matrices > kMaxMatrices) return false;
  for (int i = 0; i < out->matrices; ++i) {
    MatrixView& m = out->matrix[i];
    const uint8_t* entry = data + 16 + 12 * i;
    m.length = length;
    m.rows = load_u32(entry);
    m.columns = load_u32(entry + 4);
    if (!parse_section(data, used, kUnit * load_u32(entry + 8), flags >> (8 + i) & 1, flags & 1, whole, &m))
      return false;
  }
  return true;
}

}  // namespace tqmoe
