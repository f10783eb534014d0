// rANS: tq_rans_decode against a decoder of one symbol after the other, on streams of noise and on streams that a slow
// encoder made and the input then damaged.
//
// Input: options, count (2 bytes), seed; with the option `coded`: damages (place, bits: 3 bytes each, a byte says how
// many), the symbols; else the table (first symbol, frequencies), ends, states, words.
#include "input.h"

namespace {

constexpr uint32_t kTotal = 1 << 14, kLow = 1 << 16;
constexpr int64_t kTile = 1 << 16;

struct Stream {
  std::vector<uint32_t> frequencies, ends, states;
  std::vector<uint16_t> words;
};

// Frequencies in proportion to how often a symbol occurs, the rest of 2^14 to the last that does.
std::vector<uint32_t> fair_table(const std::vector<uint8_t>& symbols) {
  std::vector<uint32_t> counts(256), out(256);
  for (uint8_t s : symbols) ++counts[s];
  uint32_t left = kTotal, last = 0;
  for (uint32_t s = 0; s < 256; ++s) {
    if (!counts[s]) continue;
    last = s;
    out[s] = 1 + static_cast<uint32_t>(counts[s] * uint64_t{kTotal - 256} / symbols.size());
    left -= out[s];
  }
  out[last] += left;
  return out;
}

// docs/FORMAT.md, section 8.1, backwards: from the last symbol of a tile to its first.
Stream encode(const std::vector<uint8_t>& symbols) {
  Stream out{fair_table(symbols), {}, {}, {}};
  std::vector<uint32_t> first(257);
  for (int s = 0; s < 256; ++s) first[s + 1] = first[s] + out.frequencies[s];
  for (size_t begin = 0; begin < symbols.size(); begin += kTile) {
    std::vector<uint64_t> lanes(32, kLow);
    std::vector<uint16_t> words;
    for (size_t i = std::min(symbols.size(), begin + kTile); i-- > begin;) {
      uint64_t& x = lanes[(i - begin) % 32];
      const uint64_t f = out.frequencies[symbols[i]];
      if (x >= f << 18) words.push_back(static_cast<uint16_t>(x)), x >>= 16;
      x = (x / f << 14) + x % f + first[symbols[i]];
    }
    out.states.insert(out.states.end(), lanes.begin(), lanes.end());
    out.words.insert(out.words.end(), words.rbegin(), words.rend());
    out.ends.push_back(static_cast<uint32_t>(out.words.size()));
  }
  return out;
}

// The first slot of each symbol; nothing where frequencies do not sum to 2^14.
std::vector<uint32_t> first_slots(const std::vector<uint32_t>& frequencies) {
  std::vector<uint32_t> first;
  uint64_t sum = 0;
  for (uint32_t f : frequencies) {
    first.push_back(static_cast<uint32_t>(sum));
    sum += f;
    if (sum > kTotal) return {};
  }
  return sum == kTotal ? first : std::vector<uint32_t>();
}

// The next symbol of a lane; false where the words have ended.
bool step(const Stream& s, const std::vector<uint32_t>& first, uint64_t end, uint64_t* at, uint64_t* x, uint8_t* out) {
  const uint64_t slot = *x % kTotal;
  const size_t symbol = std::upper_bound(first.begin(), first.end(), slot) - first.begin() - 1;
  *x = s.frequencies[symbol] * (*x / kTotal) + slot - first[symbol];
  *out = static_cast<uint8_t>(symbol);
  if (*x >= kLow) return true;
  if (*at == end) return false;
  *x = *x * kLow + s.words[(*at)++];
  return true;
}

// What section 8.1 decodes a stream to; nothing where it is refused.
std::vector<uint8_t> decode(const Stream& s, int64_t count) {
  const std::vector<uint32_t> first = first_slots(s.frequencies);
  if (first.empty() || static_cast<int64_t>(s.ends.size()) != (count + kTile - 1) / kTile) return {};
  std::vector<uint8_t> out(static_cast<size_t>(count));
  uint64_t at = 0;
  for (size_t t = 0; t < s.ends.size(); ++t) {
    const uint64_t end = s.ends[t];
    if (end < at || end > s.words.size()) return {};
    std::vector<uint64_t> lanes(s.states.begin() + 32 * t, s.states.begin() + 32 * t + 32);
    if (*std::min_element(lanes.begin(), lanes.end()) < kLow) return {};
    uint8_t* to = &out[t * kTile];
    for (int64_t i = 0; i < std::min<int64_t>(kTile, count - kTile * t); ++i) {
      if (!step(s, first, end, &at, &lanes[i % 32], to + i)) return {};
    }
    if (at != end || lanes != std::vector<uint64_t>(32, kLow)) return {};
  }
  return at == s.words.size() ? out : std::vector<uint8_t>();
}

template <class T>
void damage_one(std::vector<T>* values, uint32_t at, uint32_t bits) {
  if (!values->empty()) (*values)[at % values->size()] ^= static_cast<T>(bits);
}

// Whether anything is.
bool damage(Input* in, Stream* s) {
  const int64_t count = in->number(0, 3);
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t where = in->byte(), at = in->byte(), bits = 1u << in->byte() % 32;
    switch (where % 6) {
      case 0: damage_one(&s->frequencies, at, bits); break;
      case 1: damage_one(&s->ends, at, bits); break;
      case 2: damage_one(&s->states, at, bits); break;
      case 3: damage_one(&s->words, at | where << 8, bits); break;
      case 4: s->words.resize(s->words.size() + at % 3); break;
      default: s->words.resize(s->words.size() - std::min<size_t>(s->words.size(), at % 3)); break;
    }
  }
  return count > 0;
}

Stream coded(Input* in, int64_t count, uint32_t seed) {
  const Input options = *in;
  for (int i = 0; i < 10; ++i) in->byte();
  std::vector<uint8_t> symbols(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    symbols[i] = in->size ? in->data[static_cast<size_t>(i) % in->size] : static_cast<uint8_t>(i * seed >> 4);
  }
  Stream s = encode(symbols);
  Input first = options;
  if (!damage(&first, &s) && decode(s, count) != symbols) wrong("the target's own coder does not give its symbols");
  return s;
}

Stream noise(Input* in, int64_t count) {
  Stream s{std::vector<uint32_t>(256), {}, {}, {}};
  uint32_t left = kTotal;
  const uint32_t begin = in->byte(), used = 1 + in->byte() % 8, odd = in->byte();
  for (uint32_t i = 0; i + 1 < used; ++i) {
    const uint32_t f = std::min(left, in->byte() << 6 | 1u);
    s.frequencies[(begin + i) % 256] += f;
    left -= f;
  }
  s.frequencies[(begin + used - 1) % 256] += odd == 1 ? in->word() : left;
  const int64_t tiles = (count + kTile - 1) / kTile + (odd == 2) - (odd == 3);
  for (int64_t t = 0; t < tiles; ++t) s.ends.push_back(odd == 4 ? in->word() : in->byte());
  for (int64_t i = 0; i < 32 * tiles; ++i) s.states.push_back(odd == 5 ? in->word() : kLow + (in->byte() << 4));
  while (in->size > 1) s.words.push_back(static_cast<uint16_t>(in->byte() | in->byte() << 8));
  if (odd < 4 && !s.ends.empty()) s.ends.back() = static_cast<uint32_t>(s.words.size());
  return s;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  instruction_sets();
  Input in{data, size};
  const uint32_t flags = in.byte();
  int64_t count = in.byte();
  count |= in.byte() << 8;
  const uint32_t seed = in.byte();
  count = (flags & 2 ? count % 100 : count % 600) + (flags & 4 && seed == 77 ? 65536 : 0) + 1;
  const Stream s = flags & 1 ? coded(&in, count, seed) : noise(&in, count);
  const std::vector<uint8_t> want = decode(s, count);
  const Exact<uint8_t> ends = bytes_of(s.ends, flags >> 4 & 3), states = bytes_of(s.states, flags >> 5 & 3);
  const Exact<uint8_t> words = bytes_of(s.words, flags >> 6 & 3);
  Exact<uint8_t> out(count);
  const int status = tq_rans_decode(s.frequencies.data(), ends.get(), states.get(), static_cast<int64_t>(s.ends.size()),
                                    words.get(), static_cast<int64_t>(s.words.size()), count, out.get());
  if (status != (want.empty() ? TQ_RECORD : TQ_OK)) wrong("tq_rans_decode gives %d for %zu", status, want.size());
  compared.count += !want.empty();
  if (!want.empty() && std::memcmp(out.get(), want.data(), want.size())) wrong("symbols differ");
  return 0;
}
