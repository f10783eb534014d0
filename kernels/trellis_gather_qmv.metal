// Products of a few tokens with gathered experts, straight from their records. After trellis_decode.metal.
//
// A pick is one (token, chosen expert); there are tokens * k of them, in the router's order.
//   pool    u8, records at base + 128 * table[expert]; base makes the address of the first record a multiple of 128
//   ids     u32 or i32 [picks], experts;  table  u32 [experts]
//   z       f32 [tokens or picks, C], rotated inputs in the model's column order
//   params  u32 [7]: base, experts, rows of z, picks that share a row of z, C, rows of the output, matrix
// Inputs of fewer than 8 elements are in constant space, so pointers that may be short are template types.
//
// Grid: x = row tiles x simdgroups x 32, y = picks of a row of z, z = rows of z. One threadgroup computes 32 rows of
// one matrix (of gate and up in the fused kernel) for up to W picks of one expert: its simdgroups take blocks of 64
// columns in turn (32-row tiles alone would leave most of a GPU idle: 768 rows x 8 experts are 192 simdgroups), and add
// their sums through threadgroup memory. With W > 1 the first of every W picks of an expert works for all of them and
// the others return at once, so an expert that several tokens chose is decoded once.

#define TQ_BASE params[0]
#define TQ_EXPERTS params[1]
#define TQ_PICKS (params[2] * params[3])
#define TQ_SHARED params[3]
#define TQ_COLUMNS params[4]
#define TQ_ROWS params[5]
#define TQ_MATRIX params[6]

// The picks that a threadgroup works for.
struct Members {
  uint count;  // 0: another threadgroup does this pick
  uint pick;   // lane t holds member t
};

// Where each member's row of z begins.
template <int W, typename Params>
METAL_FUNC void rows_of_z(Members m, Params params, uint row, thread uint* from) {
  const uint start = W == 1 ? row * TQ_COLUMNS : m.pick / TQ_SHARED * TQ_COLUMNS;
#pragma clang loop unroll(full)
  for (int t = 0; t < W; ++t) from[t] = W == 1 ? start : simd_broadcast(start, ushort(t));
}

template <int W, typename Ids>
METAL_FUNC Members members_of(Ids ids, uint pick, uint picks, ushort lane) {
  Members m;
  m.count = 1;
  m.pick = pick;
  if (W == 1) return m;
  const uint expert = uint(ids[pick]);
  uint before = 0;  // earlier picks of this expert
  m.count = 0;
  for (uint first = 0; first < picks; first += 32) {
    const uint other = first + lane;
    uint same = uint(ulong(simd_ballot(other < picks && uint(ids[min(other, picks - 1)]) == expert)));
    if (pick >= first + 32) {
      before += popcount(same);
      continue;
    }
    if (pick >= first) {
      const uint earlier = (1u << (pick - first)) - 1;
      before += popcount(same & earlier);
      if (before % W != 0) return m;
      same &= ~earlier;
    }
    for (; same != 0 && m.count < W; same &= same - 1) {
      if (lane == m.count) m.pick = first + ctz(same);
      ++m.count;
    }
  }
  return m;
}

// acc[t] += this simdgroup's blocks of one row tile times z, gains of columns included; from[t] = first entry of z.
template <int RATE, int L, int W>
METAL_FUNC void multiply_block(const device uint* block, half4 gains, const device float* z, const thread uint* from,
                               uint count, ushort lane, thread float* acc) {
  uint words[8];
  load_planes<(RATE == 7 ? 8 : RATE)>(block, lane, words);
#pragma clang loop unroll(full)
  for (int tile = 0; tile < 4; ++tile) {
    uint bits[4];
    float weights[16];
    tile_bits<(RATE == 7 ? 8 : RATE)>(words, tile, lane, bits);
    tile_weights<RATE, L>(bits, weights);
    const float gain = float(gains[tile]);
#pragma clang loop unroll(full)
    for (uint t = 0; t < W; ++t) {
      if (W > 1 && t >= count) break;
      const device float4* x = (const device float4*)(z + from[t]) + 4 * tile;
      float sum = 0.0f;
#pragma clang loop unroll(full)
      for (int i = 0; i < 4; ++i) {
        const float4 v = x[i];
        sum = fma(weights[4 * i], v.x, sum);
        sum = fma(weights[4 * i + 1], v.y, sum);
        sum = fma(weights[4 * i + 2], v.z, sum);
        sum = fma(weights[4 * i + 3], v.w, sum);
      }
      acc[t] = fma(sum, gain, acc[t]);
    }
  }
}

// Blocks sg, sg + sgs, ... of row tile `tile`.
template <int L, int W>
METAL_FUNC void multiply_tile(MatrixView m, uint tile, const device float* z, const thread uint* from, uint count,
                              uint sg, uint sgs, ushort lane, thread float* acc) {
  BlockGroup g = block_group(m, 0, 0, lane);
  const device uint* payload = m.payload + tile * tile_words(m, g, lane);
  for (uint first = 0; first < m.blocks; first += 32) {
    if (first > 0) g = block_group(m, first, g.end, lane);
    const uint last = min(32u, m.blocks - first);
    for (uint i = sg; i < last; i += sgs) {
      const uint rate = simd_broadcast(g.rate, ushort(i));
      const device uint* block = payload + simd_broadcast(g.word, ushort(i));
      const device float* x = z + simd_broadcast(g.column, ushort(i));
      const half4 gains = m.block_gain[first + i];
      switch (rate) {
        case 1: multiply_block<1, L, W>(block, gains, x, from, count, lane, acc); break;
        case 2: multiply_block<2, L, W>(block, gains, x, from, count, lane, acc); break;
        case 3: multiply_block<3, L, W>(block, gains, x, from, count, lane, acc); break;
        case 4: multiply_block<4, L, W>(block, gains, x, from, count, lane, acc); break;
        case 5: multiply_block<5, L, W>(block, gains, x, from, count, lane, acc); break;
        case 6: multiply_block<6, L, W>(block, gains, x, from, count, lane, acc); break;
        case 7: multiply_block<7, L, W>(block, gains, x, from, count, lane, acc); break;
        default: break;
      }
    }
  }
}

// Product of one row of a matrix, its gain and bias applied to the sum over simdgroups.
template <int W>
METAL_FUNC float row_result(MatrixView m, const threadgroup float* sums, uint t, uint row, uint sgs, ushort lane) {
  float sum = 0.0f;
  for (uint s = 0; s < sgs; ++s) sum += sums[(s * W + t) * 32 + lane];
  return sum * (m.has_row_gain ? float(m.row_gain[row]) : 1.0f) + (m.has_bias ? float(m.bias[row]) : 0.0f);
}

// y T [picks, rows] = matrix `TQ_MATRIX` of each pick's expert times its row of z.
// sums: threadgroup floats, simdgroups x W x 32.
template <int L, int W, typename T, typename Ids, typename Table, typename Params>
METAL_FUNC void trellis_gather_qmv(const device uchar* pool, Ids ids, Table table, const device float* z, Params params,
                                   device T* y, threadgroup float* sums, uint3 group, uint sg, uint sgs, uint lane) {
  const uint tile = group.x, pick = group.z * TQ_SHARED + group.y;
  const Members members = members_of<W>(ids, pick, TQ_PICKS, lane);
  if (members.count == 0) return;
  const MatrixView m = matrix_view(record_at(pool, table, uint(ids[pick]), TQ_EXPERTS, TQ_BASE), TQ_MATRIX);
  uint from[W];
  float acc[W];
  rows_of_z<W>(members, params, group.z, from);
#pragma clang loop unroll(full)
  for (int t = 0; t < W; ++t) acc[t] = 0.0f;
  multiply_tile<L, W>(m, tile, z, from, members.count, sg, sgs, lane, acc);
#pragma clang loop unroll(full)
  for (int t = 0; t < W; ++t) sums[(sg * W + t) * 32 + lane] = acc[t];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const uint row = 32 * tile + lane;
  for (uint t = sg; t < members.count; t += sgs) {
    const float v = row_result<W>(m, sums, t, row, sgs, lane);
    const uint to = W == 1 ? pick : simd_broadcast(members.pick, ushort(t));
    if (row < TQ_ROWS) y[to * TQ_ROWS + row] = T(v);
  }
}

METAL_FUNC float logistic(float v) { return 1.0f / (1.0f + exp(-v)); }

// mlx_lm's forms: SwiGLU, GeGLU (tanh), gpt-oss's clamped SwiGLU, and nemotron_h's squared ReLU, which has no up.
#define TQ_SILU 0
#define TQ_GELU_TANH 1
#define TQ_SWIGLU_OAI 2
#define TQ_RELU2 3
template <int ACT>
METAL_FUNC float activate(float gate, float up, float alpha, float limit) {
  if (ACT == TQ_SILU) return gate * logistic(gate) * up;
  if (ACT == TQ_GELU_TANH) {
    return 0.5f * gate * (1.0f + precise::tanh(0.7978845608028654f * (gate + 0.044715f * gate * gate * gate))) * up;
  }
  if (ACT == TQ_SWIGLU_OAI) {
    gate = min(gate, limit);
    return gate * logistic(alpha * gate) * (clamp(up, -limit, limit) + 1.0f);
  }
  gate = max(gate, 0.0f);
  return gate * gate;
}

// hidden f32 [picks, rows] = activation of matrices 0 and 1 (of matrix 0 alone for TQ_RELU2), before the second
// rotation. shape f32 [2]: alpha and limit of TQ_SWIGLU_OAI. sums: threadgroup floats, 2 x simdgroups x W x 32.
template <int L, int W, int ACT, typename Ids, typename Table, typename Params, typename Shape>
METAL_FUNC void trellis_gather_gate_up(const device uchar* pool, Ids ids, Table table, const device float* z,
                                       Params params, Shape shape, device float* hidden,
                                       threadgroup float* sums, uint3 group, uint sg, uint sgs, uint lane) {
  const uint tile = group.x, pick = group.z * TQ_SHARED + group.y;
  const Members members = members_of<W>(ids, pick, TQ_PICKS, lane);
  if (members.count == 0) return;
  const device uchar* record = record_at(pool, table, uint(ids[pick]), TQ_EXPERTS, TQ_BASE);
  const MatrixView gate = matrix_view(record, 0), up = matrix_view(record, 1);
  threadgroup float* up_sums = sums + sgs * W * 32;
  uint from[W];
  float acc[W], up_acc[W];
  rows_of_z<W>(members, params, group.z, from);
#pragma clang loop unroll(full)
  for (int t = 0; t < W; ++t) acc[t] = up_acc[t] = 0.0f;
  multiply_tile<L, W>(gate, tile, z, from, members.count, sg, sgs, lane, acc);
  if (ACT != TQ_RELU2) multiply_tile<L, W>(up, tile, z, from, members.count, sg, sgs, lane, up_acc);
#pragma clang loop unroll(full)
  for (int t = 0; t < W; ++t) {
    sums[(sg * W + t) * 32 + lane] = acc[t];
    if (ACT != TQ_RELU2) up_sums[(sg * W + t) * 32 + lane] = up_acc[t];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const uint row = 32 * tile + lane;
  for (uint t = sg; t < members.count; t += sgs) {
    const float g = row_result<W>(gate, sums, t, row, sgs, lane);
    const float u = ACT != TQ_RELU2 ? row_result<W>(up, up_sums, t, row, sgs, lane) : 0.0f;
    const uint to = W == 1 ? pick : simd_broadcast(members.pick, ushort(t));
    if (row < TQ_ROWS) hidden[to * TQ_ROWS + row] = activate<ACT>(g, u, shape[0], shape[1]);
  }
}
