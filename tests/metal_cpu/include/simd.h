// Barriers, simdgroup and quadgroup functions. Each is one exchange through the runtime (mtl_simd), then plain
// arithmetic on the snapshot of the lanes' values. The wrappers are inlined, so that the runtime sees the kernel's own
// call sites.
#pragma once

#define MTL_SIMD MTL_CONVERGENT MTL_INLINE

namespace metal {
enum class mem_flags : uint {
  mem_none = 0,
  mem_device = MTL_MEM_DEVICE,
  mem_threadgroup = MTL_MEM_THREADGROUP,
  mem_texture = 4
};
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return (mem_flags)((uint)a | (uint)b); }
MTL_SIMD void threadgroup_barrier(mem_flags flags) { mtl_barrier((uint)flags); }
MTL_SIMD void simdgroup_barrier(mem_flags flags) { mtl_simd(nullptr, 0, MTL_SIMD_BARRIER, (uint)flags); }

template <class T>
constexpr bool mtl_exchangeable = sizeof(mtl_element<T>) <= 4 && !std::is_pointer_v<T>;
template <class T>
MTL_SIMD const MtlSnapshot* mtl_exchange(T value, MtlOp op) {
  static_assert(mtl_exchangeable<T>, "Metal: simd functions take 8, 16 and 32-bit scalars or vectors of them");
  return mtl_simd(&value, sizeof(T), op, 0);
}
template <class T>
MTL_HIDDEN inline T mtl_value(const MtlSnapshot* s, uint lane) {
  T value;
  __builtin_memcpy(&value, s->data[lane & 31], sizeof(T));
  return value;
}
MTL_HIDDEN inline bool mtl_active(const MtlSnapshot* s, uint lane) { return s->mask >> (lane & 31) & 1; }

// Pairwise tree over the active lanes; the order on hardware is not documented. The first lane computes, the others
// read.
template <class T, class F>
MTL_HIDDEN __attribute__((noinline)) T mtl_reduce(const MtlSnapshot* shared, F combine) {
  MtlSnapshot* s = const_cast<MtlSnapshot*>(shared);
  T out;
  if (!s->reduced) {
    T value[32];
    bool active[32];
    for (uint i = 0; i < 32; i++) active[i] = mtl_active(s, i), value[i] = mtl_value<T>(s, i);
    for (uint step = 1; step < 32; step *= 2)
      for (uint i = 0; i < 32; i += 2 * step) {
        if (!active[i + step]) continue;
        value[i] = active[i] ? combine(value[i], value[i + step]) : value[i + step];
        active[i] = true;
      }
    __builtin_memcpy(s->result, &value[0], sizeof(T));
    s->reduced = 1;
  }
  __builtin_memcpy(&out, s->result, sizeof(T));
  return out;
}
#define MTL_REDUCTION(name, op, expression)                                                             \
  template <class T>                                                                                    \
  MTL_SIMD T name(T value) {                                                                            \
    return mtl_reduce<T>(mtl_exchange(value, op), [](T a, T b) MTL_HIDDEN -> T { return expression; }); \
  }
MTL_REDUCTION(simd_sum, MTL_SUM, a + b)
MTL_REDUCTION(simd_product, MTL_PRODUCT, a* b)
MTL_REDUCTION(simd_min, MTL_MIN, metal::min(a, b))
MTL_REDUCTION(simd_max, MTL_MAX, metal::max(a, b))
MTL_REDUCTION(simd_and, MTL_AND, a& b)
MTL_REDUCTION(simd_or, MTL_OR, a | b)
MTL_REDUCTION(simd_xor, MTL_XOR, a ^ b)
#undef MTL_REDUCTION

// Sum or product of the active lanes in [first, last).
template <class T>
MTL_HIDDEN inline T mtl_sum_of(const MtlSnapshot* s, uint first, uint last) {
  T sum = (T)0;
  for (uint i = first; i < last; i++)
    if (mtl_active(s, i)) sum = (T)(sum + mtl_value<T>(s, i));
  return sum;
}
template <class T>
MTL_HIDDEN inline T mtl_product_of(const MtlSnapshot* s, uint first, uint last) {
  T product = (T)1;
  for (uint i = first; i < last; i++)
    if (mtl_active(s, i)) product = (T)(product * mtl_value<T>(s, i));
  return product;
}
template <class T>
MTL_SIMD T simd_prefix_exclusive_sum(T v) {
  return mtl_sum_of<T>(mtl_exchange(v, MTL_PREFIX), 0, mtl_lane());
}
template <class T>
MTL_SIMD T simd_prefix_inclusive_sum(T v) {
  return mtl_sum_of<T>(mtl_exchange(v, MTL_PREFIX), 0, mtl_lane() + 1);
}
template <class T>
MTL_SIMD T simd_prefix_exclusive_product(T v) {
  return mtl_product_of<T>(mtl_exchange(v, MTL_PREFIX), 0, mtl_lane());
}
template <class T>
MTL_SIMD T simd_prefix_inclusive_product(T v) {
  return mtl_product_of<T>(mtl_exchange(v, MTL_PREFIX), 0, mtl_lane() + 1);
}

// The value of another lane; reading an absent or inactive one is undefined in Metal and reported.
template <class T>
MTL_HIDDEN inline T mtl_from(const MtlSnapshot* s, uint source) {
  if (source < 32 && mtl_active(s, source)) return mtl_value<T>(s, source);
  mtl_undefined_lane(source < 32 ? "the source lane is inactive" : "the source lane is not in 0 to 31");
  T poison;
  __builtin_memset(&poison, 0xCD, sizeof(T));
  return poison;
}
template <class T>
MTL_HIDDEN inline T mtl_from_or(const MtlSnapshot* s, uint source, T otherwise) {
  return source < 32 ? mtl_from<T>(s, source) : otherwise;
}
template <class T>
MTL_SIMD T simd_shuffle(T v, ushort lane) {
  return mtl_from<T>(mtl_exchange(v, MTL_SHUFFLE), lane);
}
template <class T>
MTL_SIMD T simd_shuffle_xor(T v, ushort mask) {
  return mtl_from<T>(mtl_exchange(v, MTL_SHUFFLE), mtl_lane() ^ mask);
}
// Past the ends Metal leaves the own value.
template <class T>
MTL_SIMD T simd_shuffle_down(T v, ushort by) {
  return mtl_from_or<T>(mtl_exchange(v, MTL_SHUFFLE), mtl_lane() + by, v);
}
template <class T>
MTL_SIMD T simd_shuffle_up(T v, ushort by) {
  return mtl_from_or<T>(mtl_exchange(v, MTL_SHUFFLE), mtl_lane() - by, v);
}
template <class T>
MTL_SIMD T simd_shuffle_and_fill_down(T v, T fill, ushort by) {
  const MtlSnapshot* values = mtl_exchange(v, MTL_SHUFFLE);
  const MtlSnapshot* fills = mtl_exchange(fill, MTL_SHUFFLE);
  uint source = mtl_lane() + by;
  return source < 32 ? mtl_from<T>(values, source) : mtl_from<T>(fills, source - 32);
}
template <class T>
MTL_SIMD T simd_shuffle_and_fill_up(T v, T fill, ushort by) {
  const MtlSnapshot* values = mtl_exchange(v, MTL_SHUFFLE);
  const MtlSnapshot* fills = mtl_exchange(fill, MTL_SHUFFLE);
  return mtl_lane() >= by ? mtl_from<T>(values, mtl_lane() - by) : mtl_from<T>(fills, mtl_lane() + 32 - by);
}
template <class T>
MTL_SIMD T simd_shuffle_rotate_down(T v, ushort by) {
  return mtl_from<T>(mtl_exchange(v, MTL_SHUFFLE), (mtl_lane() + by) & 31);
}
template <class T>
MTL_SIMD T simd_shuffle_rotate_up(T v, ushort by) {
  return mtl_from<T>(mtl_exchange(v, MTL_SHUFFLE), (mtl_lane() - by) & 31);
}
template <class T>
MTL_SIMD T simd_broadcast(T v, ushort lane) {
  return mtl_from<T>(mtl_exchange(v, MTL_BROADCAST), lane);
}
MTL_HIDDEN inline uint mtl_first(const MtlSnapshot* s) { return (uint)__builtin_ctz(s->mask); }
template <class T>
MTL_SIMD T simd_broadcast_first(T v) {
  const MtlSnapshot* s = mtl_exchange(v, MTL_BROADCAST);
  return mtl_value<T>(s, mtl_first(s));
}

struct simd_vote {
  typedef uint64_t vote_t;
  uint64_t lanes;
  explicit operator uint64_t() const { return lanes; }
  bool all() const { return lanes == 0xffffffffull; }
  bool any() const { return lanes != 0; }
};
MTL_HIDDEN inline uint64_t mtl_votes(const MtlSnapshot* s) {
  uint64_t votes = 0;
  for (uint i = 0; i < 32; i++) votes |= (uint64_t)(mtl_active(s, i) && s->data[i][0]) << i;
  return votes;
}
MTL_HIDDEN inline uint64_t mtl_mask(const MtlSnapshot* s) { return s->mask; }
MTL_SIMD simd_vote simd_ballot(bool v) { return {mtl_votes(mtl_exchange((uchar)v, MTL_BALLOT))}; }
MTL_SIMD simd_vote simd_active_threads_mask() { return {mtl_mask(mtl_simd(nullptr, 0, MTL_BALLOT, 0))}; }
MTL_SIMD bool simd_any(bool v) { return mtl_votes(mtl_exchange((uchar)v, MTL_BALLOT)) != 0; }
MTL_SIMD bool simd_all(bool v) {
  const MtlSnapshot* s = mtl_exchange((uchar)v, MTL_BALLOT);
  return mtl_votes(s) == mtl_mask(s);
}
MTL_SIMD bool simd_is_first() { return mtl_lane() == mtl_first(mtl_simd(nullptr, 0, MTL_BALLOT, 0)); }

// Quadgroups: four neighbouring lanes, on the exchange of the whole simdgroup.
MTL_SIMD uint mtl_quad() { return mtl_lane() & ~3u; }
template <class T>
MTL_SIMD T quad_sum(T v) {
  return mtl_sum_of<T>(mtl_exchange(v, MTL_QUAD), mtl_quad(), mtl_quad() + 4);
}
template <class T>
MTL_SIMD T quad_broadcast(T v, ushort lane) {
  return mtl_from<T>(mtl_exchange(v, MTL_QUAD), mtl_quad() + (lane & 3));
}
template <class T>
MTL_SIMD T quad_shuffle(T v, ushort lane) {
  return quad_broadcast(v, lane);
}
template <class T>
MTL_SIMD T quad_shuffle_xor(T v, ushort mask) {
  return mtl_from<T>(mtl_exchange(v, MTL_QUAD), mtl_lane() ^ (mask & 3u));
}
}  // namespace metal
