// Products with gathered experts: picks of the same record share one decoding, up to 8 of them.
//
// Work runs in phases over the thread pool: rotate tokens; per group of picks, bring the tokens into the stored order
// and fold the block gains into them; per (group, row tile), multiply. Groups go in batches, which bounds the scratch
// memory.
#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <vector>

#include "library.h"

namespace tqmoe {
namespace {

constexpr int64_t kBatch = 32;  // groups

using Floats = std::unique_ptr<float[]>;
Floats floats(int64_t count) { return Floats(new float[static_cast<size_t>(count)]); }

int64_t padded_columns(int64_t columns) { return (columns + kBlockColumns - 1) / kBlockColumns * kBlockColumns; }
int64_t hadamard_size(int64_t padded) { return std::min<int64_t>(padded & -padded, 2048); }

// Picks of one record, at most kMaxTokens.
struct Group {
  RecordView record;
  const int64_t* picks;
  int tokens;
};

struct Picks {
  std::vector<int64_t> order;  // pick indices, sorted by record
  std::vector<Group> groups;
};

// False if a record is unsound or a pick points outside.
bool collect(const Gather& g, Picks* out) {
  out->order.resize(static_cast<size_t>(g.picks));
  std::iota(out->order.begin(), out->order.end(), 0);
  std::stable_sort(out->order.begin(), out->order.end(),
                   [&](int64_t a, int64_t b) { return g.offsets[a] < g.offsets[b]; });
  for (int64_t i = 0; i < g.picks;) {
    const int64_t offset = g.offsets[out->order[i]];
    if (offset < 0 || static_cast<uint64_t>(offset) >= g.pool_bytes) return false;
    Group group;
    if (!parse_record(g.pool + offset, g.pool_bytes - offset, false, &group.record)) return false;
    int64_t end = i;
    while (end < g.picks && g.offsets[out->order[end]] == offset) ++end;
    for (; i < end; i += group.tokens) {
      group.picks = &out->order[i];
      group.tokens = static_cast<int>(std::min<int64_t>(end - i, kMaxTokens));
      out->groups.push_back(group);
    }
  }
  for (int64_t p = 0; p < g.picks; ++p) {
    if (g.rows_of[p] < 0 || g.rows_of[p] >= g.tokens) return false;
  }
  return true;
}

// Every token, padded and rotated: [tokens][padded columns].
Floats rotate_tokens(Turn& turn, const Kernels& kernels, const Gather& g) {
  const int64_t padded = padded_columns(g.columns), size = hadamard_size(padded);
  Floats rotated = floats(g.tokens * padded);
  turn.each(g.tokens, [&](int64_t token, int) {
    float* row = rotated.get() + token * padded;
    std::copy_n(g.x + token * g.columns, g.columns, row);
    std::fill(row + g.columns, row + padded, 0.0f);
    kernels.rotate(row, g.sign_in, padded, size);
  });
  return rotated;
}

// The layout of Kernels::multiply_tile from one rotated row a token: stored order, times block gains.
void arrange(const MatrixView& m, int tokens, const float* const* rows, float* out) {
  const int width = token_width(tokens);
  for (int64_t b = 0; b < m.blocks; ++b) {
    const int64_t from = kBlockColumns * block_place(m, b);
    for (int i = 0; i < kBlockColumns; i += kTileColumns) {
      const float gain = load_half(m.block_gain + 2 * (4 * b + i / kTileColumns));
      for (int t = 0; t < width; ++t) {
        for (int c = i; c < i + kTileColumns; ++c) {
          out[(b * kBlockColumns + c) * width + t] = t < tokens ? rows[t][from + c] * gain : 0.0f;
        }
      }
    }
  }
}

// One row tile's results, gains and biases applied: out [tokens][32].
void multiply(const Kernels& kernels, const MatrixView& m, int64_t tile, int tokens, const float* x, float* out) {
  kernels.multiply_tile(m, tile, tokens, x, out);
  for (int l = 0; l < kRowTile; ++l) {
    const int64_t at = 2 * (tile * kRowTile + l);
    const float gain = m.row_gain ? load_half(m.row_gain + at) : 1.0f, bias = m.bias ? load_half(m.bias + at) : 0.0f;
    for (int t = 0; t < tokens; ++t) out[kRowTile * t + l] = out[kRowTile * t + l] * gain + bias;
  }
}

float logistic(float v) { return 1.0f / (1.0f + std::exp(-v)); }

// mlx_lm's forms: SwiGLU, GeGLU (tanh), gpt-oss's clamped SwiGLU, and nemotron_h's squared ReLU, which has no up.
float activate(const Activation& a, float gate, float up) {
  switch (a.kind) {
    case TQ_SILU: return gate * logistic(gate) * up;
    case TQ_GELU_TANH:
      return 0.5f * gate * (1.0f + std::tanh(0.7978845608028654f * (gate + 0.044715f * gate * gate * gate))) * up;
    case TQ_SWIGLU_OAI:
      gate = std::min(gate, a.limit);
      return gate * logistic(a.alpha * gate) * (std::clamp(up, -a.limit, a.limit) + 1.0f);
    default: return gate > 0.0f ? gate * gate : 0.0f;
  }
}

void write_rows(const Group& group, int64_t tile, int64_t rows, const float* tile_rows, float* y) {
  const int64_t count = std::min<int64_t>(kRowTile, rows - tile * kRowTile);
  for (int t = 0; t < group.tokens && count > 0; ++t) {
    std::copy_n(tile_rows + kRowTile * t, count, y + group.picks[t] * rows + tile * kRowTile);
  }
}

// Runs work(group index in the batch, row tile) for every row tile of matrix `index`.
template <class Work>
void each_tile(Turn& turn, const Group* groups, int64_t count, int index, Work&& work) {
  const int64_t tiles = groups[0].record.matrix[index].padded_rows / kRowTile;
  turn.each(count * tiles, [&](int64_t item, int) { work(item / tiles, item % tiles); });
}

}  // namespace

int gather_qmv(const Gather& g, int matrix, int64_t rows, float* y) {
  Picks picks;
  if (!collect(g, &picks)) return TQ_RECORD;
  for (const Group& group : picks.groups) {
    if (matrix < 0 || matrix >= group.record.matrices) return TQ_SHAPE;
    const MatrixView& m = group.record.matrix[matrix];
    if (m.rows != rows || m.columns != g.columns) return TQ_SHAPE;
  }
  const Kernels& kernels = active_kernels();
  Turn turn;
  const int64_t padded = padded_columns(g.columns), total = static_cast<int64_t>(picks.groups.size());
  Floats rotated = rotate_tokens(turn, kernels, g), x = floats(std::min(total, kBatch) * padded * kMaxTokens);
  for (int64_t start = 0; start < total; start += kBatch) {
    const Group* groups = &picks.groups[start];
    const int64_t count = std::min(kBatch, total - start);
    turn.each(count, [&](int64_t i, int) {
      const float* from[kMaxTokens];
      for (int t = 0; t < groups[i].tokens; ++t) from[t] = rotated.get() + g.rows_of[groups[i].picks[t]] * padded;
      arrange(groups[i].record.matrix[matrix], groups[i].tokens, from, x.get() + i * padded * kMaxTokens);
    });
    each_tile(turn, groups, count, matrix, [&](int64_t i, int64_t tile) {
      float out[kMaxTokens * kRowTile];
      multiply(kernels, groups[i].record.matrix[matrix], tile, groups[i].tokens, x.get() + i * padded * kMaxTokens,
               out);
      write_rows(groups[i], tile, rows, out, y);
    });
  }
  return TQ_OK;
}

namespace {

bool fits(const Group& group, const Gather& g, int64_t middle, int64_t out_rows, bool gated) {
  const RecordView& r = group.record;
  if (r.matrices != (gated ? 3 : 2)) return false;
  for (int i = 0; i + 1 < r.matrices; ++i) {
    if (r.matrix[i].rows != middle || r.matrix[i].columns != g.columns) return false;
  }
  const MatrixView& down = r.matrix[r.matrices - 1];
  return down.columns == middle && down.rows == out_rows;
}

}  // namespace

int gather_moe(const Gather& g, int64_t middle, int64_t out_rows, const float* sign_mid, const Activation& activation,
               float* y) {
  const bool gated = activation.kind != TQ_RELU2;
  const int down = gated ? 2 : 1;
  Picks picks;
  if (!collect(g, &picks)) return TQ_RECORD;
  for (const Group& group : picks.groups) {
    if (!fits(group, g, middle, out_rows, gated)) return TQ_SHAPE;
  }
  const Kernels& kernels = active_kernels();
  Turn turn;
  const int64_t padded = padded_columns(g.columns), padded_middle = padded_columns(middle);
  const int64_t total = static_cast<int64_t>(picks.groups.size()), batch = std::min(total, kBatch);
  Floats rotated = rotate_tokens(turn, kernels, g);
  const int64_t x_stride = kMaxTokens * padded, mid_stride = kMaxTokens * padded_middle;
  Floats x = floats(2 * batch * x_stride), mid = floats(batch * mid_stride), mid_x = floats(batch * mid_stride);
  for (int64_t start = 0; start < total; start += kBatch) {
    const Group* groups = &picks.groups[start];
    const int64_t count = std::min(kBatch, total - start);
    turn.each(count * down, [&](int64_t item, int) {
      const Group& group = groups[item / down];
      const float* from[kMaxTokens];
      for (int t = 0; t < group.tokens; ++t) from[t] = rotated.get() + g.rows_of[group.picks[t]] * padded;
      arrange(group.record.matrix[item % down], group.tokens, from, x.get() + item * x_stride);
    });
    each_tile(turn, groups, count, 0, [&](int64_t i, int64_t tile) {
      const Group& group = groups[i];
      float gate[kMaxTokens * kRowTile], up[kMaxTokens * kRowTile] = {};
      multiply(kernels, group.record.matrix[0], tile, group.tokens, x.get() + i * down * x_stride, gate);
      if (gated) multiply(kernels, group.record.matrix[1], tile, group.tokens, x.get() + (i * down + 1) * x_stride, up);
      const int64_t lanes = std::min<int64_t>(kRowTile, middle - tile * kRowTile);
      for (int t = 0; t < group.tokens; ++t) {
        float* to = mid.get() + i * mid_stride + t * padded_middle + tile * kRowTile;
        for (int64_t l = 0; l < lanes; ++l) to[l] = activate(activation, gate[kRowTile * t + l], up[kRowTile * t + l]);
      }
    });
    turn.each(count, [&](int64_t i, int) {
      const float* from[kMaxTokens];
      for (int t = 0; t < groups[i].tokens; ++t) {
        float* row = mid.get() + i * mid_stride + t * padded_middle;
        std::fill(row + middle, row + padded_middle, 0.0f);
        kernels.rotate(row, sign_mid, padded_middle, hadamard_size(padded_middle));
        from[t] = row;
      }
      arrange(groups[i].record.matrix[down], groups[i].tokens, from, mid_x.get() + i * mid_stride);
    });
    each_tile(turn, groups, count, down, [&](int64_t i, int64_t tile) {
      float out[kMaxTokens * kRowTile];
      multiply(kernels, groups[i].record.matrix[down], tile, groups[i].tokens, mid_x.get() + i * mid_stride, out);
      write_rows(groups[i], tile, out_rows, out, y);
    });
  }
  return TQ_OK;
}

}  // namespace tqmoe
