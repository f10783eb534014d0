// Relaxed 32-bit atomics. One fiber runs at a time, so a plain update is atomic; the runtime checks bounds and
// alignment.
#pragma once

namespace metal {
enum memory_order { memory_order_relaxed };
template <class T>
struct atomic {
  static_assert(sizeof(T) == 4, "Metal: only 32-bit atomics");
  T value;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<float> atomic_float;

#ifdef MTL_ADDRESS_SPACES
#define MTL_ATOMIC(p, writes) ((void)0)  // a pointer to device memory does not convert to a plain one, and nothing runs
#else
#define MTL_ATOMIC(p, writes) mtl_atomic((const void*)p, 4, writes)
#endif
template <class P, class V>
MTL_HIDDEN inline void atomic_store_explicit(P p, V v, memory_order) {
  MTL_ATOMIC(p, 1);
  p->value = v;
}
template <class P>
MTL_HIDDEN inline auto atomic_load_explicit(P p, memory_order) {
  MTL_ATOMIC(p, 0);
  return p->value;
}
#define MTL_FETCH(name, expression)                           \
  template <class P, class V>                                 \
  MTL_HIDDEN inline auto name(P p, V operand, memory_order) { \
    MTL_ATOMIC(p, 1);                                         \
    auto old = p->value;                                      \
    auto v = (decltype(old))operand;                          \
    p->value = (expression);                                  \
    return old;                                               \
  }
MTL_FETCH(atomic_fetch_add_explicit, old + v)
MTL_FETCH(atomic_fetch_sub_explicit, old - v)
MTL_FETCH(atomic_fetch_or_explicit, old | v)
MTL_FETCH(atomic_fetch_and_explicit, old& v)
MTL_FETCH(atomic_fetch_xor_explicit, old ^ v)
MTL_FETCH(atomic_exchange_explicit, v)
MTL_FETCH(atomic_fetch_max_explicit, old < v ? v : old)
MTL_FETCH(atomic_fetch_min_explicit, v < old ? v : old)
#undef MTL_FETCH
template <class P, class E, class V>
MTL_HIDDEN inline bool atomic_compare_exchange_weak_explicit(P p, E expected, V v, memory_order, memory_order) {
  MTL_ATOMIC(p, 1);
  bool same = p->value == *expected;
  if (same)
    p->value = v;
  else
    *expected = p->value;
  return same;
}
}  // namespace metal
