// Problems as text: "PROBLEM <kind> <code offset> <message> <where>", tab-separated, once per kind and place.
#include <stdarg.h>
#include <stdio.h>

#include "runtime.h"

static std::string format_string(const char* format, va_list arguments) {
  char text[600];
  vsnprintf(text, sizeof text, format, arguments);
  return text;
}

static std::string current_thread() {
  const Lane* lane = machine.current;
  if (!lane) return "";
  const MtlThread& t = lane->thread;
  char text[160];
  snprintf(text, sizeof text, "threadgroup (%u,%u,%u) thread %u simdgroup %u lane %u", t.group_position[0],
           t.group_position[1], t.group_position[2], t.index_in_group, t.simdgroup, t.lane);
  return text;
}

void problem(uintptr_t pc, const char* kind, const char* format, ...) {
  machine.counts.reports++;
  long offset = pc >= machine.image_begin && pc < machine.image_end ? (long)(pc - 1 - machine.image_begin) : -1;
  std::string key = std::string(kind) + "\t" + std::to_string(offset);
  machine.kinds[kind]++;
  if ((int)machine.reported.size() >= machine.options.max_problems || !machine.reported.insert(key).second) return;
  va_list arguments;
  va_start(arguments, format);
  std::string message = format_string(format, arguments);
  va_end(arguments);
  report_line("PROBLEM\t%s\t%ld\t%s\t%s", kind, offset, message.c_str(), current_thread().c_str());
}

void report_line(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  machine.report += format_string(format, arguments) + "\n";
  va_end(arguments);
}

extern "C" void mtl_undefined(const char* message) { problem(CALLER, "UB", "%s", message); }
extern "C" void mtl_undefined_lane(const char* message) {
  problem(machine.current->pc, "SIMD-INACTIVE", "%s", message);
}
