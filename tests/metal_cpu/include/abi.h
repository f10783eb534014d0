// What kernels compiled against metal_cpu.h and the runtime share. Plain C++, included on both sides.
#pragma once
#include <stdint.h>

// One exchange of a simdgroup: which lanes took part and what each of them brought.
struct MtlSnapshot {
  uint32_t mask;
  uint32_t reduced;  // 1 once `result` holds the reduction of `data`
  alignas(16) unsigned char result[64];
  alignas(16) unsigned char data[32][64];
};

// Positions of one thread; the generated entry function turns them into the kernel's [[attributes]].
struct MtlThread {
  uint32_t position_in_grid[3], position_in_group[3], group_position[3], groups_in_grid[3];
  uint32_t grid[3], group[3], full_group[3];  // `group` is smaller than `full_group` at the grid's edge
  uint32_t index_in_group, lane, simdgroup, simdgroups, full_simdgroups;
};

// Kinds of simdgroup exchange; profile.py gives each its price.
enum MtlOp : uint32_t {
  MTL_SUM,
  MTL_PRODUCT,
  MTL_MIN,
  MTL_MAX,
  MTL_AND,
  MTL_OR,
  MTL_XOR,
  MTL_PREFIX,
  MTL_SHUFFLE,
  MTL_BROADCAST,
  MTL_BALLOT,
  MTL_QUAD,
  MTL_MATRIX_LOAD,
  MTL_MATRIX_STORE,
  MTL_MATRIX_MULTIPLY,
  MTL_SIMD_BARRIER,
  MTL_OP_COUNT
};

enum MtlMemory : uint32_t { MTL_MEM_DEVICE = 1, MTL_MEM_THREADGROUP = 2 };

// Calls that stay where the kernel has them: not made conditional, not merged with another one.
#define MTL_CONVERGENT __attribute__((convergent))
#define MTL_NO_MERGE __attribute__((convergent, nomerge))

extern "C" {
// Waits until all lanes of the simdgroup are at the same call; `detail` are the memory flags of a simdgroup_barrier.
MTL_NO_MERGE const MtlSnapshot* mtl_simd(const void* value, uint32_t size, uint32_t op, uint32_t detail);
MTL_NO_MERGE void mtl_barrier(uint32_t memory_flags);
uint32_t mtl_lane();
void* mtl_threadgroup_array(const char* name, uint32_t id, uint64_t size);
void mtl_atomic(const void* address, uint32_t size, int writes);
void mtl_undefined(const char* message);       // here
void mtl_undefined_lane(const char* message);  // in the lane's last simd operation
}
