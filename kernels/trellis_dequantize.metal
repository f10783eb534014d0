// Records to dense matrices in the rotated space, for a list of experts: what many tokens are multiplied with by MLX's
// own gather_mm. After trellis_decode.metal; pool, table and base as in trellis_gather_qmv.metal.
//
//   ids     u32 or i32 [experts to decode]
//   params  u32 [5]: base, experts in the table, rows, C, matrix
//   w       T [ids, rows, C], columns in the model's order, gains applied in float32
//   bias    f32 [ids, rows], zeros where the record has none
//
// Grid: x = row tiles x SG x 32, y = ids. One threadgroup decodes 32 rows, its SG simdgroups take blocks of 64 columns
// in turn. A lane decodes one row; 32 columns at a time pass through `staged` (SG x 32 x 17 pairs of T), so that a
// simdgroup writes 32 columns of two rows at once, 16 rows apart. With 17 pairs a row all lanes are on different banks
// both times.

template <int RATE, int L, typename T>
METAL_FUNC void store_block(const device uint* block, half4 gains, float row_gain, threadgroup vec<T, 2>* staged,
                            device T* w, uint columns, uint rows, ushort lane) {
  typedef vec<T, 2> Pair;
  threadgroup Pair* mine = staged + 17 * lane;
  const uint part = lane / 16 * 16, pair = lane % 16;  // rows and columns that this lane writes
  uint words[8];
  load_planes<(RATE == 7 ? 8 : RATE)>(block, lane, words);
#pragma clang loop unroll(full)
  for (int tile = 0; tile < 4; ++tile) {
    uint bits[4];
    float weights[16];
    if (RATE > 0) {
      tile_bits<(RATE == 7 ? 8 : RATE)>(words, tile, lane, bits);
      tile_weights<RATE, L>(bits, weights);
    }
    const float gain = RATE > 0 ? float(gains[tile]) * row_gain : 0.0f;
#pragma clang loop unroll(full)
    for (int i = 0; i < 8; ++i) {
      Pair pair_of_weights;
      pair_of_weights.x = RATE > 0 ? T(weights[2 * i] * gain) : T(0.0f);
      pair_of_weights.y = RATE > 0 ? T(weights[2 * i + 1] * gain) : T(0.0f);
      mine[8 * (tile % 2) + i] = pair_of_weights;
    }
    if (tile % 2 == 0) continue;
    simdgroup_barrier(mem_flags::mem_threadgroup);
    device Pair* to = (device Pair*)(w + part * columns + 16 * (tile - 1)) + pair;
    const threadgroup Pair* from = staged + 17 * part + pair;
    for (uint r = part; r < min(rows, part + 16); ++r) {
      *to = *from;
      to += columns / 2;
      from += 17;
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }
}

template <int L, int SG, typename T, typename Ids, typename Table, typename Params>
METAL_FUNC void trellis_dequantize(const device uchar* pool, Ids ids, Table table, Params params, device T* w,
                                   device float* bias, threadgroup vec<T, 2>* staged, uint3 group, uint sg, uint lane) {
  const uint tile = group.x, index = group.y;
  const device uchar* record = record_at(pool, table, uint(ids[index]), params[1], params[0]);
  const MatrixView m = matrix_view(record, params[4]);
  const uint rows = params[2], columns = params[3], row = 32 * tile + lane, inside = min(32u, rows - 32 * tile);
  if (sg == 0 && row < rows) bias[index * rows + row] = m.has_bias ? float(m.bias[row]) : 0.0f;
  const float row_gain = m.has_row_gain ? float(m.row_gain[row]) : 1.0f;
  device T* out = w + (ulong(index) * rows + 32 * tile) * columns;
  typedef vec<T, 2> Pair;
  threadgroup Pair* mine = staged + 32 * 17 * sg;
  BlockGroup g = block_group(m, 0, 0, lane);
  const device uint* payload = m.payload + tile * tile_words(m, g, lane);
  for (uint first = 0; first < m.blocks; first += 32) {
    if (first > 0) g = block_group(m, first, g.end, lane);
    const uint last = min(32u, m.blocks - first);
    for (uint i = sg; i < last; i += SG) {
      const uint rate = simd_broadcast(g.rate, ushort(i));
      const device uint* block = payload + simd_broadcast(g.word, ushort(i));
      device T* to = out + simd_broadcast(g.column, ushort(i));
      const half4 gains = m.block_gain[first + i];
      switch (rate) {
        case 1: store_block<1, L>(block, gains, row_gain, mine, to, columns, inside, lane); break;
        case 2: store_block<2, L>(block, gains, row_gain, mine, to, columns, inside, lane); break;
        case 3: store_block<3, L>(block, gains, row_gain, mine, to, columns, inside, lane); break;
        case 4: store_block<4, L>(block, gains, row_gain, mine, to, columns, inside, lane); break;
        case 5: store_block<5, L>(block, gains, row_gain, mine, to, columns, inside, lane); break;
        case 6: store_block<6, L>(block, gains, row_gain, mine, to, columns, inside, lane); break;
        case 7: store_block<7, L>(block, gains, row_gain, mine, to, columns, inside, lane); break;
        default: store_block<0, L>(block, gains, row_gain, mine, to, columns, inside, lane); break;
      }
    }
  }
}
