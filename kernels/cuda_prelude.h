// What kernels/*.metal take from Metal, for CUDA. tiny_qmoe_mlx/cuda.py puts this in front of their text and replaces the
// words that no header can define (address spaces among them: a macro `device` would break `__device__`).
//
// A simdgroup is a warp: its functions take part with all 32 lanes, as the kernels call them. Threadgroups are rows of
// threads in x, whole multiples of 32, and grids are whole multiples of threadgroups (CUDA has no partial ones).
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define METAL_FUNC __device__ __forceinline__
#define threadgroup_position_in_grid blockIdx
#define thread_index_in_threadgroup threadIdx.x
#define thread_index_in_simdgroup (threadIdx.x % 32)
#define simdgroup_index_in_threadgroup (threadIdx.x / 32)
#define simdgroups_per_threadgroup (blockDim.x / 32)

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;

template <typename T, int N>
struct alignas(N * sizeof(T)) vec;
template <typename T>
struct alignas(2 * sizeof(T)) vec<T, 2> {
  T x, y;
};
struct alignas(8) half4 {
  half v[4];
  METAL_FUNC half operator[](int i) const { return v[i]; }
};

template <typename To, typename From>
METAL_FUNC To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type keeps the size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

enum mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
METAL_FUNC void threadgroup_barrier(int) { __syncthreads(); }
METAL_FUNC void simdgroup_barrier(int) { __syncwarp(); }

#define TQ_ALL_LANES 0xFFFFFFFFu
template <typename T>
METAL_FUNC T simd_shuffle(T v, ushort lane) { return __shfl_sync(TQ_ALL_LANES, v, lane); }
template <typename T>
METAL_FUNC T simd_broadcast(T v, ushort lane) { return __shfl_sync(TQ_ALL_LANES, v, lane); }
template <typename T>
METAL_FUNC T simd_shuffle_xor(T v, ushort mask) { return __shfl_xor_sync(TQ_ALL_LANES, v, mask); }
METAL_FUNC uint simd_ballot(bool vote) { return __ballot_sync(TQ_ALL_LANES, vote); }

template <typename T>
METAL_FUNC T simd_sum(T v) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) v += __shfl_xor_sync(TQ_ALL_LANES, v, step);
  return v;
}

template <typename T>
METAL_FUNC T simd_min(T v) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) v = min(v, __shfl_xor_sync(TQ_ALL_LANES, v, step));
  return v;
}

template <typename T>
METAL_FUNC T simd_prefix_exclusive_sum(T v) {
  T sum = v;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const T before = __shfl_up_sync(TQ_ALL_LANES, sum, step);
    if (thread_index_in_simdgroup >= step) sum += before;
  }
  return sum - v;
}

METAL_FUNC uint popcount(uint v) { return __popc(v); }
METAL_FUNC uint ctz(uint v) { return v == 0 ? 32 : __ffs(v) - 1; }
METAL_FUNC uint extract_bits(uint v, uint at, uint count) { return v >> at & ((1u << count) - 1); }  // count < 32
template <typename T>
METAL_FUNC T clamp(T v, T low, T high) { return min(max(v, low), high); }
namespace precise {
METAL_FUNC float tanh(float v) { return tanhf(v); }
}
