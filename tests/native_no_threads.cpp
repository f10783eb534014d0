// A system that has no more threads: the call must be refused, the workers that had started must end, and later calls
// must work. Prints what each call gave: "refused done".
#include "threads.h"

#include <sys/resource.h>

#include <atomic>
#include <cstdio>
#include <exception>
#include <fstream>
#include <string>

namespace {

// Bytes of address space in use.
long used() {
  std::ifstream file("/proc/self/statm");
  long pages = 0;
  file >> pages;
  return pages * 4096;
}

const char* call() {
  std::atomic<int> done{0};
  try {
    tqmoe::Turn().each(100, [&](int64_t, int) { ++done; });
  } catch (const std::exception&) {
    return "refused";
  }
  return done == 100 ? "done" : "wrong";
}

}  // namespace

int main() {
  rlimit before;
  getrlimit(RLIMIT_AS, &before);
  rlimit narrow = before;
  narrow.rlim_cur = static_cast<rlim_t>(used() + (64l << 20));  // for a few stacks
  setrlimit(RLIMIT_AS, &narrow);
  tqmoe::set_threads(200);
  std::printf("%s ", call());
  setrlimit(RLIMIT_AS, &before);
  tqmoe::set_threads(4);
  std::printf("%s\n", call());
}
