// Records of the trellis codec (docs/FORMAT.md, section 4): finding a matrix's parts, and decoding its superblocks.
// Part of every trellis kernel; nothing here is launched.
//
// One simdgroup decodes a superblock of 32 rows x 64 columns at one rate, lane = row: a plane is one 128-byte load, and
// a lane looks ahead into the next row by shuffle. Records were checked on the host: a header is trusted here, and
// every payload bit pattern decodes to finite weights.

// Where the parts of one matrix of a record lie, and its sizes in whole tiles.
struct MatrixView {
  const device half* row_gain;    // one a padded row, where has_row_gain
  const device half* bias;        // one a padded row, where has_bias
  const device half4* block_gain; // a half per 16 stored columns
  const device uchar* order;      // stored block -> block of the matrix; two bytes each above 256 blocks
  const device uchar* rates;      // a nibble a block
  const device uint* payload;
  uint blocks;
  bool has_row_gain, has_bias;
};

// The record of an expert: `table` holds its place in units of 128 bytes. Pools may exceed 4 GiB, so the address is
// 64-bit.
template <typename Table>
METAL_FUNC const device uchar* record_at(const device uchar* pool, Table table, uint expert, uint experts, uint base) {
  return pool + ulong(base) + 128 * ulong(table[min(expert, experts - 1)]);
}

METAL_FUNC MatrixView matrix_view(const device uchar* record, uint matrix) {
  const device uint* header = (const device uint*)record;
  const uint flags = header[3], rows = header[4 + 3 * matrix], columns = header[5 + 3 * matrix];
  const uint padded_rows = (rows + 31) & ~31u;
  MatrixView m;
  m.blocks = (columns + 63) / 64;
  m.has_bias = (flags & 1) != 0;
  m.has_row_gain = (flags & (matrix == 0 ? 256 : matrix == 1 ? 512 : 1024)) != 0;
  const device uchar* section = record + 128 * header[6 + 3 * matrix];
  const device uchar* at = section;
  m.row_gain = (const device half*)at;
  at += m.has_row_gain ? 2 * padded_rows : 0;
  m.bias = (const device half*)at;
  at += m.has_bias ? 2 * padded_rows : 0;
  m.block_gain = (const device half4*)at;
  m.order = at + 8 * m.blocks;
  m.rates = m.order + (m.blocks > 256 ? 2 * m.blocks : m.blocks);
  const uint side = uint(m.rates - section) + (m.blocks + 1) / 2;
  m.payload = (const device uint*)(section + (side + 127) / 128 * 128);
  return m;
}

// Shifts by a variable amount cost eight additions here, hence the selections.
METAL_FUNC uint block_rate(MatrixView m, uint block) {
  const uint pair = m.rates[block / 2];
  return block & 1 ? pair >> 4 : pair & 15;
}
METAL_FUNC uint block_place(MatrixView m, uint block) {
  return m.blocks > 256 ? uint(((const device ushort*)m.order)[block]) : uint(m.order[block]);
}
METAL_FUNC uint planes_of(uint rate) { return rate == 7 ? 8 : rate; }

// What each lane knows of one of up to 32 consecutive blocks. The planes before a block are a prefix sum over lanes, so
// a simdgroup may take any subset of blocks without walking the others.
struct BlockGroup {
  uint rate;    // 0 beyond the last block
  uint column;  // first column of the block in the matrix
  uint word;    // of the row tile, where the block begins
  uint end;     // of the row tile, where the group ends; the same in every lane
};

// `start`: words of the row tile before block `first`.
METAL_FUNC BlockGroup block_group(MatrixView m, uint first, uint start, uint lane) {
  BlockGroup g;
  const uint block = min(first + lane, m.blocks - 1);
  g.rate = first + lane < m.blocks ? block_rate(m, block) : 0;
  g.column = 64 * block_place(m, block);
  const uint own = planes_of(g.rate), before = simd_prefix_exclusive_sum(own);
  g.word = start + 32 * before;
  g.end = start + 32 * simd_broadcast(before + own, 31);
  return g;
}

// Words from one row tile to the next; `g` is the group of the first blocks.
METAL_FUNC uint tile_words(MatrixView m, BlockGroup g, uint lane) {
  if (m.blocks <= 32) return g.end;
  uint planes = 0;
  for (uint block = 32 + lane; block < m.blocks; block += 32) planes += planes_of(block_rate(m, block));
  return g.end + 32 * simd_sum(planes);
}

METAL_FUNC ushort low16(uint v) { return as_type<ushort2>(v).x; }
METAL_FUNC ushort high16(uint v) { return as_type<ushort2>(v).y; }
METAL_FUNC uint join16(ushort low, ushort high) { return as_type<uint>(ushort2(low, high)); }
METAL_FUNC ushort half_word(const thread uint* words, int i) {
  return i % 2 ? high16(words[i / 2]) : low16(words[i / 2]);
}

// 32 bits of a lane's segment of P words from bit `at` on (a constant once inlined); zeros follow its end.
template <int P>
METAL_FUNC uint segment_bits(const thread uint* words, int at) {
  const int word = at / 32, shift = at % 32;
  if (shift == 0) return words[word];
  const uint above = word + 1 < P ? words[word + 1] : 0;
  if (shift == 16) return join16(high16(words[word]), low16(above));
  return words[word] >> shift | above << (32 - shift);
}

// The lane's words of a superblock. For one plane a tile's part is a byte, and windows reach into two more rows: bytes
// of this row and the next are put side by side, tiles 0 and 2 in word 0, tiles 1 and 3 in word 1.
template <int P>
METAL_FUNC void load_planes(const device uint* block, ushort lane, thread uint* words) {
  const device uint* mine = block + lane;
#pragma clang loop unroll(full)
  for (int i = 0; i < P; ++i) words[i] = mine[32 * i];
  if (P == 1) {
    const uint own = words[0], next = simd_shuffle(own, ushort((lane + 1) & 31));
    words[0] = (own & 0x00FF00FFu) | (next & 0x00FF00FFu) << 8;
    words[1] = (own >> 8 & 0x00FF00FFu) | (next & 0xFF00FF00u);
  }
}

// bits[j] = 32 bits of the tile's bitstring from bit 16 j of the lane's part on, for all j that windows begin in.
// Halves of registers are free on this hardware and shifts are not, hence steps of 16.
template <int P>
METAL_FUNC void tile_bits(const thread uint* words, int tile, ushort lane, thread uint* bits) {
  const ushort next = (lane + 1) & 31;
  if (P == 1) {
    const uint pair = words[tile % 2], beyond = simd_shuffle(pair, ushort((lane + 2) & 31));
    bits[0] = tile < 2 ? join16(low16(pair), low16(beyond)) : join16(high16(pair), high16(beyond));
  } else if (P == 3) {
    const uint part = segment_bits<P>(words, 24 * tile) & 0xFFFFFFu, beyond = simd_shuffle(part, next);
    bits[0] = part | beyond << 24;
    bits[1] = join16(high16(bits[0]), ushort(beyond >> 8));
  } else if (P == 5) {
    const uint part = segment_bits<P>(words, 40 * tile), beyond = simd_shuffle(part, next);
    bits[0] = part;
    bits[2] = (segment_bits<P>(words, 40 * tile + 32) & 0xFFu) | beyond << 8;
    bits[1] = join16(high16(part), low16(bits[2]));
  } else {
    const int halves = P / 2, first = halves * tile;
    const uint beyond = simd_shuffle(words[first / 2], next);
#pragma clang loop unroll(full)
    for (int j = 0; j < halves; ++j) {
      const ushort above =
          j + 1 < halves ? half_word(words, first + j + 1) : first % 2 ? high16(beyond) : low16(beyond);
      bits[j] = join16(half_word(words, first + j), above);
    }
  }
}

template <int L>
METAL_FUNC uint window(const thread uint* bits, int at) { return extract_bits(bits[at / 16], at % 16, L); }

METAL_FUNC half2 code_halves(uint product) { return as_type<half2>((product & 0x8FFF8FFFu) ^ 0x3B603B60u); }

// The lane's 16 weights of a tile, without gains.
template <int RATE, int L>
METAL_FUNC void tile_weights(const thread uint* bits, thread float* weights) {
  if (RATE < 6) {
#pragma clang loop unroll(full)
    for (int p = 0; p < 8; ++p) {
      const half2 v = code_halves(window<L>(bits, RATE * p) * 0xCBAC1FEDu);
      weights[2 * p] = float(v.x);
      weights[2 * p + 1] = float(v.y);
    }
  } else {
#pragma clang loop unroll(full)
    for (int p = 0; p < 16; ++p) {
      const half2 v = code_halves(window<L>(bits, (RATE - 3) * p) * 89226354u + 64248484u);
      weights[p] = float(v.x) + float(v.y);
    }
  }
}
