// Matrices of the qmoe codec, dense, for a list of experts: what many tokens are multiplied with by MLX's own gather_mm.
// After trellis_decode.metal, trellis_gather_qmv.metal and qmoe_gather_qmv.metal; pool, table, tables and params as there
// (rows of x and picks that share one are not looked at).
//
//   ids   u32 or i32 [experts to decode]
//   w     T [ids, rows, columns];  bias  f32 [ids, rows], zeros where the records have none
//
// Grid: x = rows x 32, y = ids. One simdgroup writes one row: each lane the symbols of its codeword, zeros included, and
// all of them zeros where the row's codewords end too early. No lane writes what another does.

template <int LEVELS, int BITS, int BIAS, typename T, typename Ids, typename Table, typename Tables, typename Params>
METAL_FUNC void qmoe_dequantize(const device uchar* pool, Ids ids, Table table, Tables tables, Params params,
                                device T* w, device float* bias, uint3 group, uint sg, uint sgs, uint lane) {
  const uint row = group.x * sgs + sg, index = group.y, columns = TQ_COLUMNS;
  if (row >= TQ_ROWS) return;
  const QmoeView m = qmoe_view<LEVELS, BITS, BIAS>(
      record_at(pool, table, uint(ids[index]), TQ_EXPERTS, TQ_BASE), TQ_MATRIX);
  const QmoeRow<LEVELS> r = qmoe_row<LEVELS>(m, tables, params, row);
  device T* out = w + (ulong(index) * TQ_ROWS + row) * columns;
  uint at = 0;  // the same in every lane, as is `first`
  for (uint first = m.offsets[row]; first < r.end && at < columns; first += 32) {
    const QmoeRun own = qmoe_run<BITS, LEVELS>(m, r, tables, first, columns, at, lane);
    device T* to = out + own.column;
    for (uint i = 0; i < own.inside; i += 16) {
      uint run = qmoe_symbols(tables, r.symbols, own.start + i, own.inside - i);
      for (uint s = 0; s < min(16u, own.inside - i); ++s, run >>= 2) {
        const uint symbol = run & 3;
        to[i + s] = T(symbol == 0 ? 0.0f : qmoe_weight<LEVELS>(r, symbol));
      }
    }
  }
  for (uint c = at + lane; c < columns; c += 32) out[c] = T(0.0f);
  if (lane == 0) bias[index * TQ_ROWS + row] = BIAS ? m.bias[row] : 0.0f;
}
