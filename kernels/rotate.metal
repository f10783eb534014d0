// The rotation of docs/FORMAT.md, section 5: z = H (signs * x) / sqrt(H), for each group of H consecutive columns.
//
//   x      T [rows, columns];  columns that are missing in the last group are zeros
//   signs  u32 [C / 32], bit c % 32 of word c / 32 set: minus
//   params u32 [2]: columns, C (columns rounded up to 64; H divides it)
//   z      Z [rows, C]
//
// Grid: x = rows x threads, y = C / H. One threadgroup transforms one group of H columns (H = 64 to 2048) with max(32,
// H / 8) threads, E = H / threads entries each. Three passes over index bits: those between a thread's entries in
// registers, those between lanes by shuffle, those between simdgroups through `shared` (H floats) with one barrier.
// MLX's hadamard_transform computes the same in three launches (pad, signs, transform); a token passes here twice a
// layer.

template <int H, typename X, typename Signs, typename Params, typename Z>
METAL_FUNC void rotate_rows(X x, Signs signs, Params params, device Z* z, threadgroup float* shared, uint3 at, uint sg,
                            uint lane) {
  constexpr uint E = H < 256 ? H / 32 : 8, threads = H / E, simdgroups = threads / 32;
  const uint columns = params[0], first = at.y * H, thread_index = 32 * sg + lane;
  const ulong from = ulong(at.x) * columns, to = ulong(at.x) * params[1] + first;
  float v[E];
#pragma clang loop unroll(full)
  for (uint e = 0; e < E; ++e) {
    const uint column = first + thread_index + threads * e;
    const float value = column < columns ? float(x[from + column]) : 0.0f;
    v[e] = signs[column / 32] >> (column % 32) & 1 ? -value : value;
  }
#pragma clang loop unroll(full)
  for (uint half_step = 1; half_step < E; half_step *= 2) {
#pragma clang loop unroll(full)
    for (uint e = 0; e < E; ++e) {
      if (e & half_step) continue;
      const float a = v[e], b = v[e + half_step];
      v[e] = a + b;
      v[e + half_step] = a - b;
    }
  }
#pragma clang loop unroll(full)
  for (uint step = 1; step < 32; step *= 2) {
#pragma clang loop unroll(full)
    for (uint e = 0; e < E; ++e) {
      const float other = simd_shuffle_xor(v[e], ushort(step));
      v[e] = lane & step ? other - v[e] : v[e] + other;
    }
  }
  const float scale = 1.0f / sqrt(float(H));
  if (simdgroups == 1) {
#pragma clang loop unroll(full)
    for (uint e = 0; e < E; ++e) z[to + threads * e + lane] = Z(v[e] * scale);
    return;
  }
#pragma clang loop unroll(full)
  for (uint e = 0; e < E; ++e) shared[threads * e + thread_index] = v[e];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  // This simdgroup finishes entries sg * E / simdgroups ... of all simdgroups.
  constexpr uint per = E / simdgroups > 0 ? E / simdgroups : 1;
#pragma clang loop unroll(full)
  for (uint i = 0; i < per; ++i) {
    const uint start = threads * (sg * per + i) + lane;
    float w[simdgroups];
#pragma clang loop unroll(full)
    for (uint s = 0; s < simdgroups; ++s) w[s] = shared[start + 32 * s];
#pragma clang loop unroll(full)
    for (uint half_step = 1; half_step < simdgroups; half_step *= 2) {
#pragma clang loop unroll(full)
      for (uint s = 0; s < simdgroups; ++s) {
        if (s & half_step) continue;
        const float a = w[s], b = w[s + half_step];
        w[s] = a + b;
        w[s + half_step] = a - b;
      }
    }
#pragma clang loop unroll(full)
    for (uint s = 0; s < simdgroups; ++s) z[to + start + 32 * s] = Z(w[s] * scale);
  }
}
