// The encoder: a Viterbi search for the circular bitstring of a 32 x 16 tile whose code lies nearest. After
// trellis_decode.metal. Same integers, same ties as kernels/cpu/encode_impl.h, so its codes are equal bit for bit.
//
//   x      f32 [tiles, 512], weights in the code's own units
//   units  f32 [3]: cost units of 1.0; the largest magnitude of a target in them; the next float above the units
//   codes  u8 [tiles, 64 KV], values f32 [tiles, 512] that they decode to  (KV bits a window; WEIGHTS 2: T2, 1: 3INST)
//   marks  u32 [tiles, 512 / WEIGHTS * Q / 32 * KV], scratch: decisions, KV bits for each of Q = 2^(L - KV), each step
//   best   i16 2 Q a tile, scratch: in threadgroup memory where it fits, else in device memory
//
// Grid: x = tiles x THREADS. One threadgroup encodes one tile. A step goes from window p + 1 to window p, because the
// decoder's window reads forward: s(p) = (s(p + 1) << KV | bits) mod 2^L. Of the 2^KV states q + j Q that lead to the
// states q << KV | bits the cheapest is kept: best[q]. The cost of a state is that of its best plus its own error, so
// only Q costs are stored, and each step reads the old half of `best` and writes the other. One barrier a step; the
// least cost is brought to -32768 by the next step's reads. A thread takes R consecutive q, which share a predecessor
// for each j; code weights are computed, as a table of 2^L of them would be read in every step. Two runs: a free one
// over the windows around the seam finds the bits that the last window shares with the first, then one over all windows
// with them fixed.

METAL_FUNC int rounded_square(int d) { return (d * d + 16384) >> 15; }

// A float of 1.5 * 2^23 + n has the bits of an int plus n, so adding this rounds to an integer without a conversion.
#define TQ_ROUND 12582912.0f

// The code's product of state s; the state's weights follow from it.
template <int WEIGHTS>
METAL_FUNC uint state_product(uint s) {
  return WEIGHTS == 2 ? s * 0xCBAC1FEDu : s * 89226354u + 64248484u;
}

// Error of a state's weights: 16-bit with saturation. x0, x1: targets plus the bits of TQ_ROUND. `unit` is the next
// float above the units: then halves are rounded away from zero, as on the CPU, for all states.
template <int WEIGHTS>
METAL_FUNC int state_error(uint product, float unit, int x0, int x1) {
  const half2 v = code_halves(product);
  if (WEIGHTS == 1) {
    const int d = as_type<int>(fma(float(v.x) + float(v.y), unit, TQ_ROUND)) - x0;
    return rounded_square(clamp(d, -32767, 32767));
  }
  const int d0 = as_type<int>(fma(float(v.x), unit, TQ_ROUND)) - x0;
  const int d1 = as_type<int>(fma(float(v.y), unit, TQ_ROUND)) - x1;
  return min(rounded_square(d0) + rounded_square(d1), 32767);
}

// Memory that the threads of a tile share.
template <int THREADS>
struct Shared {
  int target[512];              // plus the bits of TQ_ROUND
  uchar symbol[512];            // new bits of each window
  int least[2 * THREADS / 32];  // of each simdgroup, for odd and even steps
  uint key[THREADS / 32];
  uint state;
};

// `steps` windows from `first` down, circular; `seam` fixes the low bits of the state before, Q leaves it free. Returns
// how much the last step's costs stand above -32768.
template <int KV, int WEIGHTS, int L, int THREADS, typename Best>
METAL_FUNC int search(uint first, uint steps, uint seam, Best best, float unit, device uint* marks,
                      threadgroup Shared<THREADS>* shared, uint thread_index, ushort lane) {
  constexpr uint Q = 1u << (L - KV), total = 512 / WEIGHTS, R = KV == 1 ? 2 : 4;
  int amount = 0;
  for (uint step = 0; step < steps; ++step) {
    const uint window = (first + 1 + total - step) % total;  // of the step before
    const int x0 = shared->target[window * WEIGHTS], x1 = shared->target[window * WEIGHTS + WEIGHTS - 1];
    int least = 32767;
    for (uint q = R * thread_index; q < Q; q += R * THREADS) {
      int lowest[R];
      uint winner[R];
#pragma clang loop unroll(full)
      for (uint r = 0; r < R; ++r) {
        lowest[r] = step > 0 ? 32768 : seam < Q && q + r != seam ? 32767 : -32768;
        winner[r] = 0;
      }
      uint from = (1 - (step & 1)) * Q + (q >> KV), product = state_product<WEIGHTS>(q);
      for (uint j = 0; step > 0 && j < 1u << KV; ++j) {
        const int before = int(best[from]) - amount;
#pragma clang loop unroll(full)
        for (uint r = 0; r < R; ++r) {
          const uint own = product + (state_product<WEIGHTS>(r) - state_product<WEIGHTS>(0));
          const int cost = min(before + state_error<WEIGHTS>(own, unit, x0, x1), 32767);
          winner[r] = cost < lowest[r] ? j : winner[r];
          lowest[r] = min(cost, lowest[r]);
        }
        from += Q >> KV;
        product += state_product<WEIGHTS>(Q) - state_product<WEIGHTS>(0);
      }
      uint mine = 0;
#pragma clang loop unroll(full)
      for (uint r = 0; r < R; ++r) {
        best[(step & 1) * Q + q + r] = short(lowest[r]);
        least = min(least, lowest[r]);
#pragma clang loop unroll(full)
        for (uint b = 0; b < KV; ++b) {
          const uint mark = uint(ulong(simd_ballot((winner[r] >> b & 1) != 0)));
          mine = lane == r * KV + b ? mark : mine;
        }
      }
      if (lane < R * KV) marks[(step * (Q / 32) + q / (32 * R) * R) * KV + lane] = mine;
    }
    least = simd_min(least);
    threadgroup int* all = shared->least + (step & 1) * (THREADS / 32);
    if (lane == 0) all[thread_index / 32] = least;
    threadgroup_barrier(mem_flags::mem_device | mem_flags::mem_threadgroup);
    for (uint i = 0; i < THREADS / 32; ++i) least = min(least, all[i]);
    amount = min(least + 32768, 32767);
  }
  return amount;
}

// The cheapest state begin + i * stride after a search, the lowest of equals; the same in all threads.
template <int KV, int WEIGHTS, int L, int THREADS, typename Best>
METAL_FUNC uint cheapest(uint begin, uint stride, uint last_window, uint steps, int amount, Best best, float unit,
                         threadgroup Shared<THREADS>* shared, uint thread_index, ushort lane) {
  const int x0 = shared->target[last_window * WEIGHTS], x1 = shared->target[last_window * WEIGHTS + WEIGHTS - 1];
  const uint half_of_best = ((steps - 1) & 1) << (L - KV);
  uint key = 0xFFFFFFFFu;
  for (uint s = begin + thread_index * stride; s < 1u << L; s += THREADS * stride) {
    const int error = state_error<WEIGHTS>(state_product<WEIGHTS>(s), unit, x0, x1);
    const int cost = min(int(best[half_of_best + (s >> KV)]) - amount + error, 32767);
    key = min(key, uint(cost + 32768) << 16 | s);
  }
  key = simd_min(key);
  if (lane == 0) shared->key[thread_index / 32] = key;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint i = 0; i < THREADS / 32; ++i) key = min(key, shared->key[i]);
  return key & 0xFFFFu;
}

// The state before step `stop` of a search that ends in `state`; each step's new bits go to the symbols if `keep`.
template <int KV, int WEIGHTS, int L, int THREADS>
METAL_FUNC uint walk_back(uint state, uint steps, uint stop, bool keep, const device uint* marks,
                          threadgroup Shared<THREADS>* shared) {
  constexpr uint Q = 1u << (L - KV), total = 512 / WEIGHTS, R = KV == 1 ? 2 : 4;
  for (uint step = steps; step-- > stop;) {
    if (keep) shared->symbol[total - 1 - step] = uchar(state & ((1u << KV) - 1));
    const uint q = state >> KV;
    const device uint* word = marks + (step * (Q / 32) + q / (32 * R) * R + q % R) * KV;
    uint winner = 0;
    for (uint b = 0; b < KV; ++b) winner |= (word[b] >> (q / R & 31) & 1) << b;
    state = q + winner * Q;
  }
  return state;
}

template <int KV, int WEIGHTS, int L, int THREADS, typename Best, typename Units>
METAL_FUNC void trellis_viterbi(const device float* x, Units units, device uchar* codes, device float* values,
                                device uint* marks, Best best, threadgroup Shared<THREADS>* shared, uint tile,
                                uint thread_index, ushort lane) {
  constexpr uint Q = 1u << (L - KV), total = 512 / WEIGHTS, reach = 8 * L / KV < total / 2 ? 8 * L / KV : total / 2;
  device uint* mine = marks + ulong(tile) * (total * (Q / 32) * KV);
  for (uint i = thread_index; i < 512; i += THREADS) {
    const float v = clamp(x[512 * tile + i] * units[0], -units[1], units[1]);
    shared->target[i] = int(v < 0.0f ? v - 0.5f : v + 0.5f) + as_type<int>(TQ_ROUND);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  // Survivors of a search have merged after some constraint lengths: `reach` windows on both sides of the seam.
  int amount =
      search<KV, WEIGHTS, L, THREADS>(reach - 1, 2 * reach, Q, best, units[2], mine, shared, thread_index, lane);
  uint state = cheapest<KV, WEIGHTS, L, THREADS>(0, 1, total - reach, 2 * reach, amount, best, units[2], shared,
                                                 thread_index, lane);
  if (thread_index == 0) {
    shared->state = walk_back<KV, WEIGHTS, L, THREADS>(state, 2 * reach, reach, false, mine, shared);
  }
  threadgroup_barrier(mem_flags::mem_device | mem_flags::mem_threadgroup);
  const uint seam = shared->state & (Q - 1);
  amount = search<KV, WEIGHTS, L, THREADS>(total - 1, total, seam, best, units[2], mine, shared, thread_index, lane);
  state = cheapest<KV, WEIGHTS, L, THREADS>(seam, Q, 0, total, amount, best, units[2], shared, thread_index, lane);
  if (thread_index == 0) walk_back<KV, WEIGHTS, L, THREADS>(state, total, 0, true, mine, shared);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  constexpr uint bytes = total * KV / 8;
  for (uint i = thread_index; i < bytes; i += THREADS) {
    uint byte = 0;
    for (uint b = 0; b < 8; ++b) byte |= uint(shared->symbol[(8 * i + b) / KV] >> ((8 * i + b) % KV) & 1) << b;
    codes[tile * bytes + i] = uchar(byte);
  }
  for (uint p = thread_index; p < total; p += THREADS) {
    uint s = 0;
    for (uint i = 0; i * KV < L; ++i) s |= uint(shared->symbol[(p + i) % total]) << (i * KV);
    s &= (1u << L) - 1;
    const half2 v = code_halves(state_product<WEIGHTS>(s));
    values[512 * tile + p * WEIGHTS] = WEIGHTS == 2 ? float(v.x) : float(v.x) + float(v.y);
    if (WEIGHTS == 2) values[512 * tile + 2 * p + 1] = float(v.y);
  }
}
