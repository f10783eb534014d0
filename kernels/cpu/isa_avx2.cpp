// AVX2 with FMA and F16C: 16 lanes of int16, 8 of float32.
#include <utility>

#include "isa.h"

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>

namespace {

constexpr int kLanes16 = 16;
typedef __m256i V16;

inline V16 load16(const int16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline void store16(int16_t* p, V16 v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
inline V16 splat16(int16_t a) { return _mm256_set1_epi16(a); }
inline V16 min16(V16 a, V16 b) { return _mm256_min_epi16(a, b); }
inline V16 max16(V16 a, V16 b) { return _mm256_max_epi16(a, b); }
inline V16 sub16(V16 a, V16 b) { return _mm256_sub_epi16(a, b); }
inline V16 adds16(V16 a, V16 b) { return _mm256_adds_epi16(a, b); }
inline V16 subs16(V16 a, V16 b) { return _mm256_subs_epi16(a, b); }
inline V16 square16(V16 d) { return _mm256_mulhrs_epi16(d, d); }
inline int horizontal_min(V16 v) {
  __m128i low = _mm_min_epi16(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  low = _mm_minpos_epu16(_mm_xor_si128(low, _mm_set1_epi16(INT16_MIN)));
  return static_cast<int>(_mm_cvtsi128_si32(low) & 0xFFFF) - 32768;
}
// The pack works within 128-bit halves: it leaves lanes 8 to 15 and 16 to 23 in each other's place, mask_bit says so.
inline uint32_t less_mask(const V16* a, const V16* b) {
  __m256i packed = _mm256_packs_epi16(_mm256_cmpgt_epi16(b[0], a[0]), _mm256_cmpgt_epi16(b[1], a[1]));
  return static_cast<uint32_t>(_mm256_movemask_epi8(packed));
}
inline int mask_bit(int lane) { return (lane ^ lane >> 1) & 8 ? lane ^ 24 : lane; }

template <int Bits>
inline V16 expand_pattern() {
  alignas(32) int8_t bytes[32];
  for (int i = 0; i < 32; ++i) bytes[i] = static_cast<int8_t>(2 * (i / 2 >> Bits) + i % 2);
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(bytes));
}
template <int Bits>
inline V16 expand(const int16_t* p, V16 pattern) {  // at most eight words spread over sixteen lanes
  __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(words), pattern);
}

}  // namespace

#include "encode_impl.h"

namespace {
constexpr int kLanes = 8;
}
#include "decode_impl.h"
#include "affine_impl.h"

namespace tqmoe {
const Kernels* avx2_kernels() {
  static const Kernels kernels = {"avx2", encode_tile_at, multiply_tile_any, decode_tile, rotate, affine_rows};
  static const bool here = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return here ? &kernels : nullptr;
}
}  // namespace tqmoe

#else
namespace tqmoe {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace tqmoe
#endif
