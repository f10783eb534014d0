// The Viterbi encoder of one tail-biting tile. Included by each instruction-set file after its V16 operations.
//
// A step goes from window p + 1 to window p, because the decoder's window reads forward: s(p) = (s(p + 1) << kv | bits)
// mod 2^L. The 2^kv predecessors of the states q * 2^kv ... + 2^kv - 1 are q + j * Q, with Q = 2^(L - kv): a strided
// minimum, then an expansion, both over contiguous memory. Costs are 16-bit integers with saturation, the best state at
// -32768 after each step; so every instruction set and thread count gives the same codes, and twice the lanes of
// float32 fit a register. A saturated state is so much worse than the best one that no best path passes it (the units
// are chosen in encoder.cpp).
//
// Decisions are bit masks of 32 states: a tournament over the 2^kv predecessors leaves 2^kv - 1 masks, in postorder.

namespace {

using tqmoe::EncodeJob;

struct Group {  // 32 lanes of int16
  V16 v[32 / kLanes16];
};
constexpr int kVectors = 32 / kLanes16;

inline Group load_group(const int16_t* p) {
  Group g;
  for (int i = 0; i < kVectors; ++i) g.v[i] = load16(p + i * kLanes16);
  return g;
}

// The smaller of predecessors First ... First + Count - 1 of 32 consecutive q; ties go to the lower index.
template <int Count>
inline Group tournament(const int16_t* cost, int q_count, uint32_t*& mask) {
  if constexpr (Count == 1) {
    return load_group(cost);
  } else {
    Group left = tournament<Count / 2>(cost, q_count, mask);
    Group right = tournament<Count / 2>(cost + static_cast<int64_t>(Count / 2) * q_count, q_count, mask);
    *mask++ = less_mask(right.v, left.v);
    for (int i = 0; i < kVectors; ++i) left.v[i] = min16(left.v[i], right.v[i]);
    return left;
  }
}

// Which predecessor won: the walk of the same tournament from its root.
inline int winner(const uint32_t* mask, int count, int bit) {
  int chosen = 0;
  while (count > 1) {
    int half = count / 2;
    if (mask[count - 2] >> bit & 1) {
      chosen += half;
      mask += half - 1;
    }
    count = half;
  }
  return chosen;
}

struct Workspace {
  int16_t* cost;    // 2^L
  int16_t* best;    // 2^(L - kv), and 32 more that are read but never used
  int16_t* target;  // the tile in code units, 512
  uint8_t* bits;    // the tile's new bits, one byte a step
  uint32_t* mask;   // steps * 2^L / 32
};

template <int Bits>
inline void select(const int16_t* cost, int16_t* best, int q_count, uint32_t* mask) {
  V16 least = splat16(32767);
  for (int q = 0; q < q_count; q += 32) {
    Group m = tournament<1 << Bits>(cost + q, q_count, mask);
    for (int i = 0; i < kVectors; ++i) {
      store16(best + q + i * kLanes16, m.v[i]);
      least = min16(least, m.v[i]);
    }
  }
  // From the least cost up: best - least - 32768. The difference of two costs near the bottom fits int16.
  int shift = horizontal_min(least) + 32768;
  if (shift == 0) return;
  V16 amount = splat16(static_cast<int16_t>(shift < 32767 ? shift : 32767));
  for (int q = 0; q < q_count; q += kLanes16) store16(best + q, sub16(load16(best + q), amount));
}

template <int Bits, int Weights>
inline void extend(const EncodeJob& job, const int16_t* target, const int16_t* best, int16_t* cost, int states) {
  const int16_t *code0 = job.code[0], *code1 = job.code[1];
  V16 x0 = splat16(target[0]), x1 = splat16(target[Weights - 1]);
  const V16 lowest = splat16(-32767);  // the square of -32768 does not fit
  auto pattern = expand_pattern<Bits>();
  for (int s = 0; s < states; s += kLanes16) {
    V16 error;
    if constexpr (Weights == 2) {  // the units leave room: no difference overflows
      V16 d0 = sub16(load16(code0 + s), x0), d1 = sub16(load16(code1 + s), x1);
      error = adds16(square16(d0), square16(d1));
    } else {
      error = square16(max16(subs16(load16(code0 + s), x0), lowest));
    }
    store16(cost + s, adds16(expand<Bits>(best + (s >> Bits), pattern), error));
  }
}

// Windows first, first - 1, ... (steps of them, circular); costs must be set. Leaves one row of masks a step.
template <int Bits, int Weights>
void forward(const EncodeJob& job, const Workspace& w, int first, int steps) {
  const int states = 1 << job.length, q_count = states >> Bits, total = tqmoe::kTileWeights / Weights;
  const int row = q_count / 32 * ((1 << Bits) - 1);
  for (int i = 0; i < steps; ++i) {
    int p = (first - i + total) % total;
    select<Bits>(w.cost, w.best, q_count, w.mask + static_cast<int64_t>(i) * row);
    extend<Bits, Weights>(job, w.target + p * Weights, w.best, w.cost, states);
  }
}

inline int cheapest(const int16_t* cost, int begin, int end, int stride) {
  int best = begin;
  for (int s = begin; s < end; s += stride) {
    if (cost[s] < cost[best]) best = s;
  }
  return best;
}

// The state before step `stop` of a forward run of `steps` steps that ends in `state`; its new bits go to w.bits if
// asked.
template <int Bits>
int trace(const EncodeJob& job, const Workspace& w, int steps, int stop, int state, uint8_t* bits) {
  const int q_count = (1 << job.length) >> Bits, per_group = (1 << Bits) - 1;
  const int row = q_count / 32 * per_group;
  for (int i = steps - 1; i >= stop; --i) {
    if (bits) bits[i] = static_cast<uint8_t>(state & per_group);
    int q = state >> Bits;
    const uint32_t* mask = w.mask + static_cast<int64_t>(i) * row + q / 32 * per_group;
    state = q + q_count * winner(mask, 1 << Bits, mask_bit(q & 31));
  }
  return state;
}

template <int Bits, int Weights>
void encode_tile(const EncodeJob& job, const float* x, uint8_t* codes, void* memory) {
  constexpr int total = tqmoe::kTileWeights / Weights;
  const int states = 1 << job.length, q_count = states >> Bits;
  Workspace w;
  w.cost = static_cast<int16_t*>(memory);
  w.best = w.cost + states;
  w.target = w.best + states / 2 + 64;
  w.bits = reinterpret_cast<uint8_t*>(w.target + tqmoe::kTileWeights);
  w.mask = reinterpret_cast<uint32_t*>(w.bits + tqmoe::kTileWeights);
  for (int i = 0; i < tqmoe::kTileWeights; ++i) {
    float v = x[i] * job.units;
    v = v < job.clip ? v : job.clip;
    v = v > -job.clip ? v : -job.clip;
    w.target[i] = static_cast<int16_t>(v < 0 ? v - 0.5f : v + 0.5f);
  }
  // The state at the seam, from a free run over the windows on both sides of it.
  const int reach = job.reach < total / 2 ? job.reach : total / 2;
  for (int s = 0; s < states; ++s) w.cost[s] = -32768;
  forward<Bits, Weights>(job, w, reach - 1, 2 * reach);
  int state = trace<Bits>(job, w, 2 * reach, reach, cheapest(w.cost, 0, states, 1), nullptr);
  // Window 0 must leave the bits that the last window looks ahead to: its low L - kv bits.
  const int seam = state & (q_count - 1);
  for (int s = 0; s < states; ++s) w.cost[s] = (s & (q_count - 1)) == seam ? -32768 : 32767;
  forward<Bits, Weights>(job, w, total - 1, total);
  trace<Bits>(job, w, total, 0, cheapest(w.cost, seam, states, q_count), w.bits);
  // Step i is window total - 1 - i; its bits stand at Bits * window.
  for (int i = 0; i < total * Bits / 8; ++i) codes[i] = 0;
  for (int p = 0; p < total; ++p) {
    int at = p * Bits;
    uint32_t value = static_cast<uint32_t>(w.bits[total - 1 - p]) << (at & 7);
    codes[at >> 3] |= static_cast<uint8_t>(value);
    if (value >> 8) codes[(at >> 3) + 1] |= static_cast<uint8_t>(value >> 8);
  }
}

void encode_tile_at(const EncodeJob& job, const float* x, uint8_t* codes, void* memory) {
  switch (job.rate) {
    case 1: return encode_tile<1, 2>(job, x, codes, memory);
    case 2: return encode_tile<2, 2>(job, x, codes, memory);
    case 3: return encode_tile<3, 2>(job, x, codes, memory);
    case 4: return encode_tile<4, 2>(job, x, codes, memory);
    case 5: return encode_tile<5, 2>(job, x, codes, memory);
    case 6: return encode_tile<3, 1>(job, x, codes, memory);
    default: return encode_tile<4, 1>(job, x, codes, memory);
  }
}

}  // namespace
