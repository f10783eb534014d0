// int16 operations of the encoder with the compiler's vector extension: any machine that GCC or Clang knows.
#pragma once
#include <cstdint>
#include <cstring>

namespace {

constexpr int kLanes16 = 8;
typedef int16_t V16 __attribute__((vector_size(16)));
typedef int32_t V32 __attribute__((vector_size(32)));

inline V16 load16(const int16_t* p) {
  V16 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store16(int16_t* p, V16 v) { std::memcpy(p, &v, sizeof v); }
inline V16 splat16(int16_t a) { return V16{a, a, a, a, a, a, a, a}; }
inline V16 pick16(V16 mask, V16 yes, V16 no) { return (mask & yes) | (~mask & no); }
inline V16 min16(V16 a, V16 b) { return pick16(a < b, a, b); }
inline V16 max16(V16 a, V16 b) { return pick16(a > b, a, b); }
inline V16 wrap_add(V16 a, V16 b) {  // signed overflow would be undefined
  typedef uint16_t U16 __attribute__((vector_size(16)));
  return (V16)((U16)a + (U16)b);
}
inline V16 sub16(V16 a, V16 b) {
  typedef uint16_t U16 __attribute__((vector_size(16)));
  return (V16)((U16)a - (U16)b);
}
inline V16 adds16(V16 a, V16 b) {  // b is never negative here
  V16 sum = wrap_add(a, b);
  return pick16(sum < a, splat16(32767), sum);
}
inline V16 subs16(V16 a, V16 b) {
  V16 difference = sub16(a, b), overflow = ((a ^ b) & (a ^ difference)) < splat16(0);
  return pick16(overflow, (a >> 15) ^ splat16(32767), difference);
}
inline V16 square16(V16 d) {  // rounded d * d / 2^15
  V32 wide = __builtin_convertvector(d, V32);
  wide = (wide * wide + 16384) >> 15;
  return __builtin_convertvector(wide, V16);
}
inline int horizontal_min(V16 v) {
  int least = v[0];
  for (int i = 1; i < kLanes16; ++i) least = v[i] < least ? v[i] : least;
  return least;
}

template <int Bits>
inline int expand_pattern() {
  return 0;
}
// Lane i is p[i >> Bits].
template <int Bits>
inline V16 expand(const int16_t* p, int) {
  if constexpr (Bits == 1) return V16{p[0], p[0], p[1], p[1], p[2], p[2], p[3], p[3]};
  if constexpr (Bits == 2) return V16{p[0], p[0], p[0], p[0], p[1], p[1], p[1], p[1]};
  return splat16(*p);
}

inline uint32_t less_half(V16 a0, V16 b0, V16 a1, V16 b1) {
  const V16 low = {1, 2, 4, 8, 16, 32, 64, 128};
  const V16 high = {256, 512, 1024, 2048, 4096, 8192, 16384, INT16_MIN};
  V16 both = ((a0 < b0) & low) | ((a1 < b1) & high);
  uint64_t words[2];
  std::memcpy(words, &both, 16);
  uint64_t w = words[0] | words[1];
  w |= w >> 32;
  return static_cast<uint32_t>((w | w >> 16) & 0xFFFF);
}
// Bit i of 32: a < b in lane i.
inline uint32_t less_mask(const V16* a, const V16* b) {
  return less_half(a[0], b[0], a[1], b[1]) | less_half(a[2], b[2], a[3], b[3]) << 16;
}
inline int mask_bit(int lane) { return lane; }

}  // namespace
