// The encoder's tables and its work over many tiles; the search itself is encode_impl.h.
#include <cmath>
#include <memory>
#include <vector>

#include "library.h"

namespace tqmoe {
namespace {

// Cost units: a squared distance d^2 becomes (d * units)^2 / 2^15. Fine units round less, coarse ones leave room:
// targets beyond the clip lose their weight against their neighbours. T2 weights reach 2.0, so no difference of theirs
// overflows; 3INST weights reach 4.0, differences saturate at 5.5. A cost range of 2^16 is a squared error of 97 (59
// for 3INST), where a step of the best path adds 1.0 at most. On Gaussian tiles these are within 0.001 dB of a search
// in float32.
constexpr float kT2Units = 4700.0f, kT2Clip = 32767.0f - 2 * kT2Units;
constexpr float kInst3Units = 6000.0f, kInst3Clip = 32767.0f;

// Survivors of a Viterbi search have merged after some constraint lengths: 8 cost 0.005 dB less than 6, and 0.002 dB
// more than half of the tile.
int merging_windows(int rate, int length) { return 8 * length / step_bits(rate); }

}  // namespace

void encode_tiles(const float* x, int64_t tiles, int rate, int length, uint8_t* codes, float* values) {
  const bool inst3 = is_inst3(rate);
  const int states = 1 << length, weights = step_weights(rate), row_bytes = part_bytes(rate);
  EncodeJob job{
      rate, length, merging_windows(rate, length), inst3 ? kInst3Units : kT2Units, inst3 ? kInst3Clip : kT2Clip, {}};
  std::vector<int16_t> code(static_cast<size_t>(weights) * states);
  std::vector<float> value(code.size());
  for (int s = 0; s < states; ++s) {
    state_weights(s, inst3, &value[static_cast<size_t>(weights) * s]);
    for (int i = 0; i < weights; ++i) {
      code[static_cast<size_t>(i) * states + s] = static_cast<int16_t>(std::lround(value[weights * s + i] * job.units));
    }
  }
  job.code[0] = code.data();
  job.code[1] = code.data() + (weights - 1) * static_cast<size_t>(states);

  Turn turn;
  const size_t memory = static_cast<size_t>(encode_memory(length));
  std::unique_ptr<uint8_t[]> scratch(new uint8_t[memory * turn.threads() + 64]);
  uint8_t* aligned = scratch.get() + (64 - reinterpret_cast<uintptr_t>(scratch.get()) % 64) % 64;
  const Kernels& kernels = active_kernels();
  turn.each(tiles, [&](int64_t tile, int thread) {
    uint8_t* bits = codes + tile * kRowTile * row_bytes;
    kernels.encode_tile(job, x + tile * kTileWeights, bits, aligned + memory * thread);
    // What the decoder will see, whatever the search believed.
    const int step = step_bits(rate), total = tile_steps(rate), size = kRowTile * row_bytes;
    for (int p = 0; p < total; ++p) {
      uint32_t window = 0;
      for (int i = 0; i < 3; ++i) window |= static_cast<uint32_t>(bits[(p * step / 8 + i) % size]) << (8 * i);
      const uint32_t state = window >> (p * step % 8) & (states - 1);
      std::memcpy(values + tile * kTileWeights + p * weights, &value[static_cast<size_t>(weights) * state],
                  4 * weights);
    }
  });
}

}  // namespace tqmoe
