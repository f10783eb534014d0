// Constants of the trellis codec (docs/FORMAT.md, section 4) and the few scalar functions that every path shares.
// Nothing here allocates or uses the standard library's templates: the instruction-set files include it.
#pragma once
#include <cstdint>
#include <cstring>

namespace tqmoe {

constexpr int kRowTile = 32;       // rows of a tile; also the lanes of a plane
constexpr int kTileColumns = 16;   // columns of a tile, which share one block gain
constexpr int kBlockColumns = 64;  // columns of a superblock, which share one rate
constexpr int kTileWeights = kRowTile * kTileColumns;
constexpr int kRates = 8;
constexpr int kPlanes[kRates] = {0, 1, 2, 3, 4, 5, 6, 8};  // u32 words per row and 64 columns

constexpr uint32_t kT2Multiplier = 0xCBAC1FEDu;
constexpr uint32_t kInst3Multiplier = 89226354u, kInst3Addend = 64248484u;
constexpr uint32_t kHalvesMask = 0x8FFF8FFFu, kHalvesXor = 0x3B603B60u;

static constexpr bool is_inst3(int rate) { return rate >= 6; }
static constexpr int step_bits(int rate) { return is_inst3(rate) ? rate - 3 : rate; }  // bits that a window advances
static constexpr int step_weights(int rate) { return is_inst3(rate) ? 1 : 2; }         // weights that a window gives
static constexpr int tile_steps(int rate) { return kTileWeights / step_weights(rate); }
static constexpr int part_bytes(int rate) { return kPlanes[rate]; }  // of one row of one tile

// The float of a half that is finite: all the halves of this format are checked for that before use.
static inline float half_to_float(uint32_t h) {
  uint32_t sign = (h & 0x8000u) << 16, magnitude = h & 0x7FFFu, bits;
  if (magnitude >= 0x0400u) {
    bits = sign | ((magnitude << 13) + 0x38000000u);
  } else {  // zero or subnormal: magnitude / 2^24 is exact
    float value = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
    std::memcpy(&bits, &value, 4);
    bits |= sign;
  }
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

static inline uint32_t load_u16(const uint8_t* p) { return p[0] | static_cast<uint32_t>(p[1]) << 8; }
static inline float load_half(const uint8_t* p) { return half_to_float(load_u16(p)); }

// The weights of one state: two for T2, one for 3INST.
static inline void state_weights(uint32_t state, bool inst3, float* out) {
  uint32_t product = inst3 ? state * kInst3Multiplier + kInst3Addend : state * kT2Multiplier;
  uint32_t v = (product & kHalvesMask) ^ kHalvesXor;
  float low = half_to_float(v & 0xFFFFu), high = half_to_float(v >> 16);
  out[0] = inst3 ? low + high : low;
  if (!inst3) out[1] = high;
}

}  // namespace tqmoe
