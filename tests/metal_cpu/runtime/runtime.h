// State of the emulated GPU: one launch at a time, all threads as fibers of one OS thread, so nothing here needs a
// lock.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <map>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "../include/abi.h"

constexpr int kMaxThreads = 1024;               // a threadgroup's limit on Apple GPUs
constexpr size_t kThreadgroupLimit = 32 << 10;  // bytes a kernel may declare
constexpr size_t kArenaBytes = 256 << 10;       // more, so that a kernel over the limit can still be run and reported
constexpr size_t kRedZone = 256;                // bytes between threadgroup arrays
constexpr size_t kStackBytes = 64 << 10;        // a fiber's stack, the guard page included
constexpr unsigned char kPoison = 0xCD;

typedef void (*KernelEntry)(void** buffers, const MtlThread* thread);

// Passed from Python (kernel.py) in this layout.
struct BufferArgument {
  const char* name;
  void* host;
  uint64_t bytes;
  int32_t writable;     // an output
  int32_t initialised;  // an output whose contents count as written
  int32_t in_place;     // used where it lies instead of copied between guard pages
  int32_t skew;         // bytes added to the copy's aligned address
  int32_t element;      // bytes of an element: the unit in which races are watched
};
struct LaunchOptions {
  KernelEntry entry;
  uint32_t grid[3], group[3];
  uint64_t first_group, group_count;  // which threadgroups run
  uint64_t seed;                      // 0: lanes in order
  double limit_s;
  int32_t check, profile, strict, max_problems;
};
struct LaunchCounts {
  uint64_t threads, switches, simd_ops, barriers, accesses, threadgroup_bytes, reports;
};

enum class State : uint8_t { kReady, kSimd, kBarrier, kDone };

struct Lane {
  MtlThread thread;
  void* stack_pointer;
  char* stack;
  State state;
  uintptr_t pc;  // of the call it waits in
  uint32_t op, detail, size;
  const void* value;
  const MtlSnapshot* snapshot;
};

struct Simdgroup {
  uint32_t present, live, ready;  // lanes that exist, have not returned, can run
  uint32_t device_epoch, threadgroup_epoch;
  MtlSnapshot snapshots[2];  // a lane may still read the last exchange while others enter the next
  int turn;
};

// Who touched a byte last; see races.cpp.
struct Access {
  uint32_t writer, write_epoch, write_simd_epoch;
  int32_t reader;
  uint32_t read_epoch, read_simd_epoch, reader_group;
};

struct Buffer {
  std::string name;
  char* begin;
  size_t bytes;
  bool writable, in_place;
  size_t element;
  Access* history = nullptr;   // one per element, mapped but untouched until used; outputs in check mode
  uint8_t* written = nullptr;  // one per byte; outputs in check mode
  std::unordered_map<uint64_t, uint64_t> read_lines;  // 64-byte line -> a bit per byte that was read; profile mode
  uint64_t requested_read = 0, requested_written = 0, fetched = 0;
};

struct ThreadgroupArray {
  uint32_t id;
  std::string name;
  size_t offset, bytes;
};

struct Machine {
  LaunchOptions options;
  LaunchCounts counts;
  void** arguments;

  // Fibers (fibers.cpp)
  Lane* lanes;
  char* stacks;
  Simdgroup simdgroups[32];
  Lane* current;  // null while the scheduler runs
  void* scheduler_stack_pointer;
  int threads, simdgroup_count;
  bool lane_killed, timed_out;
  uint64_t random_state;
  uintptr_t image_begin, image_end;  // the kernel's own library: constants may be read, code may be interrupted
  uintptr_t runtime_begin, runtime_end;

  // Memory (memory.cpp, races.cpp)
  char* reserve;
  size_t reserve_bytes;
  int slot_shift;
  std::vector<Buffer> buffers;
  char* arena;
  std::vector<ThreadgroupArray> arrays;
  size_t arena_used, arena_payload;
  std::vector<Access> arena_history;
  std::vector<uint32_t> arena_written;  // the threadgroup serial that last wrote the byte
  uint32_t group_index, group_serial, device_epoch, threadgroup_epoch, first_epoch;

  // Reports (report.cpp)
  std::string report;
  std::unordered_set<std::string> reported;
  std::map<std::string, uint64_t> kinds;  // with repeats
};
extern Machine machine;

// fibers.cpp
void fibers_prepare();
void lane_start(Lane* lane);
void lane_resume(Lane* lane);
void lane_wait(Lane* lane);
[[noreturn]] void lane_kill();
uint32_t pick_bit(uint32_t mask);
uint64_t next_random();

// faults.cpp
void faults_install();
void faults_remove();

// scheduler.cpp
void run_threadgroup();

// memory.cpp
bool memory_map(const BufferArgument* arguments, int count, std::vector<void*>& pointers);
void memory_return(const BufferArgument* arguments, int count);
void memory_unmap();
void threadgroup_memory_reset();
void memory_access(uintptr_t address, size_t bytes, bool write, uintptr_t pc, bool atomic = false);
bool is_output_incomplete(const Buffer& buffer, size_t& missing);

// races.cpp
void race_check(Access& access, bool write, bool device, uintptr_t pc, const char* name, size_t offset);

// profile.cpp
void profile_begin();
void profile_access(uintptr_t address, size_t bytes, bool write, int buffer, uintptr_t pc);
void profile_exchange(const Lane* lane, uint32_t lanes);
void profile_flush();
void profile_group_end();
void profile_end();

// report.cpp: one tab-separated line per problem; kernel.py turns code offsets into kernel lines.
void problem(uintptr_t pc, const char* kind, const char* format, ...) __attribute__((format(printf, 3, 4)));
void report_line(const char* format, ...) __attribute__((format(printf, 1, 2)));
#define CALLER ((uintptr_t)__builtin_return_address(0))
