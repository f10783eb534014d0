// One fiber per GPU thread. A waiting lane switches straight to the next ready lane of its simdgroup, the last one to
// the scheduler.
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <algorithm>

#include "runtime.h"

Machine machine;

// Saves the callee-saved registers on the own stack and continues on the other one.
asm(R"(
.text
.type mtl_switch,@function
mtl_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
extern "C" __attribute__((visibility("hidden"))) void mtl_switch(void** save, void* load);

void fibers_prepare() {
  if (machine.lanes) return;
  machine.lanes = new Lane[kMaxThreads]();
  size_t bytes = kStackBytes * kMaxThreads;
  machine.stacks =
      (char*)mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (machine.stacks == MAP_FAILED) abort();
  for (int i = 0; i < kMaxThreads; i++) {
    machine.lanes[i].stack = machine.stacks + i * kStackBytes;
    mprotect(machine.lanes[i].stack, 4096, PROT_NONE);  // a stack that grows too far faults
  }
}

uint64_t next_random() {
  uint64_t& x = machine.random_state;
  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  return x;
}

uint32_t pick_bit(uint32_t mask) {
  if (machine.options.seed)
    for (uint32_t skip = next_random() % __builtin_popcount(mask); skip; skip--) mask &= mask - 1;
  return __builtin_ctz(mask);
}

static void lane_finish(Lane* lane) {
  lane->state = State::kDone;
  machine.simdgroups[lane->thread.simdgroup].live &= ~(1u << lane->thread.lane);
  lane_wait(lane);
  abort();  // a finished lane is never resumed
}

static void lane_main() {
  machine.options.entry(machine.arguments, &machine.current->thread);
  lane_finish(machine.current);
}

void lane_start(Lane* lane) {
  void** top =
      (void**)(lane->stack + kStackBytes - 64);  // 16-byte aligned after `ret` took the address, as the ABI asks
  *--top = nullptr;
  *--top = (void*)lane_main;
  for (int i = 0; i < 6; i++) *--top = nullptr;
  lane->stack_pointer = top;
  lane->state = State::kReady;
}

void lane_resume(Lane* lane) {
  machine.current = lane;
  mtl_switch(&machine.scheduler_stack_pointer, lane->stack_pointer);
  machine.current = nullptr;
}

void lane_wait(Lane* lane) {
  Simdgroup& group = machine.simdgroups[lane->thread.simdgroup];
  group.ready &= ~(1u << lane->thread.lane);
  machine.counts.switches++;
  if (!group.ready || machine.timed_out) {
    mtl_switch(&lane->stack_pointer, machine.scheduler_stack_pointer);
  } else {
    Lane* next = &machine.lanes[lane->thread.simdgroup * 32 + pick_bit(group.ready)];
    machine.current = next;
    mtl_switch(&lane->stack_pointer, next->stack_pointer);
  }
}

void lane_kill() {
  machine.lane_killed = true;
  lane_finish(machine.current);
  __builtin_unreachable();
}
