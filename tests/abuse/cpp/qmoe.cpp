// Matrices of the qmoe codec: check, decode and products, against a walk over one symbol after the other. Tables are
// the caller's own, so they are always sound here: QMoE's dictionary, Tunstall's codes, or any lengths.
//
// Input: options, table, rows, columns (2 bytes), tokens, first row, a seed, codewords (2 bytes); row offsets as steps
// of one byte, or (an option) whole words; values; codewords. With an option the codewords of rows are made to fit.
#include <map>
#include <queue>

#include "input.h"

namespace {

struct Table {
  std::vector<std::vector<uint8_t>> runs;  // the symbols of each codeword
  Exact<uint32_t> starts{0}, words{0};  // as the library takes them

  void finish() {
    std::vector<uint32_t> places(1, 0), symbols;
    for (const auto& run : runs) {
      for (size_t i = 0, at = places.back(); i < run.size(); ++i, ++at) {
        if (at % 16 == 0) symbols.push_back(0);
        symbols.back() |= static_cast<uint32_t>(run[i]) << (2 * (at % 16));
      }
      places.push_back(places.back() + static_cast<uint32_t>(run.size()));
    }
    symbols.resize(symbols.size() + 2);  // zeros
    starts = exact(places), words = exact(symbols);
  }
};

// docs/FORMAT.md, section 7: the likeliest leaf becomes the parent of all symbols until 2^bits leaves would be passed.
Table tunstall(int levels, int bits, double zeros) {
  std::vector<std::vector<uint8_t>> nodes(1);
  std::vector<bool> split(1);
  std::vector<double> probability(1, 1.0);
  const auto worse = [&](size_t a, size_t b) {
    return probability[a] < probability[b] || (probability[a] == probability[b] && a > b);
  };
  std::priority_queue<size_t, std::vector<size_t>, decltype(worse)> leaves(worse);
  leaves.push(0);
  while (static_cast<int>(leaves.size()) + levels - 1 <= 1 << bits) {
    const size_t node = leaves.top();
    leaves.pop();
    split[node] = true;
    for (int s = 0; s < levels; ++s) {
      std::vector<uint8_t> run = nodes[node];
      run.push_back(static_cast<uint8_t>(s));
      nodes.push_back(run);
      split.push_back(false);
      probability.push_back(probability[node] * (s ? (1 - zeros) / (levels - 1) : zeros));
      leaves.push(nodes.size() - 1);
    }
  }
  Table table;
  for (size_t i = 0; i < nodes.size(); ++i) {
    if (!split[i]) table.runs.push_back(nodes[i]);
  }
  table.finish();
  return table;
}

// The 65,536 likeliest sequences of 1 to 14 pairs; ties by their numbers.
Table dictionary() {
  const double single[3] = {0.885, (1 - 0.885) / 2, (1 - 0.885) / 2};
  using Entry = std::pair<double, std::vector<uint8_t>>;
  const auto worse = [](const Entry& a, const Entry& b) {
    return a.first < b.first || (a.first == b.first && a.second > b.second);
  };
  std::priority_queue<Entry, std::vector<Entry>, decltype(worse)> heap(worse);
  heap.push({1.0, {}});
  Table table;
  while (table.runs.size() < 65536) {
    const Entry top = heap.top();
    heap.pop();
    if (!top.second.empty()) {
      table.runs.emplace_back();
      for (uint8_t pair : top.second) {
        table.runs.back().push_back(pair % 3);
        table.runs.back().push_back(pair / 3);
      }
    }
    for (int pair = 0; top.second.size() < 14 && pair < 9; ++pair) {
      Entry next = top;
      next.first *= single[pair / 3] * single[pair % 3];
      next.second.push_back(static_cast<uint8_t>(pair));
      heap.push(next);
    }
  }
  table.finish();
  return table;
}

// Any number of codewords of any lengths.
Table any_table(int levels, int bits, uint32_t seed) {
  Table table;
  const uint32_t entries = 1 + seed * 37 % (1u << std::min(bits, 8)), longest = 1 + seed % 5 * 17;
  for (uint32_t c = 0; c < entries; ++c) {
    table.runs.emplace_back(1 + (c * 7 + seed) % longest);
    for (size_t i = 0; i < table.runs.back().size(); ++i) {
      table.runs.back()[i] = static_cast<uint8_t>((c + seed) * (i + 1) % 5 % levels);
    }
  }
  table.finish();
  return table;
}

const Table& table_of(int levels, int bits, uint32_t name) {
  static std::map<uint32_t, Table> made;
  static const double zeros[] = {64, 102, 192, 227, 251};
  const uint32_t key = name | bits << 8 | levels << 16;
  auto found = made.find(key);
  if (found == made.end()) {
    const bool coded = bits < 16 ? name < 5 : name == 1;
    Table table = name == 0 && bits == 16 && levels == 3 ? dictionary()
                  : coded                                ? tunstall(levels, bits, zeros[name] / 256)
                                                         : any_table(levels, bits, name);
    found = made.emplace(key, std::move(table)).first;
  }
  return found->second;
}

// A matrix as the input says it, and as the library gets it.
struct Case {
  std::vector<uint32_t> offsets;
  std::vector<uint16_t> values;
  std::vector<uint8_t> codes;
  int64_t rows, columns, codewords, reach;
  int bits, levels;
};

uint32_t codeword(const uint8_t* codes, int64_t index, int bits) {
  uint32_t value = 0;
  for (int64_t i = 0, at = index * bits; i < bits; ++i, ++at) value |= (codes[at / 8] >> at % 8 & 1u) << i;
  return value;
}

void set_codeword(uint8_t* codes, int64_t index, int bits, uint32_t value) {
  for (int64_t i = 0, at = index * bits; i < bits; ++i, ++at) {
    codes[at / 8] = static_cast<uint8_t>((codes[at / 8] & ~(1 << at % 8)) | (value >> i & 1) << at % 8);
  }
}

// Gives every row the codewords that fill it, from `codes` as far as they fit, so that sound rows are not left to
// chance; the last row takes what is left.
void fit_rows(const Table& table, int bits, int64_t rows, int64_t columns, int64_t codewords, uint32_t* offsets,
              uint8_t* codes) {
  int64_t c = 0;
  for (int64_t row = 0; row < rows; ++row) {
    offsets[row] = static_cast<uint32_t>(c);
    for (int64_t at = 0; at < columns && c < codewords; ++c) {
      const uint32_t code = codeword(codes, c, bits) % static_cast<uint32_t>(table.runs.size());
      set_codeword(codes, c, bits, code);
      at += static_cast<int64_t>(table.runs[code].size());
    }
  }
  offsets[rows] = static_cast<uint32_t>(c);
}

bool slow_row(const Case& k, const Table& table, int64_t row, std::vector<float>* out) {
  const int64_t begin = k.offsets[row], end = k.offsets[row + 1];
  if (begin > end || end > k.codewords) return false;
  std::vector<int> symbols;
  for (int64_t c = begin; c < end; ++c) {
    const uint32_t code = codeword(k.codes.data(), c, k.bits);
    if (code >= table.runs.size() || static_cast<int64_t>(symbols.size()) >= k.columns) return false;
    symbols.insert(symbols.end(), table.runs[code].begin(), table.runs[code].end());
  }
  const int64_t count = static_cast<int64_t>(symbols.size());
  if (count < k.columns || count > k.reach) return false;
  if (std::any_of(symbols.begin() + k.columns, symbols.end(), [](int s) { return s != 0; })) return false;
  out->assign(static_cast<size_t>(k.columns), 0.0f);
  for (int64_t i = 0; i < k.columns; ++i) {
    if (symbols[i] == 0) continue;
    const uint32_t bits = static_cast<uint32_t>(k.values[row * (k.levels - 1) + symbols[i] - 1]) << 16;
    std::memcpy(&(*out)[i], &bits, sizeof bits);
  }
  return true;
}

struct Rows {
  std::vector<std::vector<float>> weights;
  std::vector<bool> sound;

  bool sound_from(size_t first) const { return std::find(sound.begin() + first, sound.end(), false) == sound.end(); }
};

void compare_products(const Case& k, const tq_qmoe_matrix& m, const Rows& rows, int tokens, uint32_t seed) {
  Exact<float> x(tokens * k.columns), y(tokens * k.rows);
  for (int64_t i = 0; i < x.size(); ++i) x[i] = number_of(seed + static_cast<uint32_t>(i), false);
  const int status = tq_qmoe_qmv(&m, x.get(), tokens, y.get());
  if ((status == TQ_OK) != rows.sound_from(0)) wrong("tq_qmoe_qmv gives %d", status);
  for (int64_t row = 0; status == TQ_OK && row < k.rows; ++row) {
    bool finite = true;  // as the reader of a record has checked
    for (int s = 0; s < k.levels - 1; ++s) finite &= (k.values[row * (k.levels - 1) + s] & 0x7F80) != 0x7F80;
    for (int t = 0; finite && t < tokens; ++t) {
      double want = 0.0, reach = 0.0;
      for (int64_t c = 0; c < k.columns; ++c) {
        const double term = static_cast<double>(rows.weights[row][c]) * x[t * k.columns + c];
        want += term, reach += std::fabs(term);
      }
      expect_near("qmv", row, y[t * k.rows + row], want, reach);
    }
  }
}

// The same verdict and the same weights from all three functions.
void compare(const Case& k, const tq_qmoe_matrix& m, const Table& table, int64_t first, int tokens, uint32_t seed) {
  Rows rows{std::vector<std::vector<float>>(static_cast<size_t>(k.rows)), {}};
  for (int64_t row = 0; row < k.rows; ++row) rows.sound.push_back(slow_row(k, table, row, &rows.weights[row]));
  const bool whole = rows.sound_from(0) && k.offsets[0] == 0 && k.offsets.back() == k.codewords;
  compared.count += whole;
  if ((tq_qmoe_check(&m) == TQ_OK) != whole) wrong("tq_qmoe_check should say %d", whole);
  Exact<float> out((k.rows - first) * k.columns);
  const int status = tq_qmoe_dequantize(&m, first, k.rows, out.get());
  if ((status == TQ_OK) != rows.sound_from(static_cast<size_t>(first))) wrong("tq_qmoe_dequantize gives %d", status);
  for (int64_t row = first; status == TQ_OK && row < k.rows; ++row) {
    const float* got = out.get() + (row - first) * k.columns;
    if (!same_bits(got, rows.weights[row].data(), k.columns)) wrong("row %lld", static_cast<long long>(row));
  }
  compare_products(k, m, rows, tokens, seed);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  instruction_sets();
  Input in{data, size};
  const uint32_t flags = in.byte(), name = in.byte();
  const bool wild = flags & 8, fit = flags & 16, limited = flags & 32;
  const int shift = flags >> 6;
  Case k{};
  k.bits = (flags & 3) == 0 ? 8 : (flags & 3) == 1 ? 12 : 16, k.levels = flags & 4 ? 4 : 3;
  k.rows = in.number(1, 40);
  k.columns = in.byte();
  k.columns = 1 + (k.columns | in.byte() << 8) % 600;
  k.reach = limited ? k.columns + k.columns % 2 : int64_t{1} << 62;
  const int tokens = static_cast<int>(in.number(1, 8));
  const int64_t first = in.byte() % k.rows;
  const uint32_t seed = in.byte();
  k.codewords = in.byte();
  k.codewords |= in.byte() << 8;
  uint32_t place = 0;
  k.offsets.push_back(wild ? in.word() : 0);
  for (int64_t row = 0; row < k.rows && !fit; ++row) k.offsets.push_back(wild ? in.word() : place += in.byte());
  k.offsets.resize(static_cast<size_t>(k.rows + 1));
  for (int64_t i = 0; i < k.rows * (k.levels - 1); ++i) {
    const uint32_t low = in.byte();
    k.values.push_back(static_cast<uint16_t>(low | in.byte() << 8));
  }
  k.codewords = std::min(k.codewords, static_cast<int64_t>(in.size) * 8 / k.bits);
  k.codes.assign(in.data, in.data + (k.codewords * k.bits + 7) / 8);
  const Table& table = table_of(k.levels, k.bits, name);
  if (fit) {
    fit_rows(table, k.bits, k.rows, k.columns, k.codewords, k.offsets.data(), k.codes.data());
    if (seed % 2 == 0) k.codewords = k.offsets.back();
  }
  const Exact<uint8_t> offsets = bytes_of(k.offsets, shift), values = bytes_of(k.values, shift);
  const Exact<uint8_t> codes = bytes_of(k.codes, shift);
  const tq_qmoe_matrix m = {reinterpret_cast<const uint32_t*>(offsets.get()),
                            reinterpret_cast<const uint16_t*>(values.get()),
                            codes.get(),
                            table.starts.get(),
                            table.words.get(),
                            k.rows,
                            k.columns,
                            k.codewords,
                            k.reach,
                            static_cast<uint32_t>(table.runs.size()),
                            k.bits,
                            k.levels};
  compare(k, m, table, first, tokens, seed);
  return 0;
}
