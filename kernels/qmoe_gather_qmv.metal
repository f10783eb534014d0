// Products of a few tokens with gathered experts of the qmoe codec (docs/FORMAT.md, section 7), straight from their
// codewords. After trellis_decode.metal and trellis_gather_qmv.metal, whose record_at, Members and TQ_ parameters it
// uses.
//
//   pool    u8, records at base + 128 * table[expert];  ids  u32 or i32 [picks];  table  u32 [experts]
//   x       T [tokens or picks, columns]
//   tables  u32: for each table the places of its starts and symbols and the number of codewords; then all of these
//   params  u32 [8]: base, experts, rows of x, picks that share a row of x, columns, rows of the output, matrix, tables
//
// Grid: x = rows x 32, y = picks of a row of x, z = rows of x. One simdgroup computes one row for up to W picks of one
// expert. Its lanes take 32 codewords at once, know by a prefix sum of their lengths where in the row they begin, and
// visit the weights that are not zero. QMoE's kernel walks the codewords one by one, a lane a weight, zeros included.
// No memory is shared between lanes, so nothing has to be synchronised. Whatever codewords and places of rows are,
// nothing outside of the section, the tables and x is read.

#define TQ_TABLES params[7]

// Where the parts of one matrix of a record lie.
struct QmoeView {
  const device uint* offsets;    // codewords before each row
  const device float* bias;      // one a row, where there are biases
  const device ushort* values;   // bfloat16, LEVELS - 1 a row
  const device uchar* codes;
  uint codewords, table;
};

template <int LEVELS, int BITS, int BIAS>
METAL_FUNC QmoeView qmoe_view(const device uchar* record, uint matrix) {
  const device uint* header = (const device uint*)record;
  const uint rows = header[4 + 3 * matrix];
  const device uchar* section = record + 128 * ulong(header[6 + 3 * matrix]);
  const device uint* head = (const device uint*)section;
  QmoeView m;
  m.table = head[1];
  m.offsets = head + 4;
  m.bias = (const device float*)(m.offsets + rows + 1);
  m.values = (const device ushort*)(m.bias + (BIAS ? rows : 0));
  const ulong side = 16 + 4 * ulong(rows + 1) + (BIAS ? 4 * ulong(rows) : 0) + 2 * (LEVELS - 1) * ulong(rows);
  m.codes = section + (side + 127) / 128 * 128;
  const ulong begin = ulong(m.codes - record), bytes = header[2] > begin ? header[2] - begin : 0;
  m.codewords = uint(min(ulong(head[0]), bytes * 8 / BITS));
  return m;
}

template <int BITS>
METAL_FUNC uint qmoe_codeword(const device uchar* codes, uint c) {
  if (BITS == 8) return codes[c];
  if (BITS == 16) return ((const device ushort*)codes)[c];
  const device uchar* at = codes + c + c / 2;
  const uint both = uint(at[0]) | uint(at[1]) << 8;
  return c & 1 ? both >> 4 : both & 4095;
}

// 16 symbols from symbol `at` on, the first in the lowest bits, zeros from `count` on. Two words follow the last
// symbol.
template <typename Tables>
METAL_FUNC uint qmoe_symbols(Tables tables, uint symbols, uint at, uint count) {
  const uint word = symbols + at / 16, shift = at % 16 * 2;
  const uint low = tables[word] >> shift;
  const uint both = shift == 0 ? low : low | tables[word + 1] << (32 - shift);
  return count < 16 ? both & ((1u << (2 * count)) - 1) : both;
}

METAL_FUNC float qmoe_value(const device ushort* values, uint i) { return as_type<float>(uint(values[i]) << 16); }

// What the walk through a row's codewords needs: its table's places, where its codewords end, and its values.
template <int LEVELS>
struct QmoeRow {
  uint starts, symbols, entries, end;
  float value[LEVELS - 1];
};

template <int LEVELS, typename Tables, typename Params>
METAL_FUNC QmoeRow<LEVELS> qmoe_row(QmoeView m, Tables tables, Params params, uint row) {
  QmoeRow<LEVELS> r;
  const uint entry = 3 * min(m.table, TQ_TABLES - 1);
  r.starts = tables[entry];
  r.symbols = tables[entry + 1];
  r.entries = tables[entry + 2];
  r.end = min(m.offsets[row + 1], m.codewords);
#pragma clang loop unroll(full)
  for (int s = 0; s < LEVELS - 1; ++s) r.value[s] = qmoe_value(m.values, row * (LEVELS - 1) + s);
  return r;
}

// One lane's codeword of the 32 from `first` on: where its symbols begin, at which column of the row they lie, and how
// many lie inside of it. `at` is the column where the 32 begin, and then where the next do.
struct QmoeRun {
  uint start, column, inside;
};

template <int BITS, int LEVELS, typename Tables>
METAL_FUNC QmoeRun qmoe_run(QmoeView m, QmoeRow<LEVELS> r, Tables tables, uint first, uint columns, thread uint& at,
                            uint lane) {
  const uint entries = r.entries;
  uint start = 0, length = 0;
  if (lane < r.end - first) {
    const uint codeword = r.starts + min(qmoe_codeword<BITS>(m.codes, first + lane), entries - 1);
    start = tables[codeword];
    length = tables[codeword + 1] - start;
  }
  const uint before = simd_prefix_exclusive_sum(length), column = at + before;
  at += simd_broadcast(before + length, 31);
  QmoeRun run;
  run.start = start;
  run.column = column;
  run.inside = column < columns ? min(length, columns - column) : 0;
  return run;
}

template <int LEVELS>
METAL_FUNC float qmoe_weight(QmoeRow<LEVELS> r, uint symbol) {  // of a symbol that is not zero
  return symbol == 1 ? r.value[0] : symbol == 2 || LEVELS == 3 ? r.value[1] : r.value[LEVELS - 2];
}

// y T [picks, rows] = matrix TQ_MATRIX of each pick's expert times its row of x.
template <int LEVELS, int BITS, int BIAS, int W, typename T, typename Ids, typename Table, typename X, typename Tables,
          typename Params>
METAL_FUNC void qmoe_gather_qmv(const device uchar* pool, Ids ids, Table table, X x, Tables tables, Params params,
                                device T* y, uint3 group, uint sg, uint sgs, uint lane) {
  const uint row = group.x * sgs + sg, pick = group.z * TQ_SHARED + group.y;
  const Members members = members_of<W>(ids, pick, TQ_PICKS, lane);
  if (members.count == 0 || row >= TQ_ROWS) return;
  const QmoeView m = qmoe_view<LEVELS, BITS, BIAS>(
      record_at(pool, table, uint(ids[pick]), TQ_EXPERTS, TQ_BASE), TQ_MATRIX);
  const QmoeRow<LEVELS> r = qmoe_row<LEVELS>(m, tables, params, row);
  const uint columns = TQ_COLUMNS;
  uint from[W];
  float acc[W];
  rows_of_z<W>(members, params, group.z, from);
#pragma clang loop unroll(full)
  for (int t = 0; t < W; ++t) acc[t] = 0.0f;

  uint at = 0;  // the same in every lane, as is `first`
  for (uint first = m.offsets[row]; first < r.end && at < columns; first += 32) {
    const QmoeRun own = qmoe_run<BITS, LEVELS>(m, r, tables, first, columns, at, lane);
    for (uint i = 0; i < own.inside; i += 16) {
      const uint run = qmoe_symbols(tables, r.symbols, own.start + i, own.inside - i);
      for (uint left = (run | run >> 1) & 0x55555555u; left != 0; left &= left - 1) {
        const uint bit = ctz(left), place = own.column + i + bit / 2;
        const float w = qmoe_weight<LEVELS>(r, run >> bit & 3);
#pragma clang loop unroll(full)
        for (uint t = 0; t < W; ++t) {
          if (W > 1 && t >= members.count) break;
          acc[t] = fma(w, float(x[from[t] + place]), acc[t]);
        }
      }
    }
  }
  const float bias = BIAS ? m.bias[row] : 0.0f;
#pragma clang loop unroll(full)
  for (uint t = 0; t < W; ++t) {
    if (W > 1 && t >= members.count) break;
    const float sum = simd_sum(acc[t]);
    const uint to = W == 1 ? pick : simd_broadcast(members.pick, ushort(t));
    if (lane == 0) y[to * TQ_ROWS + row] = T(sum + bias);
  }
}
