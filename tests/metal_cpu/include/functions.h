// Math, integer and common functions, on scalars and vectors. Float functions evaluate in float32 and round once to the
// type.
#pragma once

namespace metal {
#define MTL_MATH_1(name, call)                                                                                \
  template <class T>                                                                                          \
  inline T name(T v) {                                                                                        \
    static_assert(!std::is_integral_v<mtl_element<T>>, "Metal: a float function of an integer is ambiguous"); \
    if constexpr (mtl_size<T> == 1) {                                                                         \
      float x = (float)v;                                                                                     \
      return (T)(call);                                                                                       \
    } else {                                                                                                  \
      T out;                                                                                                  \
      for (int i = 0; i < mtl_size<T>; i++) {                                                                 \
        float x = (float)v[i];                                                                                \
        out[i] = (mtl_element<T>)(call);                                                                      \
      }                                                                                                       \
      return out;                                                                                             \
    }                                                                                                         \
  }
#define MTL_TRANSCENDENTALS              \
  MTL_MATH_1(exp, __builtin_expf(x))     \
  MTL_MATH_1(exp2, __builtin_exp2f(x))   \
  MTL_MATH_1(exp10, __builtin_exp10f(x)) \
  MTL_MATH_1(log, __builtin_logf(x))     \
  MTL_MATH_1(log2, __builtin_log2f(x))   \
  MTL_MATH_1(log10, __builtin_log10f(x)) \
  MTL_MATH_1(sin, __builtin_sinf(x))     \
  MTL_MATH_1(cos, __builtin_cosf(x))     \
  MTL_MATH_1(tan, __builtin_tanf(x))     \
  MTL_MATH_1(sinh, __builtin_sinhf(x))   \
  MTL_MATH_1(cosh, __builtin_coshf(x))   \
  MTL_MATH_1(tanh, __builtin_tanhf(x))   \
  MTL_MATH_1(asin, __builtin_asinf(x))   \
  MTL_MATH_1(acos, __builtin_acosf(x))   \
  MTL_MATH_1(atan, __builtin_atanf(x))   \
  MTL_MATH_1(sqrt, __builtin_sqrtf(x))   \
  MTL_MATH_1(rsqrt, 1.0f / __builtin_sqrtf(x))
MTL_TRANSCENDENTALS
namespace precise {
MTL_TRANSCENDENTALS
}
namespace fast {
MTL_TRANSCENDENTALS
}
MTL_MATH_1(floor, __builtin_floorf(x))
MTL_MATH_1(ceil, __builtin_ceilf(x))
MTL_MATH_1(trunc, __builtin_truncf(x))
MTL_MATH_1(rint, __builtin_rintf(x))
MTL_MATH_1(round, __builtin_roundf(x))
MTL_MATH_1(fabs, __builtin_fabsf(x))
MTL_MATH_1(fract, x - __builtin_floorf(x))
MTL_MATH_1(sign, x > 0 ? 1.0f : x < 0 ? -1.0f : x)
#undef MTL_TRANSCENDENTALS
#undef MTL_MATH_1

template <class T>
inline T abs(T v) {
  if constexpr (mtl_size<T> > 1) {
    T out;
    for (int i = 0; i < mtl_size<T>; i++) out[i] = metal::abs((mtl_element<T>)v[i]);
    return out;
  } else if constexpr (std::is_integral_v<T>) {
    return (T)(v < 0 ? -v : v);
  } else {
    return fabs(v);
  }
}
#define MTL_MATH_2(name, scalar)                                                                              \
  template <class T>                                                                                          \
  inline T name(T a, T b) {                                                                                   \
    if constexpr (mtl_size<T> == 1) {                                                                         \
      return scalar;                                                                                          \
    } else {                                                                                                  \
      T out;                                                                                                  \
      for (int i = 0; i < mtl_size<T>; i++) out[i] = metal::name((mtl_element<T>)a[i], (mtl_element<T>)b[i]); \
      return out;                                                                                             \
    }                                                                                                         \
  }
MTL_MATH_2(min, b < a ? b : a)
MTL_MATH_2(max, a < b ? b : a)
MTL_MATH_2(fmin, a != a || b < a ? b : a)
MTL_MATH_2(fmax, a != a || a < b ? b : a)
#undef MTL_MATH_2
template <class T>
inline T clamp(T v, T low, T high) {
  return metal::min(metal::max(v, low), high);
}
template <class T>
inline T select(T a, T b, bool second) {
  return second ? b : a;
}

inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline half fma(half a, half b, half c) { return __builtin_fmaf16(a, b, c); }
inline bfloat fma(bfloat a, bfloat b, bfloat c) { return (bfloat)__builtin_fmaf((float)a, (float)b, (float)c); }
template <class T, class = std::enable_if_t<(mtl_size<T> > 1)>>
inline T fma(T a, T b, T c) {
  T out;
  for (int i = 0; i < mtl_size<T>; i++)
    out[i] = metal::fma((mtl_element<T>)a[i], (mtl_element<T>)b[i], (mtl_element<T>)c[i]);
  return out;
}
inline float pow(float a, float b) { return __builtin_powf(a, b); }
inline float atan2(float a, float b) { return __builtin_atan2f(a, b); }
inline float fmod(float a, float b) { return __builtin_fmodf(a, b); }
inline float ldexp(float a, int e) { return __builtin_ldexpf(a, e); }
inline float copysign(float a, float b) { return __builtin_copysignf(a, b); }
template <class T>
inline T mix(T a, T b, T t) {
  return a + (b - a) * t;
}
template <class T>
inline bool isnan(T v) {
  return v != v;
}
template <class T>
inline bool isinf(T v) {
  return __builtin_isinf((float)v);
}
template <class T>
inline bool isfinite(T v) {
  return __builtin_isfinite((float)v);
}
template <class T>
inline mtl_element<T> dot(T a, T b) {
  mtl_element<T> sum = 0;
  for (int i = 0; i < mtl_size<T>; i++) sum += a[i] * b[i];
  return sum;
}
inline bool all(bool v) { return v; }
inline bool any(bool v) { return v; }

template <class T>
constexpr uint mtl_bits = 8 * sizeof(T);
template <class T>
inline T popcount(T v) {
  return (T)__builtin_popcountll((uint64_t)(std::make_unsigned_t<T>)v);
}
template <class T>
inline T clz(T v) {
  return v ? (T)(__builtin_clzll((uint64_t)(std::make_unsigned_t<T>)v) - (64 - mtl_bits<T>)) : (T)mtl_bits<T>;
}
template <class T>
inline T ctz(T v) {
  return v ? (T)__builtin_ctzll((uint64_t)(std::make_unsigned_t<T>)v) : (T)mtl_bits<T>;
}
template <class T>
inline T reverse_bits(T v) {
  T out = 0;
  for (uint i = 0; i < mtl_bits<T>; i++) out = (T)(out << 1 | (v >> i & 1));
  return out;
}
template <class T>
inline T extract_bits(T v, uint offset, uint bits) {
  if (offset + bits > mtl_bits<T>) mtl_undefined("extract_bits: offset + bits exceed the width");
  if (bits == 0 || offset + bits > mtl_bits<T>) return 0;
  return (T)((T)(v << (mtl_bits<T> - offset - bits)) >> (mtl_bits<T> - bits));
}
template <class T>
inline T insert_bits(T base, T insert, uint offset, uint bits) {
  if (offset + bits > mtl_bits<T>) mtl_undefined("insert_bits: offset + bits exceed the width");
  if (bits == 0 || offset + bits > mtl_bits<T>) return base;
  T mask = (T)((bits == mtl_bits<T> ? ~T(0) : (T)((T(1) << bits) - 1)) << offset);
  return (T)((base & ~mask) | ((T)(insert << offset) & mask));
}
template <class T>
inline T rotate(T v, T by) {
  by &= mtl_bits<T> - 1;
  return by ? (T)(v << by | v >> (mtl_bits<T> - by)) : v;
}
inline uint mulhi(uint a, uint b) { return (uint)(((uint64_t)a * b) >> 32); }
inline int mulhi(int a, int b) { return (int)(((int64_t)a * b) >> 32); }
inline ushort mulhi(ushort a, ushort b) { return (ushort)(((uint)a * b) >> 16); }
template <class T>
inline T mad24(T a, T b, T c) {
  return a * b + c;
}
template <class T>
inline T mul24(T a, T b) {
  return a * b;
}
}  // namespace metal
