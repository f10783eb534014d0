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

bool in_range(const Gather& g) {
  for (int64_t p = 0; p < g.picks; ++p) {
    if (g.offsets[p] < 0 || static_cast<uint64_t>(g.offsets[p]) >= g.pool_bytes) return false;
    if (g.rows_of[p] < 0 || g.rows_of[p] >= g.tokens) return false;
  }
  return true;
}

int collect(const Gather& g, Picks* out) {
  if (!in_range(g)) return TQ_RANGE;
  out->order.resize(static_cast<size_t>(g.picks));
  std::iota(out->order.begin(), out->order.end(), 0);
  std::stable_sort(out->order.begin(), out->order.end(),
                   [&](int64_t a, int64_t b) { return g.offsets[a] < g.offsets[b]; });
  for (int64_t i = 0; i < g.picks;) {
    const int64_t offset = g.offsets[out->order[i]];
    Group group;
    if (!parse_record(g.pool + offset, g.pool_bytes - offset, false, &group.record)) return TQ_RECORD;
    int64_t end = i;
    while (end < g.picks && g.offsets[out->order[end]] == offset) ++end;
    for (; i < end; i += group.tokens) {
      group.picks = &out->order[i];
      group.tokens = static_cast<int>(std::min<int64_t>(end - i, kMaxTokens));
      out->groups.push_back(group);
    }
  }
  return TQ_OK;
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
    case TQ_SILU:
      return gate * logistic(gate) * up;
    case TQ_GELU_TANH:
      return 0.5f * gate * (1.0f + std::tanh(0.7978845608028654f * (gate + 0.044715f * gate * gate * gate))) * up;
    case TQ_SWIGLU_OAI:
      gate = std::min(gate, a.limit);
      return gate * logistic(a.alpha * gate) * (std::clamp(up, -a.limit, a.limit) + 1.0f);
    default:
      return gate > 0.0f ? gate * gate : 0.0f;
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
  if (int status = collect(g, &picks)) return status;
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

// The whole expert, batch by batch of groups; each member function is one phase over the threads.
class Moe {
 public:
  Moe(const Gather& g, int64_t middle, int64_t out_rows, const float* sign_mid, const Activation& activation)
      : g_(g), middle_(middle), out_rows_(out_rows), sign_mid_(sign_mid), activation_(activation) {}

  bool fits(const Group& group) const {
    const RecordView& r = group.record;
    if (r.matrices != down_ + 1) return false;
    for (int i = 0; i < down_; ++i) {
      if (r.matrix[i].rows != middle_ || r.matrix[i].columns != g_.columns) return false;
    }
    return r.matrix[down_].columns == middle_ && r.matrix[down_].rows == out_rows_;
  }

  void run(const std::vector<Group>& groups, float* y) {
    const int64_t total = static_cast<int64_t>(groups.size()), batch = std::min(total, kBatch);
    rotated_ = rotate_tokens(turn_, kernels_, g_);
    x_ = floats(batch * down_ * x_stride_);
    middle_rows_ = floats(batch * middle_stride_);
    middle_x_ = floats(batch * middle_stride_);
    for (int64_t start = 0; start < total; start += kBatch) {
      const int64_t count = std::min(kBatch, total - start);
      arrange_tokens(&groups[start], count);
      multiply_first(&groups[start], count);
      arrange_middle(&groups[start], count);
      multiply_down(&groups[start], count, y);
    }
  }

 private:
  void arrange_tokens(const Group* groups, int64_t count) {
    turn_.each(count * down_, [&](int64_t item, int) {
      const Group& group = groups[item / down_];
      const float* from[kMaxTokens];
      for (int t = 0; t < group.tokens; ++t) from[t] = rotated_.get() + g_.rows_of[group.picks[t]] * padded_;
      arrange(group.record.matrix[item % down_], group.tokens, from, x_.get() + item * x_stride_);
    });
  }

  // Gate, up and activation, or fc1 and activation.
  void multiply_first(const Group* groups, int64_t count) {
    each_tile(turn_, groups, count, 0, [&](int64_t i, int64_t tile) {
      const Group& group = groups[i];
      float gate[kMaxTokens * kRowTile], up[kMaxTokens * kRowTile] = {};
      multiply(kernels_, group.record.matrix[0], tile, group.tokens, x_.get() + i * down_ * x_stride_, gate);
      if (down_ == 2) {
        multiply(kernels_, group.record.matrix[1], tile, group.tokens, x_.get() + (i * down_ + 1) * x_stride_, up);
      }
      const int64_t lanes = std::min<int64_t>(kRowTile, middle_ - tile * kRowTile);
      for (int t = 0; t < group.tokens; ++t) {
        float* to = middle_rows_.get() + i * middle_stride_ + t * padded_middle_ + tile * kRowTile;
        for (int64_t l = 0; l < lanes; ++l) to[l] = activate(activation_, gate[kRowTile * t + l], up[kRowTile * t + l]);
      }
    });
  }

  void arrange_middle(const Group* groups, int64_t count) {
    turn_.each(count, [&](int64_t i, int) {
      const float* from[kMaxTokens];
      for (int t = 0; t < groups[i].tokens; ++t) {
        float* row = middle_rows_.get() + i * middle_stride_ + t * padded_middle_;
        std::fill(row + middle_, row + padded_middle_, 0.0f);
        kernels_.rotate(row, sign_mid_, padded_middle_, hadamard_size(padded_middle_));
        from[t] = row;
      }
      arrange(groups[i].record.matrix[down_], groups[i].tokens, from, middle_x_.get() + i * middle_stride_);
    });
  }

  void multiply_down(const Group* groups, int64_t count, float* y) {
    each_tile(turn_, groups, count, down_, [&](int64_t i, int64_t tile) {
      float out[kMaxTokens * kRowTile];
      const float* x = middle_x_.get() + i * middle_stride_;
      multiply(kernels_, groups[i].record.matrix[down_], tile, groups[i].tokens, x, out);
      write_rows(groups[i], tile, out_rows_, out, y);
    });
  }

  const Gather& g_;
  const int64_t middle_, out_rows_;
  const float* const sign_mid_;
  const Activation activation_;
  const int down_ = activation_.kind == TQ_RELU2 ? 1 : 2;  // index of the last matrix
  const int64_t padded_ = padded_columns(g_.columns), padded_middle_ = padded_columns(middle_);
  const int64_t x_stride_ = kMaxTokens * padded_, middle_stride_ = kMaxTokens * padded_middle_;
  const Kernels& kernels_ = active_kernels();
  Turn turn_;
  Floats rotated_, x_, middle_rows_, middle_x_;
};

}  // namespace

int gather_moe(const Gather& g, int64_t middle, int64_t out_rows, const float* sign_mid, const Activation& activation,
               float* y) {
  Picks picks;
  if (int status = collect(g, &picks)) return status;
  Moe moe(g, middle, out_rows, sign_mid, activation);
  for (const Group& group : picks.groups) {
    if (!moe.fits(group)) return TQ_SHAPE;
  }
  moe.run(picks.groups, y);
  return TQ_OK;
}

}  // namespace tqmoe
