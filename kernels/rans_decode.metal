// Bytes from the tiles of a rANS payload (docs/FORMAT.md, section 8; tiny_qmoe_mlx/codecs/rans.py is the specification).
//
//   pool    u8; the ends, states and words of the payload begin at TQ_BASE + 16 * TQ_AT + TQ_SKIP of it, a multiple of 4
//   table   u32 [256]: frequency and first slot of a symbol, frequency << 16 | first; frequencies sum to 2^14
//   params  u32 [6]: TQ_BASE, TQ_AT, TQ_SKIP, tiles, bytes to decode, words
//   out     u8 [bytes];  faults  u8 [tiles], 0 where a tile was sound
//
// Grid: x = tiles x 32, rounded up to whole threadgroups of SG simdgroups. One simdgroup decodes one tile, a lane for
// each of its 32 streams. All streams take their words from the tile's one sequence, those of a step in the order of the
// lanes: a ballot of who needs one says where each finds it. The table of 2^14 slots lies in threadgroup memory. Words
// outside of a tile are never read, and nothing is written but the tile's own bytes, whatever the payload holds: a state
// out of range, words that end early or late, lanes that do not end where coding began are faults.

#define TQ_BASE params[0]
#define TQ_AT params[1]
#define TQ_SKIP params[2]
#define TQ_TILES params[3]
#define TQ_BYTES params[4]
#define TQ_WORDS params[5]

enum : uint { TQ_RANS_BITS = 14, TQ_RANS_SLOTS = 1u << 14, TQ_RANS_LOW = 1u << 16, TQ_RANS_TILE = 1u << 16 };

// Which symbol each slot means, by all simdgroups of the threadgroup; slots that no symbol has keep whatever is there, so
// frequencies have to sum to 2^14. Ranges are cut to the table.
template <int SG, typename Table>
METAL_FUNC void rans_symbols(Table table, threadgroup uchar* symbol, uint sg, uint lane) {
  for (uint s = sg; s < 256; s += SG) {
    const uint first = min(table[s] & 0xFFFF, uint(TQ_RANS_SLOTS));
    const uint end = min(first + (table[s] >> 16), uint(TQ_RANS_SLOTS));
    for (uint slot = first + lane; slot < end; slot += 32) symbol[slot] = uchar(s);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

template <int SG, typename Table, typename Params>
METAL_FUNC void rans_decode(const device uchar* pool, Table table, Params params, device uchar* out,
                            device uchar* faults, threadgroup uchar* symbol, uint3 group, uint sg, uint lane) {
  rans_symbols<SG>(table, symbol, sg, lane);
  const uint tile = group.x * SG + sg;
  if (tile >= TQ_TILES) return;
  const device uint* ends = (const device uint*)(pool + ulong(TQ_BASE) + 16 * ulong(TQ_AT) + TQ_SKIP);
  const device uint* states = ends + TQ_TILES;
  const device ushort* words = (const device ushort*)(states + 32 * TQ_TILES);
  const uint end = min(ends[tile], TQ_WORDS);
  uint at = tile == 0 ? 0 : ends[tile - 1];
  uint x = states[32 * tile + lane];
  bool fault = x < TQ_RANS_LOW || at > end;
  const uint begin = TQ_RANS_TILE * tile, count = min(uint(TQ_RANS_TILE), TQ_BYTES - begin);

  for (uint first = 0; first < count; first += 32) {
    const bool mine = lane < count - first;
    uint y = x;
    if (mine) {
      const uint slot = x & (TQ_RANS_SLOTS - 1), s = symbol[slot], place = table[s];
      out[begin + first + lane] = uchar(s);
      y = (place >> 16) * (x >> TQ_RANS_BITS) + slot - (place & 0xFFFF);
    }
    const uint needs = uint(ulong(simd_ballot(mine && y < TQ_RANS_LOW)));
    if (needs >> lane & 1) {
      const uint word = at + popcount(needs & ((1u << lane) - 1));
      y = y << 16 | (word < end ? uint(words[word]) : 0);  // past the end: then `at` does not stop there either
    }
    x = y;
    at += popcount(needs);
  }
  fault = fault || at != end || x != TQ_RANS_LOW;
  const uint wrong = uint(ulong(simd_ballot(fault)));
  if (lane == 0) faults[tile] = wrong != 0;
}
