// Decoding of superblocks, plain and fused with the multiplication. Included by each instruction-set file after kLanes.
// Lane = row: a vector holds the same window of kLanes consecutive rows. Written with the compiler's vector extension.

// Every window's code must land in one loop body: a call in between would spill all sums.
#define TQMOE_INLINE_LAMBDA __attribute__((always_inline))
#define TQMOE_INLINE inline __attribute__((always_inline))

namespace {

using namespace tqmoe;

typedef uint32_t U __attribute__((vector_size(4 * kLanes)));
typedef int32_t I __attribute__((vector_size(4 * kLanes)));
typedef float F __attribute__((vector_size(4 * kLanes)));

constexpr int kVectorsOfRows = kRowTile / kLanes;

// Lanes of a and b (which follow a's) by index.
template <int... Lane, class V>
TQMOE_INLINE V shuffle(V a, V b) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, Lane...);
#else
  typedef int32_t Indices __attribute__((vector_size(sizeof(V))));
  return __builtin_shuffle(a, b, Indices{Lane...});
#endif
}

// Lane i is lane i + Rows of the 2 * kLanes lanes `own`, `beyond`.
template <int Rows, int... Lane>
TQMOE_INLINE U shift_lanes(U own, U beyond, std::integer_sequence<int, Lane...>) {
  return shuffle<(Lane + Rows)...>(own, beyond);
}
template <int Rows>
inline U next_row(U own, U beyond) {
  return shift_lanes<Rows>(own, beyond, std::make_integer_sequence<int, kLanes>());
}

#ifndef TQMOE_AND_XOR
inline U and_xor(U a, uint32_t mask, uint32_t flip) { return (a & mask) ^ flip; }
#endif

inline U load_words(const uint8_t* p) {
  U v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline F load_floats(const float* p) {
  F v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store_floats(float* p, F v) { std::memcpy(p, &v, sizeof v); }

// Both halves of a code product become floats by a shift, a mask and an xor: their exponents lie in 12 to 15, so the
// bits that float32 has more of are constant. An arithmetic shift by 3 keeps the sign and moves exponent and mantissa
// in place.
constexpr uint32_t kFloatMask = 0x81FFE000u;
constexpr uint32_t kHighXor = ((kHalvesXor >> 16) << 13) + 0x38000000u;
constexpr uint32_t kLowXor = ((kHalvesXor & 0xFFFFu) << 13) + 0x38000000u;

inline F high_weight(U product) { return (F)and_xor((U)((I)product >> 3), kFloatMask, kHighXor); }
inline F low_weight(U product) { return (F)and_xor((U)((I)(product << 16) >> 3), kFloatMask, kLowXor); }

// The words of one row vector: its rows' planes, and those of the next row (and the one after it, which rate 1 looks
// into).
template <int Planes>
struct Words {
  U own[Planes], next[Planes], after[Planes];
};

template <int Rate>
TQMOE_INLINE Words<kPlanes[Rate]> load_planes(const uint8_t* block, int h) {
  constexpr int planes = kPlanes[Rate];
  Words<planes> w;
  const int neighbour = (h + 1) % kVectorsOfRows;
  for (int i = 0; i < planes; ++i) {
    w.own[i] = load_words(block + 128 * i + 4 * kLanes * h);
    U beyond = load_words(block + 128 * i + 4 * kLanes * neighbour);
    w.next[i] = next_row<1>(w.own[i], beyond);
    if (Rate == 1) w.after[i] = next_row<2>(w.own[i], beyond);
  }
  return w;
}

// 32 bits of a row's segment from bit At on; zeros follow its end.
template <int At, int Planes>
TQMOE_INLINE U segment_bits(const U* words) {
  constexpr int word = At / 32, shift = At % 32;
  if constexpr (shift == 0) {
    return words[word];
  } else if constexpr (word + 1 < Planes) {
    return words[word] >> shift | words[word + 1] << (32 - shift);
  } else {
    return words[word] >> shift;
  }
}

// 32 bits of the tile's bitstring from bit Offset of the row's part of tile Tile on.
template <int Rate, int Tile, int Offset>
TQMOE_INLINE U tile_bits(const Words<kPlanes[Rate]>& w) {
  constexpr int planes = kPlanes[Rate], part = 8 * planes, left = part - Offset;
  U own = segment_bits<part * Tile + Offset, planes>(w.own);
  if constexpr (left >= 32) {
    return own;
  } else {
    U next = segment_bits<part * Tile, planes>(w.next);
    if constexpr (left + part < 32) {  // rate 1: three rows
      U after = segment_bits<part * Tile, planes>(w.after);
      return (own & ((1u << left) - 1)) | (next & ((1u << part) - 1)) << left | after << (left + part);
    }
    return (own & ((1u << left) - 1)) | next << left;
  }
}

// The product of the code for the window that starts at bit `shift`.
template <int Rate>
TQMOE_INLINE U code_product(U bits, int shift, U mask) {
  U state = (bits >> shift) & mask;
  if constexpr (is_inst3(Rate)) return state * kInst3Multiplier + kInst3Addend;
  return state * kT2Multiplier;
}

// How many windows lie whole in 32 bits, the first at bit 0, for every L.
constexpr int windows_in_word(int rate) { return (32 - 16) / step_bits(rate) + 1; }

template <int Column>
using At = std::integral_constant<int, Column>;

template <int Rate, int Column, class Visit>
TQMOE_INLINE void visit_window(U product, Visit& visit) {
  if constexpr (is_inst3(Rate)) {
    visit(At<Column>(), low_weight(product) + high_weight(product));
  } else {
    visit(At<Column>(), low_weight(product));
    visit(At<Column + 1>(), high_weight(product));
  }
}

template <int Rate, int Column, class Visit, int... Index>
TQMOE_INLINE void visit_word(U bits, U mask, Visit& visit, std::integer_sequence<int, Index...>) {
  (visit_window<Rate, Column + Index * step_weights(Rate)>(code_product<Rate>(bits, Index * step_bits(Rate), mask),
                                                           visit),
   ...);
}

// Window First to the last of a tile.
template <int Rate, int Tile, int First, class Visit>
TQMOE_INLINE void visit_tile(const Words<kPlanes[Rate]>& w, U mask, Visit& visit) {
  constexpr int windows = kTileColumns / step_weights(Rate);
  if constexpr (First < windows) {
    constexpr int count = windows - First < windows_in_word(Rate) ? windows - First : windows_in_word(Rate);
    constexpr int column = kTileColumns * Tile + First * step_weights(Rate);
    U bits = tile_bits<Rate, Tile, First * step_bits(Rate)>(w);
    visit_word<Rate, column>(bits, mask, visit, std::make_integer_sequence<int, count>());
    visit_tile<Rate, Tile, First + count>(w, mask, visit);
  }
}

// Calls visit(At<column>, weights) for the 64 columns of one row vector, in order.
template <int Rate, class Visit>
TQMOE_INLINE void visit_rows(const uint8_t* block, int h, U mask, Visit&& visit) {
  Words<kPlanes[Rate]> w = load_planes<Rate>(block, h);
  visit_tile<Rate, 0, 0>(w, mask, visit);
  visit_tile<Rate, 1, 0>(w, mask, visit);
  visit_tile<Rate, 2, 0>(w, mask, visit);
  visit_tile<Rate, 3, 0>(w, mask, visit);
}

// sums [Width][32] += superblock * x [64][Width].
template <int Rate, int Width>
void multiply_block(const uint8_t* block, uint32_t mask_bits, const float* x, float* sums) {
  const U mask = U{} + mask_bits;
  constexpr int chains = Width < 4 ? 2 : 1;  // few tokens alone would wait for each multiply-add
  for (int h = 0; h < kVectorsOfRows; ++h) {
    F sum[chains][Width];
    for (int t = 0; t < Width; ++t) {
      sum[chains - 1][t] = F{};
      sum[0][t] = load_floats(sums + 32 * t + kLanes * h);
    }
    visit_rows<Rate>(block, h, mask, [&](auto column, F weight) TQMOE_INLINE_LAMBDA {
      for (int t = 0; t < Width; ++t) sum[column % chains][t] += weight * x[column * Width + t];
    });
    for (int t = 0; t < Width; ++t) {
      store_floats(sums + 32 * t + kLanes * h, chains == 2 ? sum[0][t] + sum[1][t] : sum[0][t]);
    }
  }
}

template <int Width>
void multiply_tile(const MatrixView& m, const uint8_t* block, const float* x, float* sums) {
  const uint32_t mask = (1u << m.length) - 1;
  for (int64_t b = 0; b < m.blocks; ++b, x += kBlockColumns * Width) {
    int rate = block_rate(m, b);
    switch (rate) {
      case 1: multiply_block<1, Width>(block, mask, x, sums); break;
      case 2: multiply_block<2, Width>(block, mask, x, sums); break;
      case 3: multiply_block<3, Width>(block, mask, x, sums); break;
      case 4: multiply_block<4, Width>(block, mask, x, sums); break;
      case 5: multiply_block<5, Width>(block, mask, x, sums); break;
      case 6: multiply_block<6, Width>(block, mask, x, sums); break;
      case 7: multiply_block<7, Width>(block, mask, x, sums); break;
      default: break;
    }
    block += 128 * kPlanes[rate];
  }
}

void multiply_tile_any(const MatrixView& m, int64_t tile, int tokens, const float* x, float* sums) {
  const uint8_t* block = m.payload + tile * m.tile_bytes;
  const int width = token_width(tokens);
  alignas(64) float all[kMaxTokens * kRowTile];
  std::memset(all, 0, sizeof all);
  switch (width) {
    case 1: multiply_tile<1>(m, block, x, all); break;
    case 2: multiply_tile<2>(m, block, x, all); break;
    case 4: multiply_tile<4>(m, block, x, all); break;
    default: multiply_tile<8>(m, block, x, all); break;
  }
  std::memcpy(sums, all, sizeof(float) * kRowTile * tokens);
}

// values [64][32] of a superblock, without gains.
template <int Rate>
void decode_block(const uint8_t* block, uint32_t mask_bits, float* values) {
  const U mask = U{} + mask_bits;
  for (int h = 0; h < kVectorsOfRows; ++h) {
    visit_rows<Rate>(block, h, mask, [&](auto column, F weight) TQMOE_INLINE_LAMBDA {
      store_floats(values + kRowTile * column + kLanes * h, weight);
    });
  }
}

void decode_block_at(int rate, const uint8_t* block, uint32_t mask, float* values) {
  switch (rate) {
    case 1: return decode_block<1>(block, mask, values);
    case 2: return decode_block<2>(block, mask, values);
    case 3: return decode_block<3>(block, mask, values);
    case 4: return decode_block<4>(block, mask, values);
    case 5: return decode_block<5>(block, mask, values);
    case 6: return decode_block<6>(block, mask, values);
    case 7: return decode_block<7>(block, mask, values);
    default: std::memset(values, 0, sizeof(float) * kRowTile * kBlockColumns);
  }
}

typedef float F4 __attribute__((vector_size(16)));

// 4 rows from 4 columns of a decoded superblock, gains applied. The order of the two products is the specification's,
// so results are equal to the bit: (value * block gain) * row gain.
TQMOE_INLINE void transpose(const float* values, float block_gain, const float* row_gain, F4* rows) {
  F4 c[4];
  for (int i = 0; i < 4; ++i) std::memcpy(&c[i], values + kRowTile * i, sizeof c[i]);
  F4 low01 = shuffle<0, 4, 1, 5>(c[0], c[1]), low23 = shuffle<0, 4, 1, 5>(c[2], c[3]);
  F4 high01 = shuffle<2, 6, 3, 7>(c[0], c[1]), high23 = shuffle<2, 6, 3, 7>(c[2], c[3]);
  rows[0] = shuffle<0, 1, 4, 5>(low01, low23) * block_gain * row_gain[0];
  rows[1] = shuffle<2, 3, 6, 7>(low01, low23) * block_gain * row_gain[1];
  rows[2] = shuffle<0, 1, 4, 5>(high01, high23) * block_gain * row_gain[2];
  rows[3] = shuffle<2, 3, 6, 7>(high01, high23) * block_gain * row_gain[3];
}

// Rows first to last - 1 of one superblock.
void write_block(const float* values, const uint8_t* block_gain, const float* row_gain, int first, int last,
                 int64_t stride, float* out) {
  for (int l = first & ~3; l < last; l += 4) {
    for (int c = 0; c < kBlockColumns; c += 4) {
      F4 rows[4];
      transpose(values + kRowTile * c + l, load_half(block_gain + 2 * (c / kTileColumns)), row_gain + l, rows);
      for (int i = 0; i < 4; ++i) {
        if (l + i >= first && l + i < last) std::memcpy(out + (l + i - first) * stride + c, &rows[i], sizeof rows[i]);
      }
    }
  }
}

void decode_tile(const MatrixView& m, int64_t tile, int first, int last, float* out) {
  const uint8_t* block = m.payload + tile * m.tile_bytes;
  const uint32_t mask = (1u << m.length) - 1;
  alignas(64) float values[kBlockColumns * kRowTile];
  float row_gain[kRowTile];
  for (int l = 0; l < kRowTile; ++l)
    row_gain[l] = m.row_gain ? load_half(m.row_gain + 2 * (tile * kRowTile + l)) : 1.0f;
  for (int64_t b = 0; b < m.blocks; ++b) {
    int rate = block_rate(m, b);
    decode_block_at(rate, block, mask, values);
    block += 128 * kPlanes[rate];
    write_block(values, m.block_gain + 8 * b, row_gain, first, last, m.padded_columns,
                out + kBlockColumns * block_place(m, b));
  }
}

void rotate(float* x, const float* sign, int64_t columns, int64_t size) {
  for (int64_t i = 0; i < columns; ++i) x[i] *= sign[i];
  for (int64_t start = 0; start < columns; start += size) {
    float* group = x + start;
    for (int64_t half = 1; half < size; half *= 2) {
      for (int64_t i = 0; i < size; i += 2 * half) {
        float *a = group + i, *b = a + half;
        for (int64_t j = 0; j < half; ++j) {
          float sum = a[j] + b[j];
          b[j] = a[j] - b[j];
          a[j] = sum;
        }
      }
    }
  }
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(size));
  for (int64_t i = 0; i < columns; ++i) x[i] *= scale;
}

}  // namespace
