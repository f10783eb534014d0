// simdgroup_matrix: 8x8, two neighbouring elements a lane in the lane order that MLX's steel kernels rely on, float32
// accumulation.
#pragma once

namespace metal {
template <class T, int R, int C>
struct simdgroup_matrix {
  static_assert(R == 8 && C == 8, "Metal: simdgroup_matrix is 8x8");
  vec<T, 2> elements;
  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T v) { elements[0] = elements[1] = v; }
  vec<T, 2>& thread_elements() { return elements; }
  const vec<T, 2>& thread_elements() const { return elements; }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;
template <class T, int R, int C>
inline simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T v) {
  return simdgroup_matrix<T, R, C>(v);
}

MTL_HIDDEN MTL_INLINE uint mtl_matrix_row(uint lane) { return (lane / 4 & 4) + (lane / 2 & 3); }
MTL_HIDDEN MTL_INLINE uint mtl_matrix_column(uint lane) { return (lane / 4 & 2) * 2 + (lane & 1) * 2; }
MTL_INLINE ulong mtl_matrix_at(uint k, ulong stride, ulong2 origin, bool transposed) {
  ulong column = mtl_matrix_column(mtl_lane()) + k, row = mtl_matrix_row(mtl_lane());
  return ((transposed ? column : row) + origin[1]) * stride + (transposed ? row : column) + origin[0];
}
template <class T, class P>
MTL_SIMD void simdgroup_load(simdgroup_matrix<T, 8, 8>& m, P from, ulong stride = 8, ulong2 origin = 0,
                             bool transposed = false) {
  mtl_simd(nullptr, 0, MTL_MATRIX_LOAD, 0);
  for (uint k = 0; k < 2; k++) m.elements[k] = (T)from[mtl_matrix_at(k, stride, origin, transposed)];
}
template <class T, class P>
MTL_SIMD void simdgroup_store(simdgroup_matrix<T, 8, 8> m, P to, ulong stride = 8, ulong2 origin = 0,
                              bool transposed = false) {
  mtl_simd(nullptr, 0, MTL_MATRIX_STORE, 0);
  for (uint k = 0; k < 2; k++) to[mtl_matrix_at(k, stride, origin, transposed)] = m.elements[k];
}

struct mtl_operands {
  float a[2], b[2];
};
// Adds the lane's two elements of A B to `sum`.
MTL_HIDDEN __attribute__((noinline)) inline void mtl_multiply(const MtlSnapshot* s, uint lane, float* sum) {
  float a[8][8], b[8][8];
  for (uint l = 0; l < 32; l++) {
    mtl_operands part = mtl_value<mtl_operands>(s, l);
    for (uint k = 0; k < 2; k++)
      a[mtl_matrix_row(l)][mtl_matrix_column(l) + k] = part.a[k],
                                                  b[mtl_matrix_row(l)][mtl_matrix_column(l) + k] = part.b[k];
  }
  for (uint k = 0; k < 2; k++)
    for (uint i = 0; i < 8; i++)
      sum[k] = __builtin_fmaf(a[mtl_matrix_row(lane)][i], b[i][mtl_matrix_column(lane) + k], sum[k]);
}
template <class D, class A, class B, class C>
MTL_SIMD void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a,
                                            simdgroup_matrix<B, 8, 8> b, simdgroup_matrix<C, 8, 8> c) {
  mtl_operands own = {{(float)a.elements[0], (float)a.elements[1]}, {(float)b.elements[0], (float)b.elements[1]}};
  const MtlSnapshot* s = mtl_simd(&own, sizeof(own), MTL_MATRIX_MULTIPLY, 0);
  if (mtl_mask(s) != 0xffffffffu) mtl_undefined_lane("simdgroup_matrix with inactive lanes");
  float sum[2] = {(float)c.elements[0], (float)c.elements[1]};
  mtl_multiply(s, mtl_lane(), sum);
  d.elements[0] = (D)sum[0];
  d.elements[1] = (D)sum[1];
}
template <class D, class A, class B>
MTL_SIMD void simdgroup_multiply(simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a,
                                 simdgroup_matrix<B, 8, 8> b) {
  simdgroup_multiply_accumulate(d, a, b, simdgroup_matrix<D, 8, 8>((D)0));
}
}  // namespace metal
