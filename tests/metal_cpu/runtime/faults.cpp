// Keeps a broken kernel from taking the process with it: a fault or a timeout ends the lane, not Python.
// Only lanes are touched: a fault elsewhere goes to the handler that was there before.
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>
#include <ucontext.h>

#include "runtime.h"

static struct sigaction previous_segv, previous_bus, previous_fpe, previous_timer;
static stack_t previous_stack;
static char* signal_stack;
static uintptr_t fault_address, fault_pc;
static int fault_signal;

static bool in_kernel(uintptr_t pc) { return pc >= machine.image_begin && pc < machine.image_end; }
static bool in_runtime(uintptr_t pc) { return pc >= machine.runtime_begin && pc < machine.runtime_end; }

// Where an interrupted lane continues; it never returns.
static void lane_faulted() {
  uintptr_t stack = (uintptr_t)machine.current->stack;
  if (fault_address - stack < 4096)
    problem(fault_pc, "STACK", "thread stack of %zu B overflowed", kStackBytes - 4096);
  else if (fault_signal == SIGFPE)
    problem(fault_pc, "FAULT", "integer division by zero or overflow");
  else
    problem(fault_pc, "FAULT", "access to unmapped memory at %p", (void*)fault_address);
  lane_kill();
}

static void lane_timed_out() {
  problem(fault_pc, "TIMEOUT", "still running after %.3g s of CPU time", machine.options.limit_s);
  lane_kill();
}

// Makes the interrupted lane continue at `function` on a fresh stack; its frames are given up.
static void redirect(ucontext_t* context, void (*function)()) {
  greg_t* registers = context->uc_mcontext.gregs;
  registers[REG_RSP] = (greg_t)(machine.current->stack + kStackBytes - 64 - 8);
  registers[REG_RIP] = (greg_t)function;
}

static void on_fault(int signal, siginfo_t* info, void* context) {
  ucontext_t* interrupted = (ucontext_t*)context;
  fault_pc = (uintptr_t)interrupted->uc_mcontext.gregs[REG_RIP];
  if (!machine.current || in_runtime(fault_pc)) {
    faults_remove();  // not a kernel's: let it happen again under the handler of before
    return;
  }
  fault_signal = signal;
  fault_address = signal == SIGFPE ? 0 : (uintptr_t)info->si_addr;
  fault_pc++;  // reports expect return addresses
  redirect(interrupted, lane_faulted);
}

static void on_timer(int, siginfo_t*, void* context) {
  ucontext_t* interrupted = (ucontext_t*)context;
  machine.timed_out = true;
  fault_pc = (uintptr_t)interrupted->uc_mcontext.gregs[REG_RIP];
  if (!machine.current || !in_kernel(fault_pc)) return;  // elsewhere: the next memory access, exchange or tick sees it
  fault_pc++;
  redirect(interrupted, lane_timed_out);
}

static void handle(int signal, void (*handler)(int, siginfo_t*, void*), struct sigaction* previous) {
  struct sigaction action;
  memset(&action, 0, sizeof action);
  action.sa_sigaction = handler;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART;
  sigaction(signal, &action, previous);
}

void faults_install() {
  if (!signal_stack) signal_stack = (char*)malloc(kStackBytes);
  stack_t stack = {};
  stack.ss_sp = signal_stack;
  stack.ss_size = kStackBytes;
  sigaltstack(&stack, &previous_stack);
  handle(SIGSEGV, on_fault, &previous_segv);
  handle(SIGBUS, on_fault, &previous_bus);
  handle(SIGFPE, on_fault, &previous_fpe);
  handle(SIGPROF, on_timer, &previous_timer);
  itimerval timer = {};
  timer.it_value.tv_sec = (time_t)machine.options.limit_s;
  timer.it_value.tv_usec = (suseconds_t)((machine.options.limit_s - (double)timer.it_value.tv_sec) * 1e6);
  timer.it_interval.tv_usec = 10000;  // then every 10 ms, for lanes that are still to stop
  setitimer(ITIMER_PROF, &timer, nullptr);
}

void faults_remove() {
  itimerval off = {};
  setitimer(ITIMER_PROF, &off, nullptr);
  sigaction(SIGSEGV, &previous_segv, nullptr);
  sigaction(SIGBUS, &previous_bus, nullptr);
  sigaction(SIGFPE, &previous_fpe, nullptr);
  sigaction(SIGPROF, &previous_timer, nullptr);
  sigaltstack(&previous_stack, nullptr);
}
