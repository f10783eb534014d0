// tq_gather_qmv and tq_gather_moe on records that may be damaged, against products in float64 of what a slow reading
// decodes. Compiled with THREADS 3 too.
//
// Input: options, matrix, activation and tokens, picks, columns (2 bytes), where the second record begins (in units of
// 128), a seed, the token of each pick; the records, one after the other.
#include "slow_trellis.h"

namespace {

constexpr int64_t kMostRows = 4096, kMostColumns = 1 << 14;

struct Options {
  bool moe, repair, hostile, own_columns, one_isa;
  int shift, matrix, activation;
  int64_t tokens, columns, second;
  uint32_t seed;
  std::vector<int64_t> offsets;
  std::vector<int32_t> rows_of;
};

Options options_of(Input* in) {
  const uint32_t flags = in->byte(), matrix = in->byte(), mixed = in->byte();
  Options o{};
  o.moe = flags & 1, o.repair = flags & 2, o.hostile = flags & 4, o.own_columns = flags & 8, o.one_isa = flags & 16;
  o.shift = flags >> 5 & 3;
  o.matrix = static_cast<int8_t>(matrix);
  o.activation = mixed & 3;
  o.tokens = 1 + (mixed >> 2) % 5;
  const int64_t picks = in->number(1, 20);
  o.columns = in->byte();
  o.columns = 1 + (o.columns | (in->byte() & 3) << 8);
  o.second = 128 * in->byte();
  o.seed = in->byte();
  for (int64_t p = 0; p < picks; ++p) {
    const uint32_t pick = in->byte();
    o.offsets.push_back(pick & 128 ? o.second : pick & 64 ? -1 + static_cast<int64_t>(pick & 1) : 0);
    const int64_t row = pick == 255 ? -1 : pick == 254 ? o.tokens : pick % 32 % o.tokens;
    o.rows_of.push_back(static_cast<int32_t>(row));
  }
  return o;
}

std::vector<float> floats(int64_t count, uint32_t seed, bool hostile) {
  std::vector<float> out(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) out[i] = number_of(seed * 65536 + static_cast<uint32_t>(i), hostile);
  return out;
}

Exact<float> signs(int64_t columns, uint32_t seed) {
  Exact<float> out((columns + 63) / 64 * 64);
  for (int64_t i = 0; i < out.size(); ++i) {
    out[i] = number_of(seed + static_cast<uint32_t>(i), false) < 0 ? -1.0f : 1.0f;
  }
  return out;
}

// Section 5 of docs/FORMAT.md, as a matrix that is never written out: entry i of the rotated x.
std::vector<double> rotate(const float* x, int64_t columns, const Exact<float>& sign) {
  const int64_t padded = sign.size();
  int64_t size = 64;
  while (size < 2048 && padded % (2 * size) == 0) size *= 2;
  std::vector<double> out(static_cast<size_t>(padded));
  for (int64_t i = 0; i < columns; ++i) out[i] = static_cast<double>(x[i]) * sign[i];
  for (int64_t half = 1; half < size; half *= 2) {
    for (int64_t i = 0; i < padded; ++i) {
      if (i / half % 2) continue;
      const double a = out[i], b = out[i + half];
      out[i] = a + b, out[i + half] = a - b;
    }
  }
  for (double& v : out) v /= std::sqrt(static_cast<double>(size));
  return out;
}

// The rows of one matrix times a row of x: the sums, and the sizes of their terms.
struct Product {
  std::vector<double> y, reach;
};

Product multiply(const uint8_t* record, const slow::Matrix& m, const float* x, const Exact<float>& sign) {
  const std::vector<double> z = rotate(x, m.columns, sign);
  double largest = 0.0;  // of an entry before the butterflies' roundings
  for (int64_t i = 0; i < m.columns; ++i) largest = std::max(largest, static_cast<double>(std::fabs(x[i])));
  const std::vector<float> q = slow::decode(record, m, 0, m.rows);
  Product out;
  for (int64_t r = 0; r < m.rows; ++r) {
    double y = 0.0, reach = 0.0;
    for (size_t c = 0; c < z.size(); ++c) {
      const double w = q[static_cast<size_t>(r) * z.size() + c];
      y += w * z[c];
      reach += std::fabs(w) * (std::fabs(z[c]) + largest);
    }
    const double bias = m.bias < 0 ? 0.0 : slow::half(slow::u16(record + m.bias + 2 * r));
    out.y.push_back(y + bias);
    out.reach.push_back(reach + std::fabs(bias));
  }
  return out;
}

// mlx_lm's activations; fc1 alone where there are two matrices.
float activate(int kind, float gate, float up, float alpha, float limit) {
  switch (kind) {
    case TQ_SILU: return static_cast<float>(gate / (1.0 + std::exp(-static_cast<double>(gate))) * up);
    case TQ_GELU_TANH: {
      const double g = gate;
      return static_cast<float>(g / 2 * (1 + std::tanh(0.79788456080286536 * (g + 0.044715 * g * g * g))) * up);
    }
    case TQ_SWIGLU_OAI: {
      const double g = std::min(gate, limit), u = std::max(-limit, std::min(up, limit));
      return static_cast<float>(g / (1.0 + std::exp(-alpha * g)) * (u + 1));
    }
    default: return gate > 0.0f ? gate * gate : 0.0f;
  }
}

struct Pool {
  Exact<uint8_t> bytes;
  std::vector<std::vector<slow::Matrix>> records;  // of the first and the second place; none where refused
};

Pool pool_of(const Input& in, Options* o) {
  Pool pool{rest_of(in, o->shift), {}};
  for (int64_t at : {int64_t{0}, o->second}) {
    const bool inside = at < pool.bytes.size();
    if (inside && o->repair) slow::repair(pool.bytes.get() + at, pool.bytes.size() - at);
    pool.records.push_back(inside ? slow::read(pool.bytes.get() + at, pool.bytes.size() - at)
                                  : std::vector<slow::Matrix>());
  }
  return pool;
}

const std::vector<slow::Matrix>* sound_record(const Pool& pool, const Options& o, size_t pick) {
  const std::vector<slow::Matrix>& found = pool.records[o.offsets[pick] == o.second && o.second > 0];
  return found.empty() || o.offsets[pick] < 0 ? nullptr : &found;
}

bool in_range(const Pool& pool, const Options& o) {
  for (size_t p = 0; p < o.offsets.size(); ++p) {
    if (o.rows_of[p] < 0 || o.rows_of[p] >= o.tokens) return false;
    if (o.offsets[p] < 0 || o.offsets[p] >= pool.bytes.size()) return false;
  }
  return true;
}

bool all_sound(const Pool& pool, const Options& o) {
  for (size_t p = 0; p < o.offsets.size(); ++p) {
    if (!sound_record(pool, o, p)) return false;
  }
  return true;
}

void qmv(const Pool& pool, const Options& o, int64_t rows, int64_t columns) {
  const int64_t picks = static_cast<int64_t>(o.offsets.size());
  const Exact<float> x = exact(floats(o.tokens * columns, o.seed, o.hostile)), sign = signs(columns, o.seed);
  Exact<float> y(picks * rows);
  const int status = tq_gather_qmv(pool.bytes.get(), pool.bytes.size(), o.offsets.data(), picks, o.matrix, x.get(),
                                   o.tokens, columns, o.rows_of.data(), sign.get(), rows, y.get());
  const bool inside = in_range(pool, o);
  if (!inside && status != TQ_RANGE) wrong("tq_gather_qmv gives %d for picks that there are not", status);
  if (!inside || !all_sound(pool, o)) return;
  for (size_t p = 0; p < o.offsets.size(); ++p) {
    const std::vector<slow::Matrix>& record = *sound_record(pool, o, p);
    const bool there = o.matrix >= 0 && o.matrix < static_cast<int>(record.size());
    if (!there || record[o.matrix].rows != rows || record[o.matrix].columns != columns) {
      if (status != TQ_SHAPE) wrong("tq_gather_qmv gives %d for a record of other shapes", status);
      return;
    }
  }
  if (status != TQ_OK) wrong("tq_gather_qmv gives %d for sound records", status);
  if (o.hostile) return;
  ++compared.count;
  for (int64_t p = 0; p < picks; ++p) {
    const slow::Matrix& m = (*sound_record(pool, o, static_cast<size_t>(p)))[static_cast<size_t>(o.matrix)];
    const Product want = multiply(pool.bytes.get() + o.offsets[p], m, x.get() + o.rows_of[p] * columns, sign);
    for (int64_t r = 0; r < rows; ++r) expect_near("qmv", p * rows + r, y[p * rows + r], want.y[r], want.reach[r]);
  }
}

// Whether a record is a whole expert of these sizes.
bool is_expert(const std::vector<slow::Matrix>& record, int64_t last, int64_t columns, int64_t middle, int64_t rows) {
  if (static_cast<int64_t>(record.size()) != last + 1) return false;
  for (int64_t i = 0; i < last; ++i) {
    if (record[i].rows != middle || record[i].columns != columns) return false;
  }
  return record[last].rows == rows && record[last].columns == middle;
}

// The last matrix times activations of the library's own gate and up, which `qmv` compares.
void moe(const Pool& pool, const Options& o, const std::vector<slow::Matrix>& first, int64_t columns) {
  const int64_t picks = static_cast<int64_t>(o.offsets.size()), last = o.activation == TQ_RELU2 ? 1 : 2;
  const slow::Matrix& down = first[std::min(first.size() - 1, static_cast<size_t>(last))];
  const int64_t middle = o.own_columns ? first[0].rows : down.columns, rows = down.rows;
  if (middle > kMostRows) return;
  const float alpha = 1.702f, limit = 7.0f;
  const Exact<float> x = exact(floats(o.tokens * columns, o.seed, o.hostile)), sign = signs(columns, o.seed);
  const Exact<float> sign_mid = signs(middle, o.seed + 1000);
  Exact<float> y(picks * rows);
  const int status = tq_gather_moe(pool.bytes.get(), pool.bytes.size(), o.offsets.data(), picks, x.get(), o.tokens,
                                   columns, middle, rows, o.rows_of.data(), sign.get(), sign_mid.get(), o.activation,
                                   alpha, limit, y.get());
  if (!in_range(pool, o) || !all_sound(pool, o)) return;
  bool fits = true;
  for (size_t p = 0; p < o.offsets.size(); ++p) {
    fits &= is_expert(*sound_record(pool, o, p), last, columns, middle, rows);
  }
  if (status != (fits ? TQ_OK : TQ_SHAPE)) wrong("tq_gather_moe gives %d, and its records fit: %d", status, fits);
  if (!fits || o.hostile) return;
  ++compared.count;
  Exact<float> gate(picks * middle), up(picks * middle);
  for (int64_t m = 0; m < last; ++m) {
    if (tq_gather_qmv(pool.bytes.get(), pool.bytes.size(), o.offsets.data(), picks, static_cast<int>(m), x.get(),
                      o.tokens, columns, o.rows_of.data(), sign.get(), middle, (m ? up : gate).get())) {
      wrong("tq_gather_moe takes what tq_gather_qmv refuses");
    }
  }
  if (last == 1) std::memset(up.get(), 0, sizeof(float) * static_cast<size_t>(up.size()));
  for (int64_t p = 0; p < picks; ++p) {
    std::vector<float> hidden;
    for (int64_t i = p * middle; i < (p + 1) * middle; ++i) {
      hidden.push_back(activate(o.activation, gate[i], up[i], alpha, limit));
    }
    const slow::Matrix& m = sound_record(pool, o, static_cast<size_t>(p))->back();
    const Product want = multiply(pool.bytes.get() + o.offsets[p], m, hidden.data(), sign_mid);
    for (int64_t r = 0; r < rows; ++r) expect_near("moe", p * rows + r, y[p * rows + r], want.y[r], want.reach[r]);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::vector<const char*>& names = instruction_sets();
  Input in{data, size};
  Options o = options_of(&in);
  const Pool pool = pool_of(in, &o);
  int64_t shape[3] = {32, o.columns, 1};
  const int index = o.moe ? 0 : o.matrix;
  const int status = tq_record_shape(pool.bytes.get(), pool.bytes.size(), index, shape);
  const int64_t columns = status || (o.own_columns && !o.moe) ? o.columns : shape[1];
  if (columns > kMostColumns || shape[0] > kMostRows) return 0;
  for (const char* name : names) {
    use(name);
    if (o.moe && !pool.records[0].empty() && pool.records[0].back().rows <= kMostRows) {
      moe(pool, o, pool.records[0], columns);
    } else {
      qmv(pool, o, shape[0], columns);
    }
    if (o.one_isa) break;
  }
  return 0;
}
