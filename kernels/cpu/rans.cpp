// rANS of bytes, 32 interleaved lanes a tile (tiny_qmoe_mlx/codecs/rans.py is the specification).
#include <algorithm>
#include <atomic>
#include <vector>

#include "library.h"

namespace tqmoe {
namespace {

constexpr int kBits = 14, kLanes = 32;
constexpr uint32_t kTotal = 1u << kBits, kLow = 1u << 16;
constexpr int64_t kTile = 1 << 16;

uint32_t load32(const uint8_t* p) {
  uint32_t v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

uint32_t load16(const uint8_t* p) {
  uint16_t v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// Which symbol each of the 2^14 slots means; frequency and first slot of a symbol in one word.
struct Table {
  std::vector<uint8_t> symbol = std::vector<uint8_t>(kTotal);
  uint32_t place[256];

  bool fill(const uint32_t* frequencies) {
    uint32_t first = 0;
    for (int s = 0; s < 256; ++s) {
      const uint32_t f = frequencies[s];
      if (f > kTotal - first) return false;
      std::fill_n(symbol.begin() + first, f, static_cast<uint8_t>(s));
      place[s] = f << 16 | first;  // a frequency of 2^14 still fits, and `first` is below 2^16
      first += f;
    }
    return first == kTotal;
  }
};

// One symbol of a lane; the state is below kLow where the lane needs a word.
inline uint32_t advance(const Table& table, uint32_t x, uint8_t* out) {
  const uint32_t slot = x & (kTotal - 1);
  const uint8_t s = table.symbol[slot];
  const uint32_t place = table.place[s];
  *out = s;
  return (place >> 16) * (x >> kBits) + slot - (place & 0xFFFF);
}

bool decode_tile(const Table& table, const uint8_t* states, const uint8_t* word, const uint8_t* stop, uint8_t* out,
                 int64_t count) {
  uint32_t x[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    x[l] = load32(states + 4 * l);
    if (x[l] < kLow) return false;
  }
  int64_t i = 0;
  for (; i + kLanes <= count && stop - word >= 2 * kLanes; i += kLanes) {  // a step cannot read past the tile
    for (int l = 0; l < kLanes; ++l) {
      const uint32_t y = advance(table, x[l], out + i + l);
      const uint32_t needs = y < kLow;  // without a branch: which lanes need a word is noise
      x[l] = y << 16 * needs | (load16(word) & (0u - needs));
      word += 2 * needs;
    }
  }
  for (; i < count; ++i) {
    uint32_t& lane = x[i % kLanes];
    lane = advance(table, lane, out + i);
    if (lane >= kLow) continue;
    if (word == stop) return false;
    lane = lane << 16 | load16(word);
    word += 2;
  }
  return word == stop && std::all_of(x, x + kLanes, [](uint32_t lane) { return lane == kLow; });
}

bool ends_are_fine(const RansJob& job) {
  if (job.count < 1 || job.tiles != (job.count + kTile - 1) / kTile) return false;
  int64_t before = 0;
  for (int64_t t = 0; t < job.tiles; ++t) {
    const int64_t end = load32(job.ends + 4 * t);
    if (end < before) return false;
    before = end;
  }
  return before == job.word_count;
}

}  // namespace

int rans_decode(const RansJob& job) {
  Table table;
  if (!ends_are_fine(job) || !table.fill(job.frequencies)) return TQ_RECORD;
  std::atomic<bool> fine{true};
  Turn turn;
  turn.each(job.tiles, [&](int64_t tile, int) {
    const int64_t begin = tile ? load32(job.ends + 4 * (tile - 1)) : 0, end = load32(job.ends + 4 * tile);
    const int64_t first = tile * kTile, count = std::min(kTile, job.count - first);
    const uint8_t* states = job.states + 4 * kLanes * tile;
    if (!decode_tile(table, states, job.words + 2 * begin, job.words + 2 * end, job.out + first, count)) fine = false;
  });
  return fine ? TQ_OK : TQ_RECORD;
}

}  // namespace tqmoe
