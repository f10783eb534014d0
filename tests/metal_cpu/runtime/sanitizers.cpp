// What clang's -fsanitize=thread and -fsanitize=undefined call: every load and store, and every operation that is
// undefined in C++. The sanitizers' own runtimes are not linked; these are our entry points under their names.
#include <string.h>

#include "runtime.h"

static uintptr_t at(const void* p) { return (uintptr_t)p; }

extern "C" {
#define MTL_ACCESS(bytes)                                                                    \
  void __tsan_read##bytes(void* p) { memory_access(at(p), bytes, false, CALLER); }           \
  void __tsan_write##bytes(void* p) { memory_access(at(p), bytes, true, CALLER); }           \
  void __tsan_unaligned_read##bytes(void* p) { memory_access(at(p), bytes, false, CALLER); } \
  void __tsan_unaligned_write##bytes(void* p) { memory_access(at(p), bytes, true, CALLER); } \
  void __tsan_read_write##bytes(void* p) {                                                   \
    memory_access(at(p), bytes, false, CALLER);                                              \
    memory_access(at(p), bytes, true, CALLER);                                               \
  }                                                                                          \
  void __tsan_unaligned_read_write##bytes(void* p) {                                         \
    memory_access(at(p), bytes, false, CALLER);                                              \
    memory_access(at(p), bytes, true, CALLER);                                               \
  }
MTL_ACCESS(1)
MTL_ACCESS(2)
MTL_ACCESS(4)
MTL_ACCESS(8)
MTL_ACCESS(16)

void __tsan_read_range(void* p, uint64_t bytes) { memory_access(at(p), bytes, false, CALLER); }
void __tsan_write_range(void* p, uint64_t bytes) { memory_access(at(p), bytes, true, CALLER); }
void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
  memory_access(at(from), bytes, false, CALLER);
  memory_access(at(to), bytes, true, CALLER);
  return memcpy(to, from, bytes);
}
void* __tsan_memmove(void* to, const void* from, size_t bytes) {
  memory_access(at(from), bytes, false, CALLER);
  memory_access(at(to), bytes, true, CALLER);
  return memmove(to, from, bytes);
}
void* __tsan_memset(void* to, int value, size_t bytes) {
  memory_access(at(to), bytes, true, CALLER);
  return memset(to, value, bytes);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

void mtl_atomic(const void* p, uint32_t bytes, int writes) {
  if (!machine.options.check && !machine.options.profile) return;
  if (at(p) % bytes) problem(CALLER, "MISALIGNED", "atomic at an address that is not a multiple of %u", bytes);
  memory_access(at(p), bytes, false, CALLER, true);
  if (writes) memory_access(at(p), bytes, true, CALLER, true);
}

// The handlers' first argument starts with file, line and column; the place is found by the return address instead.
#define MTL_UNDEFINED(name, text) \
  void __ubsan_handle_##name(void*, ...) { problem(CALLER, "UB", text); }
MTL_UNDEFINED(add_overflow, "signed addition overflows")
MTL_UNDEFINED(sub_overflow, "signed subtraction overflows")
MTL_UNDEFINED(mul_overflow, "signed multiplication overflows (narrow unsigned operands are promoted to int)")
MTL_UNDEFINED(negate_overflow, "negation overflows")
MTL_UNDEFINED(divrem_overflow, "division by zero or overflow")
MTL_UNDEFINED(shift_out_of_bounds, "shift by a negative amount or by the width or more")
MTL_UNDEFINED(pointer_overflow, "pointer arithmetic wraps around")
MTL_UNDEFINED(float_cast_overflow, "float value does not fit the integer type")
MTL_UNDEFINED(load_invalid_value, "bool or enum holds another value")
MTL_UNDEFINED(nonnull_arg, "null pointer argument")
MTL_UNDEFINED(invalid_builtin, "bit count of zero by a builtin")
MTL_UNDEFINED(alignment_assumption, "assumed alignment does not hold")
MTL_UNDEFINED(vla_bound_not_positive, "array extent is not positive")

void __ubsan_handle_out_of_bounds(void*, void* index) {
  problem(CALLER, "INDEX", "array index %ld is outside the array", (long)index);
}

struct TypeMismatch {
  const char* file;
  uint32_t line, column;
  const void* type;
  unsigned char log_alignment, kind;
};
void __ubsan_handle_type_mismatch_v1(TypeMismatch* data, void* pointer) {
  if (!pointer)
    problem(CALLER, "OOB", "access through a null pointer");
  else
    problem(CALLER, "MISALIGNED", "address %p is not a multiple of %d", pointer, 1 << data->log_alignment);
}
void __ubsan_handle_builtin_unreachable(void*) {
  problem(CALLER, "UB", "unreachable code reached");
  lane_kill();
}
void __ubsan_handle_missing_return(void*) {
  problem(CALLER, "UB", "function ends without a return value");
  lane_kill();
}

// compiler-rt's float -> bfloat16 conversion, to nearest even.
__bf16 __truncsfbf2(float value) {
  uint32_t bits = __builtin_bit_cast(uint32_t, value);
  bool nan = (bits & 0x7fffffff) > 0x7f800000;
  uint16_t half = (uint16_t)(nan ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  return __builtin_bit_cast(__bf16, half);
}
}
