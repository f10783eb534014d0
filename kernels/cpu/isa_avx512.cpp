// AVX-512 (F, BW, DQ, VL): 32 lanes of int16, 16 of float32.
#include <utility>

#include "isa.h"

#if defined(__AVX512BW__)
#include <immintrin.h>

namespace {

constexpr int kLanes16 = 32;
typedef __m512i V16;

inline V16 load16(const int16_t* p) { return _mm512_loadu_si512(p); }
inline void store16(int16_t* p, V16 v) { _mm512_storeu_si512(p, v); }
inline V16 splat16(int16_t a) { return _mm512_set1_epi16(a); }
inline V16 min16(V16 a, V16 b) { return _mm512_min_epi16(a, b); }
inline V16 max16(V16 a, V16 b) { return _mm512_max_epi16(a, b); }
inline V16 sub16(V16 a, V16 b) { return _mm512_sub_epi16(a, b); }
inline V16 adds16(V16 a, V16 b) { return _mm512_adds_epi16(a, b); }
inline V16 subs16(V16 a, V16 b) { return _mm512_subs_epi16(a, b); }
inline V16 square16(V16 d) { return _mm512_mulhrs_epi16(d, d); }
inline int horizontal_min(V16 v) {
  __m256i half = _mm256_min_epi16(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
  __m128i low = _mm_min_epi16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  // The unsigned minimum of eight, with the sign bit flipped.
  low = _mm_minpos_epu16(_mm_xor_si128(low, _mm_set1_epi16(INT16_MIN)));
  return static_cast<int>(_mm_cvtsi128_si32(low) & 0xFFFF) - 32768;
}
inline uint32_t less_mask(const V16* a, const V16* b) { return _mm512_cmplt_epi16_mask(*a, *b); }
inline int mask_bit(int lane) { return lane; }

template <int Bits>
inline V16 expand_pattern() {
  alignas(64) int16_t lanes[32];
  for (int i = 0; i < 32; ++i) lanes[i] = static_cast<int16_t>(i >> Bits);
  return load16(lanes);
}
template <int Bits>
inline V16 expand(const int16_t* p, V16 pattern) {
  return _mm512_permutexvar_epi16(pattern, load16(p));
}

}  // namespace

#include "encode_impl.h"

namespace {
constexpr int kLanes = 16;
typedef uint32_t Words16 __attribute__((vector_size(64)));
inline Words16 and_xor(Words16 a, uint32_t mask, uint32_t flip) {
  return (Words16)_mm512_ternarylogic_epi32((__m512i)a, _mm512_set1_epi32(mask), _mm512_set1_epi32(flip), 0x6A);
}
}  // namespace
#define TQMOE_AND_XOR
#include "decode_impl.h"
#include "affine_impl.h"

namespace tqmoe {
const Kernels* avx512_kernels() {
  static const Kernels kernels = {"avx512", encode_tile_at, multiply_tile_any, decode_tile, rotate, affine_rows};
  static const bool here = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return here ? &kernels : nullptr;
}
}  // namespace tqmoe

#else
namespace tqmoe {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace tqmoe
#endif
