// NEON (every 64-bit ARM): 8 lanes of int16, 4 of float32.
#include <utility>

#include "isa.h"

#if defined(__aarch64__) && defined(__ARM_NEON)
#include <arm_neon.h>

namespace {

constexpr int kLanes16 = 8;
typedef int16x8_t V16;

inline V16 load16(const int16_t* p) { return vld1q_s16(p); }
inline void store16(int16_t* p, V16 v) { vst1q_s16(p, v); }
inline V16 splat16(int16_t a) { return vdupq_n_s16(a); }
inline V16 min16(V16 a, V16 b) { return vminq_s16(a, b); }
inline V16 max16(V16 a, V16 b) { return vmaxq_s16(a, b); }
inline V16 sub16(V16 a, V16 b) { return vsubq_s16(a, b); }
inline V16 adds16(V16 a, V16 b) { return vqaddq_s16(a, b); }
inline V16 subs16(V16 a, V16 b) { return vqsubq_s16(a, b); }
inline V16 square16(V16 d) { return vqrdmulhq_s16(d, d); }
inline int horizontal_min(V16 v) { return vminvq_s16(v); }

inline uint8x16_t less_bytes(const V16* a, const V16* b) {
  return vuzp1q_u8(vreinterpretq_u8_u16(vcltq_s16(a[0], b[0])), vreinterpretq_u8_u16(vcltq_s16(a[1], b[1])));
}
// Each byte keeps its own bit; three pairwise sums gather eight bytes into one.
inline uint32_t less_mask(const V16* a, const V16* b) {
  const uint8x16_t weight = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
  uint8x16_t sum = vpaddq_u8(vandq_u8(less_bytes(a, b), weight), vandq_u8(less_bytes(a + 2, b + 2), weight));
  sum = vpaddq_u8(sum, sum);
  sum = vpaddq_u8(sum, sum);
  return vgetq_lane_u32(vreinterpretq_u32_u8(sum), 0);
}
inline int mask_bit(int lane) { return lane; }

template <int Bits>
inline int expand_pattern() {
  return 0;
}
template <int Bits>
inline V16 expand(const int16_t* p, int) {
  if constexpr (Bits == 1) return vzip1q_s16(vld1q_s16(p), vld1q_s16(p));
  if constexpr (Bits == 2) {
    int16x8_t pairs = vzip1q_s16(vld1q_s16(p), vld1q_s16(p));
    return vzip1q_s16(pairs, pairs);  // a a a a b b b b
  }
  return vld1q_dup_s16(p);
}

}  // namespace

#include "encode_impl.h"

namespace {
constexpr int kLanes = 4;
}
#include "decode_impl.h"
#include "affine_impl.h"

namespace tqmoe {
const Kernels* neon_kernels() {
  static const Kernels kernels = {"neon", encode_tile_at, multiply_tile_any, decode_tile, rotate, affine_rows};
  return &kernels;
}
}  // namespace tqmoe

#else
namespace tqmoe {
const Kernels* neon_kernels() { return nullptr; }
}  // namespace tqmoe
#endif
