// Scalars, vectors with Metal's constructors, as_type, limits and traits.
#pragma once

typedef _Float16 half;
typedef __bf16 bfloat;
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef __SIZE_TYPE__ size_t;
typedef __PTRDIFF_TYPE__ ptrdiff_t;

constexpr half operator""h(long double v) { return (half)v; }
constexpr half operator""h(unsigned long long v) { return (half)v; }
constexpr half operator"" H(long double v) { return (half)v; }
constexpr bfloat operator"" bf(long double v) { return (bfloat)(float)v; }

#define MTL_VECTORS(T)                                \
  typedef T T##2 __attribute__((ext_vector_type(2))); \
  typedef T T##3 __attribute__((ext_vector_type(3))); \
  typedef T T##4 __attribute__((ext_vector_type(4)));
MTL_VECTORS(char)
MTL_VECTORS(uchar)
MTL_VECTORS(short)
MTL_VECTORS(ushort)
MTL_VECTORS(int)
MTL_VECTORS(uint)
MTL_VECTORS(long)
MTL_VECTORS(ulong)
MTL_VECTORS(float)
MTL_VECTORS(half)
MTL_VECTORS(bfloat)
MTL_VECTORS(bool)
#undef MTL_VECTORS

// Code of the emulator itself inside a kernel: neither checked nor counted.
#define MTL_HIDDEN __attribute__((no_sanitize("thread", "undefined", "float-cast-overflow", "coverage")))
#define MTL_INLINE __attribute__((always_inline)) inline

namespace metal {
template <class T, int N>
using vec = T __attribute__((ext_vector_type(N)));

template <class V>
struct mtl_vector {
  static constexpr int size = 1;
  using element = V;
};
template <class T, int N>
struct mtl_vector<T __attribute__((ext_vector_type(N)))> {
  static constexpr int size = N;
  using element = T;
};
template <class V>
constexpr int mtl_size = mtl_vector<V>::size;
template <class V>
using mtl_element = typename mtl_vector<V>::element;

template <class V, class A>
MTL_INLINE void mtl_put(V& out, int& at, A part) {
  if constexpr (mtl_size<A> == 1)
    out[at++] = (mtl_element<V>)part;
  else
    for (int i = 0; i < mtl_size<A>; i++) out[at++] = (mtl_element<V>)part[i];
}
// float4(a, b2, c): spaces.h makes the type's name a macro that calls this.
template <class V, class... A>
MTL_INLINE V mtl_make(A... parts) {
  V out;
  if constexpr (sizeof...(A) == 1 && ((mtl_size<A> == 1) && ...)) {
    ((out = (V)(mtl_element<V>)parts), ...);
  } else {
    static_assert((mtl_size<A> + ... + 0) == mtl_size<V>, "Metal: wrong number of components for this vector");
    int at = 0;
    (mtl_put(out, at, parts), ...);
  }
  return out;
}

template <class T>
struct mtl_packed3 {
  T x, y, z;
  mtl_packed3() = default;
  mtl_packed3(vec<T, 3> v) : x(v[0]), y(v[1]), z(v[2]) {}
  operator vec<T, 3>() const { return (vec<T, 3>){x, y, z}; }
};

using std::bool_constant;
using std::conditional;
using std::conditional_t;
using std::enable_if;
using std::enable_if_t;
using std::false_type;
using std::integral_constant;
using std::is_floating_point;
using std::is_floating_point_v;
using std::is_integral;
using std::is_integral_v;
using std::is_same;
using std::is_same_v;
using std::is_signed;
using std::is_signed_v;
using std::is_unsigned;
using std::is_unsigned_v;
using std::make_signed_t;
using std::make_unsigned_t;
using std::remove_cv_t;
using std::remove_reference_t;
using std::true_type;
template <class T>
using remove_addrspace_t = std::remove_cv_t<T>;

template <class T>
struct numeric_limits;
#define MTL_INTEGER_LIMITS(T, low, high)                      \
  template <>                                                 \
  struct numeric_limits<T> {                                  \
    static constexpr T min() { return low; }                  \
    static constexpr T max() { return high; }                 \
    static constexpr T lowest() { return low; }               \
    static constexpr int digits = sizeof(T) * 8 - (low != 0); \
  };
MTL_INTEGER_LIMITS(int8_t, -128, 127)
MTL_INTEGER_LIMITS(uint8_t, 0, 255)
MTL_INTEGER_LIMITS(int16_t, -32768, 32767)
MTL_INTEGER_LIMITS(uint16_t, 0, 65535)
MTL_INTEGER_LIMITS(int32_t, -2147483647 - 1, 2147483647)
MTL_INTEGER_LIMITS(uint32_t, 0, 0xffffffffu)
MTL_INTEGER_LIMITS(int64_t, -9223372036854775807L - 1, 9223372036854775807L)
MTL_INTEGER_LIMITS(uint64_t, 0, ~0ul)
#undef MTL_INTEGER_LIMITS
#define MTL_FLOAT_LIMITS(T, high, small)                             \
  template <>                                                        \
  struct numeric_limits<T> {                                         \
    static constexpr T min() { return (T)small; }                    \
    static constexpr T max() { return (T)high; }                     \
    static constexpr T lowest() { return (T) - high; }               \
    static constexpr T infinity() { return (T)__builtin_inff(); }    \
    static constexpr T quiet_NaN() { return (T)__builtin_nanf(""); } \
  };
MTL_FLOAT_LIMITS(float, 3.402823466e38f, 1.17549435e-38f)
MTL_FLOAT_LIMITS(half, 65504.0f, 6.103515625e-05f)
MTL_FLOAT_LIMITS(bfloat, 3.38953139e38f, 1.17549435e-38f)
#undef MTL_FLOAT_LIMITS
}  // namespace metal

typedef metal::mtl_packed3<float> packed_float3;
typedef metal::mtl_packed3<half> packed_half3;

template <class To, class From>
MTL_INLINE To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "Metal: as_type needs types of the same size");
  return __builtin_bit_cast(To, from);
}
