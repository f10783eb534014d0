// Metal's keywords. The rewriter (../source.py) turns `threadgroup T name[n];` into MTL_THREADGROUP_ARRAY.
#pragma once

#ifdef MTL_ADDRESS_SPACES
#define device __attribute__((address_space(1)))
#define constant const __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
extern "C" threadgroup char* mtl_some_threadgroup_memory();
#define MTL_THREADGROUP_ARRAY(T, name, extents) \
  typedef T name##_mtl_type extents;            \
  threadgroup name##_mtl_type& name = *(threadgroup name##_mtl_type*)mtl_some_threadgroup_memory();
#else
#define device
#define constant const
#define threadgroup
#define MTL_THREADGROUP_ARRAY(T, name, extents)           \
  typedef std::remove_const_t<T> name##_mtl_type extents; \
  name##_mtl_type& name = *(name##_mtl_type*)mtl_threadgroup_array(#name, __COUNTER__, sizeof(name##_mtl_type));
#endif
#define thread
#define kernel
#define METAL_FUNC inline __attribute__((always_inline))
#define __METAL__ 1
#define __METAL_VERSION__ 320

// float4(a, b) constructs; a plain `float4` stays the type.
#define char2(...) metal::mtl_make<char2>(__VA_ARGS__)
#define char3(...) metal::mtl_make<char3>(__VA_ARGS__)
#define char4(...) metal::mtl_make<char4>(__VA_ARGS__)
#define uchar2(...) metal::mtl_make<uchar2>(__VA_ARGS__)
#define uchar3(...) metal::mtl_make<uchar3>(__VA_ARGS__)
#define uchar4(...) metal::mtl_make<uchar4>(__VA_ARGS__)
#define short2(...) metal::mtl_make<short2>(__VA_ARGS__)
#define short3(...) metal::mtl_make<short3>(__VA_ARGS__)
#define short4(...) metal::mtl_make<short4>(__VA_ARGS__)
#define ushort2(...) metal::mtl_make<ushort2>(__VA_ARGS__)
#define ushort3(...) metal::mtl_make<ushort3>(__VA_ARGS__)
#define ushort4(...) metal::mtl_make<ushort4>(__VA_ARGS__)
#define int2(...) metal::mtl_make<int2>(__VA_ARGS__)
#define int3(...) metal::mtl_make<int3>(__VA_ARGS__)
#define int4(...) metal::mtl_make<int4>(__VA_ARGS__)
#define uint2(...) metal::mtl_make<uint2>(__VA_ARGS__)
#define uint3(...) metal::mtl_make<uint3>(__VA_ARGS__)
#define uint4(...) metal::mtl_make<uint4>(__VA_ARGS__)
#define long2(...) metal::mtl_make<long2>(__VA_ARGS__)
#define long3(...) metal::mtl_make<long3>(__VA_ARGS__)
#define long4(...) metal::mtl_make<long4>(__VA_ARGS__)
#define ulong2(...) metal::mtl_make<ulong2>(__VA_ARGS__)
#define ulong3(...) metal::mtl_make<ulong3>(__VA_ARGS__)
#define ulong4(...) metal::mtl_make<ulong4>(__VA_ARGS__)
#define float2(...) metal::mtl_make<float2>(__VA_ARGS__)
#define float3(...) metal::mtl_make<float3>(__VA_ARGS__)
#define float4(...) metal::mtl_make<float4>(__VA_ARGS__)
#define half2(...) metal::mtl_make<half2>(__VA_ARGS__)
#define half3(...) metal::mtl_make<half3>(__VA_ARGS__)
#define half4(...) metal::mtl_make<half4>(__VA_ARGS__)
#define bfloat2(...) metal::mtl_make<bfloat2>(__VA_ARGS__)
#define bfloat3(...) metal::mtl_make<bfloat3>(__VA_ARGS__)
#define bfloat4(...) metal::mtl_make<bfloat4>(__VA_ARGS__)
#define bool2(...) metal::mtl_make<bool2>(__VA_ARGS__)
#define bool3(...) metal::mtl_make<bool3>(__VA_ARGS__)
#define bool4(...) metal::mtl_make<bool4>(__VA_ARGS__)
