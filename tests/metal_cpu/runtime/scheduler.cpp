// Runs one threadgroup: lanes until each waits or has returned, then simdgroup exchanges, then threadgroup barriers.
#include <string.h>

#include <algorithm>
#include <bit>
#include <numeric>
#include <utility>

#include "runtime.h"

static Lane* lane_of(int simdgroup, int lane) { return &machine.lanes[simdgroup * 32 + lane]; }

static void wait_as(State state, uint32_t op, uint32_t detail, uintptr_t pc) {
  Lane* lane = machine.current;
  lane->state = state;
  lane->op = op;
  lane->detail = detail;
  lane->pc = pc;
  if (machine.timed_out) lane_kill();
  lane_wait(lane);
}

extern "C" const MtlSnapshot* mtl_simd(const void* value, uint32_t size, uint32_t op, uint32_t detail) {
  Lane* lane = machine.current;
  lane->value = value;
  lane->size = size;
  wait_as(State::kSimd, op, detail, CALLER);
  return lane->snapshot;
}

extern "C" void mtl_barrier(uint32_t memory_flags) { wait_as(State::kBarrier, 0, memory_flags, CALLER); }

extern "C" uint32_t mtl_lane() { return machine.current->thread.lane; }

// Lanes of the simdgroup that wait in an exchange at `pc` (0: anywhere).
static uint32_t lanes_in_exchange(int simdgroup, uintptr_t pc) {
  uint32_t mask = 0;
  for (uint32_t rest = machine.simdgroups[simdgroup].live; rest; rest &= rest - 1) {
    int i = std::countr_zero(rest);
    const Lane* lane = lane_of(simdgroup, i);
    if (lane->state == State::kSimd && (!pc || lane->pc == pc)) mask |= 1u << i;
  }
  return mask;
}

static void report_divergence(int simdgroup, Lane* first, uint32_t lanes, uint32_t waiting) {
  const Simdgroup& group = machine.simdgroups[simdgroup];
  const char* others = waiting != lanes        ? "others wait at another simd operation"
                       : group.live != waiting ? "others wait at a threadgroup_barrier"
                                               : "others have returned";
  machine.current = first;
  problem(first->pc, "SIMD-DIVERGENT", "simd operation reached by lanes %08x of %08x (%s)", lanes, group.present,
          others);
  machine.current = nullptr;
}

// Of the lanes that wait, those at the lowest call site exchange their values and may go on.
static void exchange(int simdgroup, uint32_t waiting) {
  Simdgroup& group = machine.simdgroups[simdgroup];
  Lane* first = lane_of(simdgroup, std::countr_zero(waiting));
  for (uint32_t rest = waiting; rest; rest &= rest - 1) {
    Lane* lane = lane_of(simdgroup, std::countr_zero(rest));
    if (lane->pc < first->pc) first = lane;
  }
  uint32_t lanes = lanes_in_exchange(simdgroup, first->pc);
  if (lanes != group.present && machine.options.strict && !machine.lane_killed)
    report_divergence(simdgroup, first, lanes, waiting);
  machine.counts.simd_ops++;
  if (machine.options.profile) profile_exchange(first, lanes);
  group.turn ^= 1;
  MtlSnapshot& snapshot = group.snapshots[group.turn];
  snapshot.mask = lanes;
  snapshot.reduced = 0;
  for (uint32_t rest = lanes; rest; rest &= rest - 1) {
    int i = std::countr_zero(rest);
    Lane* lane = lane_of(simdgroup, i);
    if (lane->size) memcpy(snapshot.data[i], lane->value, lane->size);
    lane->snapshot = &snapshot;
    lane->state = State::kReady;
  }
  if (first->detail & MTL_MEM_DEVICE) group.device_epoch++;
  if (first->detail & MTL_MEM_THREADGROUP) group.threadgroup_epoch++;
  group.ready |= lanes;
}

// Until every lane of the simdgroup waits at a threadgroup barrier or has returned.
static void run_simdgroup(int simdgroup) {
  Simdgroup& group = machine.simdgroups[simdgroup];
  while (!machine.timed_out) {
    if (group.ready) {
      lane_resume(lane_of(simdgroup, pick_bit(group.ready)));
      continue;
    }
    uint32_t waiting = lanes_in_exchange(simdgroup, 0);
    if (!waiting) break;
    exchange(simdgroup, waiting);
  }
  if (machine.options.profile) profile_flush();
}

// Releases the threadgroup barrier; false when no thread waits at one.
static bool release_barrier() {
  Lane* first = nullptr;
  int waiting = 0;
  bool mixed = false;
  uint32_t flags = MTL_MEM_DEVICE | MTL_MEM_THREADGROUP;
  for (int i = 0; i < machine.threads; i++) {
    Lane* lane = &machine.lanes[i];
    if (lane->state != State::kBarrier) continue;
    waiting++;
    flags &= lane->detail;
    if (!first) first = lane;
    mixed |= lane->pc != first->pc;
  }
  if (!waiting) return false;
  machine.current = first;
  if (mixed) problem(first->pc, "BARRIER-DIVERGENT", "threads wait at different threadgroup_barriers");
  if (waiting != machine.threads && !machine.lane_killed)
    problem(first->pc, "BARRIER-DIVERGENT", "%d threads wait at threadgroup_barrier, %d have returned", waiting,
            machine.threads - waiting);
  machine.current = nullptr;
  machine.counts.barriers++;
  if (flags & MTL_MEM_DEVICE) machine.device_epoch++;
  if (flags & MTL_MEM_THREADGROUP) machine.threadgroup_epoch++;
  for (int i = 0; i < machine.threads; i++) {
    Lane* lane = &machine.lanes[i];
    if (lane->state != State::kBarrier) continue;
    lane->state = State::kReady;
    machine.simdgroups[i / 32].ready |= 1u << (i & 31);
  }
  return true;
}

static void start_lanes() {
  for (int s = 0; s < machine.simdgroup_count; s++) {
    int lanes = std::min(32, machine.threads - s * 32);
    Simdgroup& group = machine.simdgroups[s];
    group.present = group.live = group.ready = lanes == 32 ? ~0u : (1u << lanes) - 1;
  }
  for (int i = 0; i < machine.threads; i++) lane_start(&machine.lanes[i]);
}

void run_threadgroup() {
  machine.lane_killed = false;
  start_lanes();
  int order[32];
  std::iota(order, order + 32, 0);
  do {
    if (machine.options.seed)
      for (int i = machine.simdgroup_count - 1; i > 0; i--) std::swap(order[i], order[next_random() % (i + 1)]);
    for (int i = 0; i < machine.simdgroup_count; i++) run_simdgroup(order[i]);
  } while (!machine.timed_out && release_barrier());
}
